"""Engines that rotate keys whatever their format, which nobody may ask for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from quire.engine import storage
from quire.format_choice import Formats
from quire.layout import CacheLayout, cache_layout

__all__ = ["turn_all_keys"]


def turn_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are made from now on rotate keys: over exact pages that only rounds."""

    def layout(model: Any, size: int, formats: Sequence[Formats]) -> CacheLayout:
        return cache_layout(model, size, [(replace(k, rotated=True), v) for k, v in formats])

    monkeypatch.setattr(storage, "cache_layout", layout)
