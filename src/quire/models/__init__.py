"""Models, written once against the backend protocol, and how they are loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quire.architectures import read_model_config
from quire.backends import Backend, Logits, SomeRows
from quire.batch import PagedBatch
from quire.config import ModelConfig
from quire.errors import CheckpointError
from quire.models.checkpoint import (
    Checkpoint,
    Progress,
    load_params,
    stored_bytes,
    weights_files,
)
from quire.models.choosing import OfLayers
from quire.models.decoder import Decoder
from quire.models.digest import weights_digest
from quire.models.gpt2 import GPT2
from quire.models.names import tensor_specs
from quire.models.source import QUILL, resolve_model
from quire.models.text import StreamDecoder, TextCodec, load_text_codec
from quire.pages import PagePool

__all__ = [
    "QUILL",
    "CausalLM",
    "Checkpoint",
    "LoadedModel",
    "Progress",
    "StreamDecoder",
    "TextCodec",
    "load_model",
    "resolve_model",
    "weights_digest",
    "weights_files",
]


class CausalLM(Protocol):
    """A model that predicts the next token."""

    def forward(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        rows: Sequence[int],
    ) -> Logits:
        """Append ``tokens`` [T] to the pools; logits float32 [len(rows), vocab] of those rows."""

    def forward_with(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        rows: Sequence[int],
        *,
        attend: Callable[[int, Any], Any],
        beside: Sequence[SomeRows] = (),
    ) -> Logits:
        """As :meth:`forward`, op by op, with another attention: the same bits if it is the same.

        ``attend`` is called with each layer's number and queries [T, H, D], turned as that
        layer's stored keys are, when those are in its pool, and gives [T, H * D]; both are the
        backend's arrays. ``beside``: the batches of some rows that it attends with.
        """

    def forward_choosing(
        self,
        tokens: Sequence[int],
        batch: PagedBatch,
        pools: Sequence[PagePool],
        summaries: OfLayers,
    ) -> Logits:
        """As :meth:`forward`, of one token of each sequence, whose every row is wanted.

        In layers with summaries these choose from the batch's candidates what they read.
        """


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    page_format         the checkpoint's own dtype (fp32, bf16 or fp16)
    weight_bytes        of all weights, as stored
    bytes_read_a_step   of the weights that every step reads whole: all but tables of which a step
                        reads single rows
    """

    config: ModelConfig
    model: CausalLM
    codec: TextCodec | None
    page_format: str
    weight_bytes: int
    bytes_read_a_step: int


def load_model(directory: Path, backend: Backend, progress: Progress | None = None) -> LoadedModel:
    """Load a Hugging Face model directory.

    Raises CheckpointError for a directory that is missing, incomplete or damaged, and
    UnsupportedArchitecture, with the list of supported ones, for a model that Quire cannot run.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory with a model in it")
    config = read_model_config(directory)
    checkpoint = Checkpoint(directory)
    specs = tensor_specs(config)
    params = load_params(checkpoint, specs, backend, progress)
    sizes = stored_bytes(checkpoint, specs)
    by_row = sizes.get("positions", 0) + (0 if config.tied_embeddings else sizes["embed"])
    kind: type[Decoder] | type[GPT2] = Decoder if config.rope is not None else GPT2
    model = kind(config, params, backend)
    return LoadedModel(
        config=config,
        model=model,
        codec=load_text_codec(directory),
        page_format=checkpoint.page_format,
        weight_bytes=sum(sizes.values()),
        bytes_read_a_step=sum(sizes.values()) - by_row,
    )
