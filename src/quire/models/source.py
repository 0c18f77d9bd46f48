"""From what the user wrote to a directory with a model in it."""

import re
from importlib.resources import files
from pathlib import Path

from quire.errors import CheckpointError

__all__ = ["QUILL", "hub_config", "is_hub_name", "resolve_model"]

QUILL = "quill"

_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_OTHER_COPIES = ["consolidated*", "original/*", "*/*"]  # of the same weights, for other programs


def resolve_model(name: str | Path | None) -> Path:
    """The directory of a model: a path, a hub name (``org/model``), or None for quill.

    Hub names are looked up in the local hub cache first and downloaded if they are not there.
    Raises CheckpointError if nothing is found.
    """
    if name is None or name == QUILL:
        return Path(str(files("quire") / "assets" / QUILL))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json")
    if is_hub_name(str(name)):
        return _from_hub(str(name))
    raise CheckpointError(
        f"no model directory at {path}; give a directory, a hub name such as org/model, or none "
        f"for the built-in {QUILL}"
    )


def hub_config(name: str) -> Path:
    """The ``config.json`` of a hub model, and nothing else: from the local cache, or fetched.

    Raises CheckpointError, with the reason, if the hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    for local in (True, False):
        try:
            return Path(hf_hub_download(name, "config.json", local_files_only=local))
        except Exception as error:  # the hub library has a family of errors for it
            why = error
    raise CheckpointError(
        f"the hub did not give config.json of {name!r}: {type(why).__name__}: "
        f"{str(why).splitlines()[0]}"
    ) from why


def is_hub_name(name: str) -> bool:
    """Whether ``name`` is of the form ``org/model``."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def _from_hub(name: str) -> Path:
    # Imported late: it takes longer to import than everything else together.
    from huggingface_hub import snapshot_download

    def snapshot(local: bool) -> Path:
        """The model's files, from the local cache only or from the hub."""
        return Path(
            snapshot_download(
                name,
                allow_patterns=_PATTERNS,
                ignore_patterns=_OTHER_COPIES,
                local_files_only=local,
            )
        )

    try:
        cached = snapshot(local=True)
        if any(cached.glob("*.safetensors")):
            return cached
    except Exception:  # not cached; the hub library has a family of errors for it
        pass
    try:
        return snapshot(local=False)
    except Exception as error:
        raise CheckpointError(
            f"there is no directory {name!r} here, and the hub did not give a model of that name: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
