"""Safetensors to parameters: what loads, what is refused, and what the refusal says."""

import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from checkpoints import DTYPES, Config, random_tensors, tensor_shapes, tiny_config, write_checkpoint
from quire.backends import create_backend
from quire.errors import CheckpointError
from quire.models import LoadedModel, load_model
from quire.models.checkpoint import Checkpoint

Array = npt.NDArray[Any]

LLAMA = tiny_config("llama")
GPT2 = tiny_config("gpt2")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"


def load(directory: Path) -> LoadedModel:
    return load_model(directory, create_backend("reference"))


def params(directory: Path) -> dict[str, Array]:
    return load(directory).model.params  # type: ignore[attr-defined]


def refusal(directory: Path) -> str:
    """The message of the CheckpointError that loading gives."""
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return str(caught.value)


_LISTENERS: list[list[str]] = []


def _listen(event: str, given: tuple[Any, ...]) -> None:
    if event == "open":
        for listener in _LISTENERS:
            listener.append(str(given[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths of the files that Python opens during a test."""
    if not hasattr(_listen, "added"):  # an audit hook cannot be taken away again
        sys.addaudithook(_listen)
        _listen.added = True  # type: ignore[attr-defined]
    _LISTENERS.append([])
    yield _LISTENERS[0]
    _LISTENERS.clear()


def same(a: dict[str, Array], b: dict[str, Array]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# -- what loads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_number_arrives_from_one_file_or_many(
    tmp_path: Path, dtype: str, shards: int
) -> None:
    tensors = random_tensors(LLAMA)
    loaded = load(write_checkpoint(tmp_path, LLAMA, dtype=dtype, shards=shards))
    assert loaded.page_format == dtype
    got = loaded.model.params  # type: ignore[attr-defined]
    assert len(got) == len(tensors)
    for ours, theirs in {
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "norm": "model.norm.weight",
        "layers.0.attn_norm": "model.layers.0.input_layernorm.weight",
        "layers.0.mlp_norm": "model.layers.0.post_attention_layernorm.weight",
        "layers.1.q": Q,
        "layers.1.k": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.v": "model.layers.1.self_attn.v_proj.weight",
        "layers.1.o": "model.layers.1.self_attn.o_proj.weight",
        "layers.0.gate": "model.layers.0.mlp.gate_proj.weight",
        "layers.0.up": "model.layers.0.mlp.up_proj.weight",
        "layers.0.down": "model.layers.0.mlp.down_proj.weight",
    }.items():
        wanted = tensors[theirs].astype(DTYPES[dtype]).astype(np.float32)
        assert got[ours].dtype == np.float32
        assert np.array_equal(got[ours], wanted), ours


def test_gpt2_linears_are_split_and_turned(tmp_path: Path) -> None:
    tensors = random_tensors(GPT2)
    got = params(write_checkpoint(tmp_path, GPT2))
    joint, bias = (tensors[f"transformer.h.1.attn.c_attn.{x}"] for x in ("weight", "bias"))
    for i, name in enumerate("qkv"):
        columns = slice(32 * i, 32 * (i + 1))
        assert np.array_equal(got[f"layers.1.{name}"], joint[:, columns].T)
        assert np.array_equal(got[f"layers.1.{name}_bias"], bias[columns])
    assert np.array_equal(got["layers.0.up"], tensors["transformer.h.0.mlp.c_fc.weight"].T)
    assert np.array_equal(got["positions"], tensors["transformer.wpe.weight"])
    assert np.array_equal(got["norm_bias"], tensors["transformer.ln_f.bias"])


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("llama", attention_bias=True, mlp_bias=True),
        tiny_config("llama", head_dim=10, num_attention_heads=5, num_key_value_heads=1),
        tiny_config("mistral"),
        tiny_config("qwen2"),
        tiny_config("qwen3", attention_bias=True),
        tiny_config("gpt2", n_inner=40, tie_word_embeddings=False),
    ],
    ids=["llama biases", "llama 5 and 1 heads", "mistral", "qwen2", "qwen3", "gpt2 untied"],
)
def test_every_architecture_uses_all_of_its_tensors(tmp_path: Path, config: Config) -> None:
    got = params(write_checkpoint(tmp_path, config))
    held = sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())
    assert sum(array.size for array in got.values()) == held


@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("redundant", [False, True])
def test_tied_embeddings_load_with_and_without_a_head(
    tmp_path: Path, base: Config, redundant: bool
) -> None:
    config = {**base, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    if redundant:
        embed = "transformer.wte.weight" if base is GPT2 else "model.embed_tokens.weight"
        tensors["lm_head.weight"] = tensors[embed].copy()
    got = params(write_checkpoint(tmp_path, config, tensors))
    assert "head" not in got


def test_untied_embeddings_need_a_head(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    del tensors["lm_head.weight"]
    message = refusal(write_checkpoint(tmp_path, LLAMA, tensors))
    assert "'lm_head.weight' of shape [97, 32] is missing" in message


def old_gpt2() -> dict[str, Array]:
    """As the original GPT-2 was saved: no prefix, and the causal mask as buffers."""
    tensors = {k.removeprefix("transformer."): v for k, v in random_tensors(GPT2).items()}
    for layer in range(GPT2["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 160, 160), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return tensors


def test_gpt2_without_prefix_and_with_mask_buffers(tmp_path: Path) -> None:
    old = params(write_checkpoint(tmp_path / "old", GPT2, old_gpt2()))
    assert same(old, params(write_checkpoint(tmp_path / "new", GPT2)))


def test_mask_buffers_of_another_dtype_are_ignored_too(tmp_path: Path) -> None:
    tensors = random_tensors(GPT2)
    tensors["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    load(write_checkpoint(tmp_path, GPT2, tensors))


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load(write_checkpoint(tmp_path, LLAMA, tensors))


def test_tensors_are_read_only_maps_of_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, dtype="bf16", shards=2)
    checkpoint = Checkpoint(tmp_path)
    for name, shape in tensor_shapes(LLAMA).items():
        tensor = checkpoint.tensor(name, shape)
        assert isinstance(tensor, np.memmap)
        assert tensor.mode == "r"
        assert not tensor.flags.writeable
        assert Path(str(tensor.filename)).parent == tmp_path


def test_names_lists_every_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=3)
    assert set(Checkpoint(tmp_path).names) == set(tensor_shapes(LLAMA))


def test_the_page_format_is_that_of_most_numbers(tmp_path: Path) -> None:
    """Here most tensors are fp32, but most numbers bf16, so the cache is bf16."""
    tensors = random_tensors(LLAMA)
    wide = {name: a for name, a in tensors.items() if "attn" in name or "norm" in name}
    narrow = {name: a for name, a in tensors.items() if name not in wide}
    assert len(wide) > len(narrow)
    weight_map = {}
    for part, dtype in ((wide, "fp32"), (narrow, "bf16")):
        write_checkpoint(tmp_path, LLAMA, part, dtype=dtype)
        (tmp_path / SINGLE).rename(tmp_path / f"{dtype}.safetensors")
        weight_map |= dict.fromkeys(part, f"{dtype}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert load(tmp_path).page_format == "bf16"


def test_a_file_whose_numbers_are_not_aligned_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "even", LLAMA)
    write_checkpoint(tmp_path / "odd", LLAMA)
    change_header(tmp_path / "odd" / SINGLE, lambda header: None, pad=3)
    assert same(params(tmp_path / "odd"), params(tmp_path / "even"))


def test_progress_counts_up_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    backend = create_backend("reference")
    load_model(write_checkpoint(tmp_path, LLAMA), backend, lambda *step: seen.append(step))
    total = len(tensor_shapes(LLAMA))
    assert seen == [("weights", done + 1, total) for done in range(total)]


# -- tensors that are not as they should be ------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA, "model.embed_tokens.weight"),
        (LLAMA, "model.norm.weight"),
        (LLAMA, Q),
        (tiny_config("qwen2"), "model.layers.0.self_attn.v_proj.bias"),
        (tiny_config("qwen3"), "model.layers.1.self_attn.k_norm.weight"),
        (tiny_config("llama", mlp_bias=True), "model.layers.1.mlp.down_proj.bias"),
        (GPT2, "transformer.h.1.attn.c_attn.weight"),
        (GPT2, "transformer.ln_f.bias"),
    ],
)
def test_a_missing_tensor_is_named_with_its_shape(
    tmp_path: Path, config: Config, name: str
) -> None:
    tensors = random_tensors(config)
    shape = list(tensors.pop(name).shape)
    message = refusal(write_checkpoint(tmp_path, config, tensors))
    assert f"'{name}' of shape {shape} is missing" in message
    assert str(tmp_path) in message


def test_an_extra_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA) | {"model.layers.2.mlp.up_proj.weight": np.zeros((44, 32))}
    message = refusal(write_checkpoint(tmp_path, LLAMA, tensors))
    assert "'model.layers.2.mlp.up_proj.weight' of shape [44, 32] has no place" in message
    assert SINGLE in message


def test_a_bias_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    biased = tiny_config("llama", attention_bias=True)
    message = refusal(write_checkpoint(tmp_path, LLAMA, random_tensors(biased)))
    assert "_proj.bias' of shape" in message
    assert "has no place" in message


@pytest.mark.parametrize("shape", [(32, 31), (31, 32), (1024,), (32, 32, 1), (64, 16), ()])
def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = random_tensors(LLAMA) | {Q: np.zeros(shape, np.float32)}
    message = refusal(write_checkpoint(tmp_path, LLAMA, tensors))
    assert f"tensor '{Q}' has shape {list(shape)}, but config.json implies [32, 32]" in message
    assert SINGLE in message


def test_gpt2_shapes_are_named_as_they_stand_in_the_file(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    tensors = random_tensors(GPT2)
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    message = refusal(write_checkpoint(tmp_path, GPT2, tensors))
    assert f"'{name}' has shape [96, 32], but config.json implies [32, 96]" in message


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_])
def test_an_unsupported_dtype_is_named(tmp_path: Path, dtype: Any) -> None:
    tensors = random_tensors(LLAMA) | {Q: np.zeros((32, 32), dtype)}
    message = refusal(write_checkpoint(tmp_path, LLAMA, tensors))
    assert f"'{Q}' of shape [32, 32] is" in message
    assert "F32, BF16, F16" in message
    assert SINGLE in message


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I32"])
def test_an_unsupported_float_is_named(tmp_path: Path, dtype: str) -> None:
    size = {"F64": 8, "F8_E4M3": 1, "I32": 4}[dtype]
    shape = [32 * 4 // size, 32]
    config = tiny_config("llama", num_attention_heads=2, num_key_value_heads=2)
    config |= {"head_dim": 32 * 4 // size // 2}
    tensors = random_tensors(config)
    tensors[Q] = np.zeros((32, 32), np.float32)

    def relabel(header: dict[str, Any]) -> None:
        header[Q] |= {"dtype": dtype, "shape": shape}

    write_checkpoint(tmp_path, config, tensors)
    change_header(tmp_path / SINGLE, relabel)
    message = refusal(tmp_path)
    assert f"'{Q}' of shape {shape} is {dtype}; supported are F32, BF16, F16" in message


# -- files that are damaged ----------------------------------------------------------------------


def change_header(path: Path, change: Callable[[dict[str, Any]], None], pad: int = 0) -> None:
    """Rewrite the header of a safetensors file in place, ``pad`` spaces longer than need be."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def refuses(path: Path) -> bool:
    """True for a CheckpointError that names the checkpoint of ``path``, False if it loads."""
    try:
        load(path.parent)
    except CheckpointError as error:
        message = str(error)
    else:
        return False
    assert str(path.parent) in message
    return True


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, bytes, int]:
    """A checkpoint's weight file, its bytes and where its numbers begin."""
    path = write_checkpoint(tmp_path, LLAMA) / SINGLE
    raw = path.read_bytes()
    return path, raw, 8 + struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize("where", ["0", "1", "7", "8", "9", "header/2", "header-1"])
def test_a_file_cut_in_its_header_is_truncated(whole: tuple[Path, bytes, int], where: str) -> None:
    path, raw, begin = whole
    cut = {"header/2": begin // 2, "header-1": begin - 1}.get(where) or int(where)
    path.write_bytes(raw[:cut])
    message = refusal(path.parent)
    assert "truncated" in message
    assert str(path) in message


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 1.0])
def test_a_file_cut_in_its_numbers_names_the_first_tensor_that_suffers(
    whole: tuple[Path, bytes, int], part: float
) -> None:
    path, raw, begin = whole
    cut = begin + int(part * (len(raw) - begin - 1))
    path.write_bytes(raw[:cut])
    message = refusal(path.parent)
    header = json.loads(raw[8:begin])
    assert "truncated" in message
    assert str(path) in message
    named = next(name for name in header if f"'{name}'" in message)
    assert str(header[named]["shape"]) in message
    assert begin + header[named]["data_offsets"][1] > cut


def test_every_prefix_of_a_file_is_refused(whole: tuple[Path, bytes, int]) -> None:
    path, raw, begin = whole
    rng = np.random.default_rng(0)
    for cut in sorted({*rng.integers(0, len(raw), 60), *rng.integers(0, begin, 60)}):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            load(path.parent)


@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path, shards: int) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    assert str(path) in refusal(tmp_path)


