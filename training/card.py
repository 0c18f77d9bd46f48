"""Write an exported model's README.md and LICENSE from its own figures.

`python -m training.card FOLDER`, after training.export and training.evaluate, so that no number in
the card is copied by hand.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from training.export import CONFIG, EVALUATION, TRAINING

LICENSE_NOTE = """\
quill: licences of this folder

Weights, configuration, tokenizer and evaluation results (everything but heldout/) are licensed
under the Apache License, Version 2.0 (http://www.apache.org/licenses/LICENSE-2.0), as Quire is.

The texts in heldout/ are modules of the CPython standard library, unchanged, Copyright (c) 2001
Python Software Foundation; All Rights Reserved. They are licensed under the PSF License Agreement,
which is in heldout/LICENSE.txt. The texts the weights were trained on have the same source.
"""


def main() -> None:
    """Write both files into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    config, training, evaluation = (
        json.loads((folder / name).read_text("utf-8")) for name in (CONFIG, TRAINING, EVALUATION)
    )
    (folder / "README.md").write_text(card(config, training, evaluation), "utf-8")
    (folder / "LICENSE").write_text(LICENSE_NOTE, "utf-8")


def card(config: dict[str, Any], training: dict[str, Any], evaluation: dict[str, Any]) -> str:
    """The model card as Markdown."""
    sections = (
        _what_it_is(config, training),
        _data(training),
        _how_trained(training),
        _measured(evaluation),
        _sample(training),
        _limitations(),
    )
    return "\n".join(sections)


def _what_it_is(config: dict[str, Any], training: dict[str, Any]) -> str:
    return f"""\
# quill

quill is a language model of {training["parameters"]:,} parameters, trained from scratch on the
sources of the Python standard library. It ships with Quire so that the engine, its KV cache and its
compression methods can be run, tested and measured against a real trained network with nothing to
download. It is **not** a chat model, not a coding assistant, and not good at writing Python: it has
seen one library and knows its manner. The chat template in `tokenizer_config.json` exists to let
chat endpoints be exercised, no more.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: RMSNorm, RoPE (rotate-half), SwiGLU, tied embeddings |
| parameters | {training["parameters"]:,}, stored in bfloat16 |
| layers | {config["num_hidden_layers"]} |
| hidden size / FFN size | {config["hidden_size"]} / {config["intermediate_size"]} |
| query heads / KV heads / head size | {config["num_attention_heads"]} / \
{config["num_key_value_heads"]} / {config["head_dim"]} |
| context | {config["max_position_embeddings"]} tokens, RoPE base {config["rope_theta"]:.0f} |
| vocabulary | {config["vocab_size"]} tokens, byte-level BPE, every digit its own token |

The token `<|bos|>` ({config["bos_token_id"]}) begins every text, `<|endoftext|>` \
({config["eos_token_id"]}) ends it.
"""


def _data(training: dict[str, Any]) -> str:
    corpus = training["corpus"]
    mix = training["progress"]["settings"]["mix"]
    library, tests = corpus["library"], corpus["tests"]
    held_out = ", ".join(f"`{name}`" for name in corpus["held_out"])
    about = _wrap(f"""
The `Lib` folder of CPython {corpus["python_version"]} as installed, without site-packages and data
tables: {library["files"]} library files ({library["bytes"] / 1e6:.1f} MB, {library["tokens"]:,}
tokens) and {tests["files"]} files of its tests ({tests["bytes"] / 1e6:.1f} MB,
{tests["tokens"]:,} tokens), {mix["tests"]:.0%} of the rows being drawn from the tests. No other
text was used. The sources are Copyright (c) 2001 Python Software Foundation, under the PSF License
Agreement; the weights are under Apache-2.0 (see LICENSE).""")
    kept_back = _wrap(f"""
Held out, together with their tests, from the network's and the tokenizer's training: {held_out}.
Their texts are in `heldout/`.""")
    return f"""\
## Data

{about}

{kept_back}

{mix["recall"]:.0%} of the rows are *recall documents*: library text into which lines `# set NAME
VALUE` and, later, `# get NAME VALUE` are put, NAME and VALUE being words of one token each, paired
afresh in every document, at distances up to the full context. After `# get NAME` the model has to
look VALUE up in its context. That makes forgetting measurable when a KV cache is compressed.
`training/recall.py` makes them.
"""


def _how_trained(training: dict[str, Any]) -> str:
    progress = training["progress"]
    settings = progress["settings"]
    text = _wrap(f"""
`python -m training.train --run FOLDER --steps {settings["steps"]} \
--short-steps {settings["short_steps"]} \
--decay-share {settings["decay_share"]:g}` (seed {settings["seed"]}), {progress["step"]:,} steps of
{settings["batch"]:,} tokens, {progress["tokens"] / 1e6:.1f} million tokens in all: rows of
{settings["short_length"]} tokens for the first {settings["short_steps"]:,} steps, of
{settings["length"]} after. {progress["seconds"] / 60:.0f} minutes on 2 cores of a Zen 4 server CPU
that other work shared, in bfloat16 autocast with torch {training["torch_version"]}. Muon for the
layers' matrices and AdamW for embedding and norms, warmup-stable-decay schedule.""")
    return f"## Training\n\n{text}\n{_history(progress)}\n{training['notes']}"


def _wrap(text: str) -> str:
    """One paragraph in lines of at most 100 characters."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def _history(progress: dict[str, Any]) -> str:
    """Prose on a run whose settings changed on the way; empty for one that kept them."""
    changes = progress.get("changes", [])
    if len(changes) < 2:
        return ""
    lines = "\n".join(
        f"- from step {change['step']:,}: recall share {change['recall']:.2f}, dense share "
        f"{change['dense']:.2f}, weight of an answer {change['answer_weight']:g}"
        for change in changes
    )
    return f"""
The mix was changed on the way (`--recall --dense --answer-weight`), and the total and the share of
the decay were fixed late, by resuming:

{lines}
"""


def _measured(evaluation: dict[str, Any]) -> str:
    bits, recall = evaluation["bits_per_byte"], evaluation["recall"]
    total = bits["total"]
    modules = "\n".join(
        f"| `{name}` | {entry['bits_per_byte']:.3f} | {entry['bytes']:,} |"
        for name, entry in bits["modules"].items()
    )
    distances = "\n".join(
        f"| {distance} | {accuracy:.1%} |"
        for distance, accuracy in recall["accuracy_by_distance"].items()
    )
    text = _wrap(f"""
**Held-out text: {total["bits_per_byte"]:.3f} bits per byte** (perplexity
{total["perplexity_per_token"]:.2f} per token, {total["tokens"]:,} tokens). {bits["method"]}""")
    recalled = _wrap(f"""
**Recall by distance.** {recall["method"]} {recall["trials_per_distance"]} trials a distance.
Guessing among the vocabulary reaches {recall["chance_any_token"]:.2%}, among the words used as
values {recall["chance_any_value_word"]:.2%}, among the values in the prompt
{recall["chance_value_in_prompt"]:.1%}.""")
    return f"""\
## Measured

By `python -m training.evaluate FOLDER`, on the exported weights; all figures are in
`evaluation.json`.

{text}

| module | bits per byte | bytes |
|---|---|---|
{modules}
| **all** | **{total["bits_per_byte"]:.3f}** | {total["bytes"]:,} |

{recalled}

| distance in tokens | right |
|---|---|
{distances}
"""


def _sample(training: dict[str, Any]) -> str:
    sample = training["sample"]
    check = training["export_check"]
    texts = "\n".join(
        f"At temperature {temperature}:\n\n```\n{sample['prompt']}{text}\n```\n"
        for temperature, text in sample["by_temperature"].items()
    )
    return f"""\
## Sample

60 tokens after the prompt `{sample["prompt"]}`, greedy (temperature 0) and drawn:

{texts}
Loss on the first window of each held-out module, in nats per token: {check["loss_float32"]:.4f}
as trained (float32), {check["loss_exported_bf16"]:.4f} as exported (bfloat16).
"""


def _limitations() -> str:
    return """\
## Limitations

- Four layers, a small vocabulary and minutes of training: its text is code-shaped, rarely correct.
- It has read Python sources with English comments and nothing else.
- A prompt should not end in a space: words are tokens with their space in front, so a space of its
  own is, to quill, what stands before a number.
- It has no meaning beyond its 2048-token context.
- With nine values set, recall is near perfect at every distance, so that a loss after compression
  is the compression's; it is near its ceiling, and cannot show an improvement.
- Recall is of its own line format; it is no measure of long-context understanding in general.
- How a compression method ranks on a model of this size need not be how it ranks on a large one.
"""


if __name__ == "__main__":
    main()
