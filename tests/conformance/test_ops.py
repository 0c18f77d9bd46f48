"""Dense and elementwise ops of every backend against float64, at awkward shapes."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conformance import (
    ALL_SUBJECTS,
    Subject,
    activations,
    assert_as_good_as_plain,
    backend_of,
    naive,
)
from quire.backends.rope import inverse_frequencies
from quire.batch import PagedBatch
from quire.config import RopeConfig
from quire.pages import page_format

pytestmark = ALL_SUBJECTS

LLAMA3 = RopeConfig(
    kind="llama3",
    theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=8192,
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "out"),
    [(1, 1, 1), (1, 64, 1), (1, 257, 33), (3, 5, 7), (8, 32, 16), (9, 127, 65), (70, 1024, 19)],
)
def test_linear(subject: Subject, rows: int, inner: int, out: int, bias: bool) -> None:
    backend = backend_of(subject)
    x, weight, add = draw(1, rows, inner), draw(2, out, inner), draw(3, out) if bias else None
    taken = None if add is None else backend.weight(add)
    got = backend.linear(activations(backend, x), backend.weight(weight), taken)
    plain = naive.linear(x, weight, add, subject.arithmetic)
    exact = naive.linear(x, weight, add, np.float64)
    assert_as_good_as_plain(backend.to_host(got), plain, exact)


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 64, 33), (13, 271, 65), (30, 640, 40)])
def test_linear_with_stored_weights(
    subject: Subject, rows: int, inner: int, out: int, format: str
) -> None:
    backend = backend_of(subject)
    weight = draw(2, out, inner).astype(page_format(format).dtype)
    x = draw(1, rows, inner)
    got = backend.linear(activations(backend, x), backend.weight(weight))
    plain = naive.linear(x, weight, None, subject.arithmetic, subject.operand(format))
    exact = naive.linear(x, weight, None, np.float64)
    assert_as_good_as_plain(backend.to_host(got), plain, exact)


def test_linear_of_no_rows_is_empty(subject: Subject) -> None:
    backend = backend_of(subject)
    none = backend.rows(activations(backend, draw(1, 1, 32)), [])
    got = backend.to_host(backend.linear(none, backend.weight(draw(2, 7, 32))))
    assert got.shape == (0, 7)


def test_a_row_of_linear_has_the_same_bits_in_any_company(subject: Subject) -> None:
    if not subject.exact:
        pytest.skip(f"{subject.name} does not claim the exactness law")
    backend = backend_of(subject)
    x, weight = draw(1, 41, 130), backend.weight(draw(2, 75, 130))
    together = backend.to_host(backend.linear(activations(backend, x), weight))
    for size in (1, 2, 7, 8, 9, 40):
        parts = [activations(backend, x[at : at + size]) for at in range(0, len(x), size)]
        apart = [backend.to_host(backend.linear(part, weight)) for part in parts]
        assert np.array_equal(np.concatenate(apart), together)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_every_dtype_are_taken_exactly(subject: Subject, dtype: Any) -> None:
    backend = backend_of(subject)
    stored = draw(1, 5, 6).astype(dtype)
    stored.setflags(write=False)
    identity = activations(backend, np.eye(6, dtype=np.float32))
    got = backend.to_host(backend.linear(identity, backend.weight(stored)))
    assert np.array_equal(got, stored.astype(np.float32).T)


def test_a_transposed_view_is_taken_as_a_weight(subject: Subject) -> None:
    backend = backend_of(subject)
    stored = draw(1, 6, 9)
    identity = activations(backend, np.eye(6, dtype=np.float32))
    got = backend.to_host(backend.linear(identity, backend.weight(stored.T)))
    assert np.array_equal(got, stored)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 64), (2, 5, 128), (4, 6, 33), (1, 4096)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(subject: Subject, shape: tuple[int, ...], scale: float) -> None:
    backend = backend_of(subject)
    x, weight = draw(1, *shape) * np.float32(scale), draw(2, shape[-1])
    got = backend.rms_norm(activations(backend, x), backend.weight(weight), 1e-6)
    plain = naive.rms_norm(x, weight, 1e-6, subject.arithmetic)
    exact = naive.rms_norm(x, weight, 1e-6, np.float64)
    assert_as_good_as_plain(backend.to_host(got), plain, exact)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_of_zeros_is_zero_and_eps_counts(subject: Subject, eps: float) -> None:
    backend = backend_of(subject)
    weight = backend.weight(np.ones(8, np.float32))
    x = np.array([[0.0] * 8, [1e-9] * 8], np.float32)
    zero, tiny = backend.to_host(backend.rms_norm(activations(backend, x), weight, eps))
    assert not zero.any()
    assert tiny == pytest.approx(1e-9 / math.sqrt(eps), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 2), (1, 7), (3, 64), (5, 33), (2, 4096)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm(subject: Subject, shape: tuple[int, ...], offset: float) -> None:
    backend = backend_of(subject)
    x, weight, bias = draw(1, *shape) + np.float32(offset), draw(2, shape[-1]), draw(3, shape[-1])
    taken = activations(backend, x)
    got = backend.layer_norm(taken, backend.weight(weight), backend.weight(bias), 1e-5)
    plain = naive.layer_norm(x, weight, bias, 1e-5, subject.arithmetic)
    exact = naive.layer_norm(x, weight, bias, 1e-5, np.float64)
    assert_as_good_as_plain(backend.to_host(got), plain, exact)


@pytest.mark.parametrize("dim", [2, 6, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    "rope",
    [RopeConfig(), RopeConfig(kind="linear", factor=4.0), LLAMA3],
    ids=["default", "linear", "llama3"],
)
def test_rope(subject: Subject, dim: int, rope: RopeConfig) -> None:
    backend = backend_of(subject)
    # Backends make tables as long as positions are far: far ones where rows of a table are short.
    positions = np.array([0, 1, 2, 17, 4095, 131_071 if dim <= 32 else 8191], np.int64)
    inv_freq = inverse_frequencies(rope, dim)
    x = draw(1, len(positions), 3, dim)
    got = backend.to_host(backend.rope(activations(backend, x), positions, inv_freq))
    plain = naive.rope(x, positions, inv_freq, subject.arithmetic)
    assert_as_good_as_plain(got, plain, naive.rope(x, positions, inv_freq, np.float64))
    assert np.array_equal(got[0], x[0]), "position 0 is not rotated"


def test_rope_makes_scores_depend_on_distance_only(subject: Subject) -> None:
    backend = backend_of(subject)
    inv_freq = inverse_frequencies(RopeConfig(), 64)
    query, key = draw(1, 1, 1, 64), draw(2, 1, 1, 64)

    def score(at_query: int, at_key: int) -> float:
        pair = activations(backend, np.concatenate([query, key]))
        q, k = backend.to_host(backend.rope(pair, np.array([at_query, at_key]), inv_freq))
        return float((q.astype(np.float64) * k).sum())

    # 64 products of size about 1, each of four numbers rounded at 2**-24.
    rounding = 64 * 4 * 2**-24 * float(np.abs(query).max() * np.abs(key).max())
    # An angle of 40 radians, itself a float32, is off by up to 40 * 2**-24.
    rounding *= 40
    assert abs(score(40, 33) - score(7, 0)) < rounding
    assert abs(score(40, 33) - score(40, 32)) > rounding


@pytest.mark.parametrize("dim", [2, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_inverse_frequencies(subject: Subject, dim: int, kind: str) -> None:
    del subject
    rope = {"default": RopeConfig(theta=1e6), "linear": RopeConfig(kind="linear", factor=3.0)}
    config = rope.get(kind, LLAMA3)

    def by(dtype: Any) -> np.ndarray:
        def scale(frequency: Any) -> Any:
            if kind == "linear":
                return frequency / dtype(config.factor)
            if kind == "default":
                return frequency
            return naive.llama3_scale(
                frequency,
                config.factor,
                config.low_freq_factor,
                config.high_freq_factor,
                config.original_max_position,
                dtype,
            )

        return naive.inverse_frequencies(config.theta, dim, dtype, scale)

    got, exact = inverse_frequencies(config, dim), by(np.float64)
    # Frequencies span many powers of ten, so errors are compared relative to each of them.
    assert_as_good_as_plain(
        (got / exact).astype(np.float32), (by(np.float32) / exact).astype(np.float32), exact / exact
    )


def test_llama3_frequencies_cover_all_three_bands(subject: Subject) -> None:
    del subject
    plain = inverse_frequencies(RopeConfig(theta=LLAMA3.theta), 128)
    ratio = inverse_frequencies(LLAMA3, 128) / plain
    assert (ratio == 1).any()
    assert np.isclose(ratio, 1 / 8, rtol=1e-6).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()
    assert (np.diff(ratio) <= 1e-6).all()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7)])
def test_activations(subject: Subject, kind: str, shape: tuple[int, ...]) -> None:
    backend = backend_of(subject)
    x = draw(1, *shape) * np.float32(3)
    # erf is documented to 1.5e-7, and half of x times it is what gelu adds up.
    known = 0.5 * 1.5e-7 * float(np.abs(x).max()) if kind == "gelu" else 0.0
    got = backend.to_host(backend.activate(activations(backend, x), kind))
    plain = naive.activate(x, kind, subject.arithmetic)
    assert_as_good_as_plain(got, plain, naive.activate(x, kind, np.float64), known)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_far_from_zero_reach_their_limits(subject: Subject, kind: str) -> None:
    backend = backend_of(subject)
    x = np.array([[-1e5, -200.0, -0.0, 0.0, 200.0, 1e5]], np.float32)
    got = backend.to_host(backend.activate(activations(backend, x), kind))
    assert np.abs(got[0]).tolist() == [0, 0, 0, 0, 200.0, 1e5]


def test_gelu_and_its_tanh_form_are_different_functions(subject: Subject) -> None:
    backend = backend_of(subject)
    x = activations(backend, np.array([[2.0]], np.float32))
    got = {k: float(backend.to_host(backend.activate(x, k))[0, 0]) for k in ("gelu", "gelu_new")}
    assert got["gelu"] == pytest.approx(1.9544997, abs=1e-6)
    assert got["gelu_new"] == pytest.approx(1.9545977, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (9, 257)])
def test_add_and_multiply_round_once(subject: Subject, shape: tuple[int, ...]) -> None:
    backend = backend_of(subject)
    x, y = draw(1, *shape), draw(2, *shape)
    product = (x.astype(np.float64) * y).astype(np.float32)
    total = (x.astype(np.float64) + y).astype(np.float32)
    x, y = activations(backend, x), activations(backend, y)
    assert np.array_equal(backend.to_host(backend.multiply(x, y)), product)
    assert np.array_equal(backend.to_host(backend.add(x, y)), total)


@pytest.mark.parametrize("ids", [[0], [4], [3, 3, 0, 4, 3], list(range(5)), []])
def test_embed_and_rows_pick_rows(subject: Subject, ids: list[int]) -> None:
    backend = backend_of(subject)
    table = draw(1, 5, 6)
    wanted = np.array([table[i] for i in ids], np.float32).reshape(-1, 6)
    assert np.array_equal(backend.to_host(backend.embed(backend.weight(table), ids)), wanted)
    assert np.array_equal(backend.to_host(backend.rows(activations(backend, table), ids)), wanted)


@pytest.mark.parametrize("rows", [[], [0, 2], [0, 1, 2]])
def test_what_is_given_for_a_step_picks_the_same_rows(subject: Subject, rows: list[int]) -> None:
    """Whether its numbers were handed over before or not."""
    backend, table = backend_of(subject), draw(1, 5, 6)
    for tokens in ([4, 0, 3], np.array([1, 1, 2])):
        batch = PagedBatch(np.arange(3), np.array([0, 3]), (), ())
        ids, wanted = backend.take_step(tokens, batch, rows)
        assert (len(ids), len(wanted)) == (3, len(rows))
        x = backend.embed(backend.weight(table), ids)
        assert np.array_equal(backend.to_host(x), table[np.array(tokens)])
        assert np.array_equal(
            backend.to_host(backend.rows(x, wanted)), table[np.array(tokens)][rows]
        )
        some = backend.select(batch, wanted)
        assert (some.positions.tolist(), some.query_indptr.tolist()) == (rows, [0, len(rows)])


def test_heads_split_a_row_in_order(subject: Subject) -> None:
    backend = backend_of(subject)
    x = np.arange(24, dtype=np.float32).reshape(2, 12)
    got = backend.to_host(backend.heads(activations(backend, x), 3))
    assert got.shape == (2, 3, 4)
    assert got[1, 2].tolist() == [20, 21, 22, 23]


def test_no_op_changes_its_arguments(subject: Subject) -> None:
    backend = backend_of(subject)
    x, y = activations(backend, draw(1, 4, 8)), activations(backend, draw(2, 4, 8))
    weight = backend.weight(draw(3, 8))
    before = [backend.to_host(a).copy() for a in (x, y, weight)]
    backend.linear(x, backend.weight(draw(4, 3, 8)))
    backend.rms_norm(x, weight, 1e-6)
    backend.layer_norm(x, weight, weight, 1e-6)
    backend.rope(backend.heads(x, 1), np.arange(4), inverse_frequencies(RopeConfig(), 8))
    for kind in ("silu", "gelu", "gelu_new", "relu"):
        backend.activate(x, kind)
    backend.multiply(x, y)
    backend.add(x, y)
    after = [backend.to_host(a) for a in (x, y, weight)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