def test_flipped_bits_in_a_header_never_give_another_exception(
    whole: tuple[Path, bytes, int],
) -> None:
    """A damaged header is refused, or says the same thing in other words and loads cleanly."""
    path, raw, begin = whole
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(raw)
        for at in rng.integers(0, begin, rng.integers(1, 4)):
            damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        refused += refuses(path)
    assert refused > 300


def test_replaced_bytes_in_a_header_never_give_another_exception(
    whole: tuple[Path, bytes, int],
) -> None:
    """Bytes that JSON cares about, so that the header often stays valid JSON."""
    path, raw, begin = whole
    rng = np.random.default_rng(1)
    signs = b'0123456789-.eE,:[]{}" \\ntFI'
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.integers(8, begin)] = signs[rng.integers(len(signs))]
        path.write_bytes(damaged)
        refuses(path)


HEADERS: dict[str, Any] = {
    "a list": [1, 2],
    "null": None,
    "a number": 3,
    "tensors of no kind": {"a": None},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "one offset": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    "text offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    "null offsets": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [None, None]}},
    "negative": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    "turned": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "huge": {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}},
    "overflow": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
    "fraction": {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
    "text shape": {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
    "shape and bytes differ": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "no dtype": {"a": {"shape": [1], "data_offsets": [0, 4]}},
    "list dtype": {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}},
    "hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_makes_no_sense_is_refused_by_file(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, LLAMA)
    text = json.dumps(HEADERS[kind]).encode()
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert str(path) in refusal(tmp_path)


def test_a_header_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    text = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    assert SINGLE in refusal(tmp_path)


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, LLAMA)
    really = Path.open

    def denied(self: Path, *given: Any, **named: Any) -> Any:
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return really(self, *given, **named)

    monkeypatch.setattr(Path, "open", denied)
    message = refusal(tmp_path)
    assert str(tmp_path / SINGLE) in message
    assert "Permission denied" in message


