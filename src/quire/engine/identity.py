"""What computed a page: everything that decides its bits, so that no other may read it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import quire
from quire.backends import Backend
from quire.config import ModelConfig
from quire.layout import CacheLayout
from quire.models import weights_digest, weights_files

__all__ = ["describe", "identity_bytes"]

FORMAT = "1"  # of pages as tiers and session files hold them

_NOT_COMPARED = ("model",)
# Facts of a config that do not decide what is computed.
_IGNORED = ("ignored_keys", "bos_token_id", "eos_token_ids")


def describe(
    directory: Path,
    config: ModelConfig,
    layout: CacheLayout,
    backend: Backend,
    memo: Path | None = None,
) -> dict[str, str]:
    """The identity of what an engine computes. Reads all weights, to digest them.

    ``model`` is for people and is not compared; ``config`` covers every fact of the config.
    ``memo`` is a file that remembers digests of weights.
    """
    facts = {name: value for name, value in asdict(config).items() if name not in _IGNORED}
    return {
        "model": str(directory),
        "weights": weights_digest(weights_files(directory), memo),
        "architecture": (
            f"{config.architecture}, {config.num_layers} layers of {config.hidden_size}, "
            f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, vocabulary "
            f"{config.vocab_size}"
        ),
        "rope": "none" if config.rope is None else f"{config.rope.kind} {config.rope.theta:g}",
        "config": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16],
        "page_format": layout.format_text,
        "page_size": str(layout.page_size),
        "backend": backend.identity,
        "quire": quire.__version__,
        "format": FORMAT,
    }


def identity_bytes(identity: Mapping[str, str]) -> bytes:
    """A digest of all that is compared, to begin chains of page hashes with."""
    compared = {name: value for name, value in identity.items() if name not in _NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).digest()
