"""Exports a checkpoint to OpenVINO, with a dummy tokenizer. Needs optimum-intel[openvino].

    python make_openvino.py DIRECTORY TARGET

Weights are fp16: optimum-cli offers fp32 and fp16, not bf16. GenAI wants a tokenizer to be there;
token ids go in all the same.
"""

import json
import subprocess
import sys
from pathlib import Path

import openvino
from openvino_tokenizers import convert_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Export, then add the tokenizer."""
    source, target = sys.argv[1], sys.argv[2]
    command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino"]
    command += ["--model", source, "--task", "text-generation-with-past"]
    subprocess.run([*command, "--weight-format", "fp16", target], check=True)
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"<{at}>" for at in range(len(letters), config["vocab_size"])]
    fillers[0] = letters[0] + letters[1]
    vocabulary = {token: at for at, token in enumerate([*letters, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(letters[0], letters[1])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([fillers[-1]])  # the conversion fails without any
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    there, back = convert_tokenizer(fast, with_detokenizer=True)
    openvino.save_model(there, Path(target) / "openvino_tokenizer.xml")
    openvino.save_model(back, Path(target) / "openvino_detokenizer.xml")


if __name__ == "__main__":
    main()