# -- directories that are not as they should be --------------------------------------------------


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} is not a directory" in refusal(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        Checkpoint(tmp_path / "nowhere")


def test_a_directory_without_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert f"{tmp_path} has no model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_pickle_is_named_and_never_opened(tmp_path: Path, opened: list[str], name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(b"a pickle")
    opened.clear()
    message = refusal(tmp_path)
    assert f"{name} is a pickle, which Quire never opens" in message
    assert "safe_serialization=True" in message
    assert str(tmp_path / "config.json") in opened
    assert str(tmp_path / name) not in opened


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refusal(tmp_path)
    assert "1 of 3 shards are missing, first model-00002-of-00003.safetensors" in message


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "sub/x.safetensors", "{}/x.safetensors", ".."]
)
def test_an_index_that_points_elsewhere_is_refused_unopened(
    tmp_path: Path, opened: list[str], name: str
) -> None:
    inside = tmp_path / "model"
    write_checkpoint(inside, LLAMA, shards=2)
    (inside / "sub").mkdir()
    for place in (tmp_path, inside / "sub"):
        save_file({"lm_head.weight": np.zeros((97, 32))}, place / "x.safetensors")
    index = json.loads((inside / INDEX).read_text())
    index["weight_map"][Q] = name.format(tmp_path)
    (inside / INDEX).write_text(json.dumps(index))
    opened.clear()
    assert name.format(tmp_path) in refusal(inside)
    assert not any(path.endswith("x.safetensors") for path in opened)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index["weight_map"][Q] = second if index["weight_map"][Q] == first else first
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"tensor '{Q}' is in {index['weight_map'][Q]}; it is not" in message
    assert INDEX in message


def test_an_index_that_promises_a_tensor_too_many_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.bias"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "'lm_head.bias'" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    message = refusal(tmp_path)
    assert "stands in both" in message
    assert first.name in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"],
)
def test_a_damaged_index_is_named(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=2)
    (tmp_path / INDEX).write_bytes(content)
    assert INDEX in refusal(tmp_path)


@pytest.mark.parametrize("file", [None, 5, [], "", "\0", "x" * 400])
def test_an_index_with_names_that_are_none_is_refused(tmp_path: Path, file: Any) -> None:
    write_checkpoint(tmp_path, LLAMA, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][Q] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    refusal(tmp_path)


def test_the_config_and_the_weights_of_two_models_do_not_mix(tmp_path: Path) -> None:
    message = refusal(write_checkpoint(tmp_path, LLAMA, random_tensors(GPT2)))
    assert "transformer." in message
    assert "has no place in this architecture" in message
