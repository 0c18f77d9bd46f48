"""Writes a random bf16 Llama as transformers saves it. Runs where transformers is installed.

python make_model.py DIRECTORY CONFIG_JSON
"""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Values come from one block of normal numbers: speed does not depend on them."""
    directory, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    theta = settings.pop("rope_theta")
    config = LlamaConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    block = torch.randn((1 << 22) + 3, generator=torch.Generator().manual_seed(0))
    block = (block * config.initializer_range).to(torch.bfloat16)
    with torch.no_grad():
        for at, (name, weight) in enumerate(model.named_parameters()):
            if "norm" in name:
                weight.fill_(1)
                continue
            flat = weight.view(-1)
            turned = block.roll(104_729 * at)
            for start in range(0, flat.numel(), turned.numel()):
                part = flat[start : start + turned.numel()]
                part.copy_(turned[: part.numel()])
    model.save_pretrained(directory)
    path = directory / "config.json"
    keys = json.loads(path.read_text(encoding="utf-8"))
    keys["rope_theta"] = theta  # where transformers before 5 looks for it
    path.write_text(json.dumps(keys, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
