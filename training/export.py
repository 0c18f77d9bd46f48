"""Write a run's checkpoint as a Hugging Face model folder, and check what was written.

`python -m training.export --run FOLDER --out FOLDER` writes config.json, model.safetensors (bf16),
tokenizer.json, tokenizer_config.json, generation_config.json, training.json (what the run was) and
heldout/ (the texts of the held-out modules, with their licence).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from training.checkpoint import load_checkpoint, model_of
from training.corpus import read_held_out_sources, standard_library
from training.data import CORPUS
from training.generate import generate
from training.model import Quill, QuillConfig, parameter_count
from training.tokenizer import BOS, EOS, load_tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
EVALUATION = "evaluation.json"
TRAINING = "training.json"
NOTES = "notes.txt"
"""What a person has to say on a run, in its folder; it goes into the model card."""
HELD_OUT_FOLDER = "heldout"
HELD_OUT_SUFFIX = ".py.txt"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "# {{ message['role'] }}: {{ message['content'] }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)
SAMPLE_PROMPT = "def __init__(self"
SAMPLE_TOKENS = 60
SAMPLE_TEMPERATURES = (0.0, 0.7)


def main() -> None:
    """Export, reload, compare, and print a sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    state = load_checkpoint(options.run / "checkpoint.pt")
    tokenizer = load_tokenizer(options.run / TOKENIZER)
    model = model_of(state)
    options.out.mkdir(parents=True, exist_ok=True)
    write_model(model, options.out)
    write_tokenizer(tokenizer, model.config, options.out)
    write_held_out(options.out)
    again = load_export(options.out)
    check = compare(model, again, tokenizer, read_held_out(options.out))
    samples = {
        str(temperature): generate(
            again, tokenizer, SAMPLE_PROMPT, SAMPLE_TOKENS, temperature=temperature
        )
        for temperature in SAMPLE_TEMPERATURES
    }
    notes = options.run / NOTES
    about = {
        "corpus": json.loads((options.run / CORPUS).read_text()),
        "parameters": parameter_count(model),
        "progress": state["progress"],
        "notes": notes.read_text("utf-8") if notes.exists() else "",
        "torch_version": torch.__version__,
        "export_check": check,
        "sample": {"prompt": SAMPLE_PROMPT, "by_temperature": samples},
    }
    _write_json(options.out / TRAINING, about)
    print(json.dumps(about, indent=2))


def write_model(model: Quill, out: Path) -> None:
    """config.json, generation_config.json and the weights in bf16, under their own names."""
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    _write_json(out / CONFIG, model.config.to_hf(**ids))
    _write_json(out / "generation_config.json", ids | {"do_sample": False})
    tensors: dict[str, Tensor] = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / WEIGHTS).chmod(0o644)


def write_tokenizer(tokenizer: Tokenizer, config: QuillConfig, out: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(out / TOKENIZER))
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_held_out(out: Path) -> None:
    """Copy the held-out modules, and Python's licence, which asks to go with them."""
    folder = out / HELD_OUT_FOLDER
    folder.mkdir(exist_ok=True)
    for name, text in read_held_out_sources().items():
        (folder / f"{name}{HELD_OUT_SUFFIX}").write_text(text, "utf-8")
    shutil.copyfile(standard_library() / "LICENSE.txt", folder / "LICENSE.txt")


def read_held_out(folder: Path) -> dict[str, str]:
    """The held-out texts of an exported folder, by module name, in order of name."""
    paths = sorted((folder / HELD_OUT_FOLDER).glob(f"*{HELD_OUT_SUFFIX}"))
    return {path.name.removesuffix(HELD_OUT_SUFFIX): path.read_text("utf-8") for path in paths}


def load_export(folder: Path) -> Quill:
    """Read an exported folder back into the training network, float32."""
    described: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    fields = QuillConfig.__dataclass_fields__
    model = Quill(QuillConfig(**{key: described[key] for key in fields}))
    tensors = load_file(folder / WEIGHTS)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


@torch.no_grad()
def compare(
    trained: Quill, exported: Quill, tokenizer: Tokenizer, texts: dict[str, str]
) -> dict[str, float]:
    """Loss (nats a token) of both on the first window of every held-out text."""
    nats = [0.0, 0.0]
    for text in texts.values():
        ids = torch.tensor([tokenizer.encode(text).ids[: trained.config.max_position_embeddings]])
        weights = torch.ones(1, ids.shape[1] - 1)
        for index, model in enumerate((trained, exported)):
            nats[index] += model.loss(ids[:, :-1], ids[:, 1:], weights).item() / len(texts)
    return {"loss_float32": round(nats[0], 5), "loss_exported_bf16": round(nats[1], 5)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
