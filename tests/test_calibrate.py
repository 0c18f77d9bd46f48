"""Times between those that were measured; measuring itself runs in ``test_plan_cli.py``."""

import math

import pytest

from quire.analysis.calibrate import Measured, Overhead, Profile
from quire.analysis.catalogue import known_model
from quire.analysis.roofline import decode_time, prefill_time
from quire.analysis.steps import Work, deploy, step_ops


def profile() -> Profile:
    """1 ns a number for one row, 8 for 16; a byte 2 ns for one sequence, an operation 3 ns."""
    return Profile(
        dtype="bf16",
        linear={(1, 100): 1e-9, (1, 10_000): 1e-9, (16, 100): 8e-9, (16, 10_000): 8e-9},
        cached={1: 5e-10, 16: 4e-9},
        decode={(1, 1000): 2e-9, (1, 100_000): 4e-9, (8, 1000): 2e-9},
        prefill={(512, 512): 3e-9, (512, 8192): 3e-9},
        decoding=Overhead(1e-3, 1e-4, 1e-5),
        prefilling=Overhead(2e-3, 1e-4, 1e-5),
        choosing=1e-9,
    )


SHAPE = known_model("llama-3.2-1b")
DEPLOYMENT = deploy(SHAPE)


def linear_seconds(rows: int) -> float:
    timer = Measured(profile(), 1e9)
    ops = step_ops(DEPLOYMENT, [Work(0, rows, rows)])
    return sum(timer.seconds(op) for op in ops if op.what == "linear")


def numbers() -> int:
    return sum(m.inputs * m.outputs * n for m, n in SHAPE.matrices()) + 2048 * 128256


def test_measured_points_are_met() -> None:
    assert linear_seconds(1) == pytest.approx(numbers() * 1e-9)
    assert linear_seconds(16) == pytest.approx(numbers() * 8e-9)


def test_between_points_logarithms_are_linear() -> None:
    assert linear_seconds(4) == pytest.approx(numbers() * 1e-9 * math.sqrt(8))


def test_a_small_model_is_timed_as_caches_hold_it() -> None:
    [op, *_] = [op for op in step_ops(DEPLOYMENT, [Work(0, 4, 4)]) if op.what == "linear"]
    from_memory = Measured(profile(), 128 << 20).seconds(op)
    assert Measured(profile(), 4 << 20).seconds(op) == pytest.approx(from_memory / 2)
    assert Measured(profile(), 1 << 20).seconds(op) == pytest.approx(from_memory / 2)
    between = Measured(profile(), math.sqrt(4 * 128) * (1 << 20)).seconds(op)
    assert between == pytest.approx(from_memory / math.sqrt(2))


def test_beyond_the_measured_rows_time_grows_with_them() -> None:
    table = {(rows, 100): rows * 1e-9 for rows in (1, 512)}
    own = profile()
    timer = Measured(Profile(**{**vars(own), "linear": table}), 1e9)
    [op] = [op for op in step_ops(DEPLOYMENT, [Work(0, 2048, 1)]) if op.outputs == 512][:1]
    assert timer.seconds(op) == pytest.approx(op.count * 2048 * 512 * 2048e-9)


def test_attention_is_timed_by_byte_and_by_operation() -> None:
    timer = Measured(profile(), 1e9)
    one = decode_time(DEPLOYMENT, timer, 1, 9)
    read = 10 * 2 * 8 * 64 * 2  # bytes of a layer: between 1,000 and 100,000
    part = math.log(read / 1000) / math.log(100)
    assert one.by_part["cache"] == pytest.approx(16 * read * 2e-9 * 2**part)
    chunk = prefill_time(DEPLOYMENT, timer, 512)
    pairs = 512 * 513 // 2
    assert chunk.by_part["cache"] == pytest.approx(16 * 2 * 32 * 128 * pairs * 3e-9)


def test_overheads_are_of_steps_sequences_layers_and_tokens_to_choose() -> None:
    timer = Measured(profile(), 1e9)
    decode = timer.overhead(SHAPE, [Work(5, 1), Work(6, 1)])
    assert decode == pytest.approx(1e-3 + 2e-4 + 16e-5 + 2 * 128256 * 1e-9)
    prefill = timer.overhead(SHAPE, [Work(0, 5, 0)])
    assert prefill == pytest.approx(2e-3 + 1e-4 + 16e-5)
    assert Overhead(-1.0, 0.0, 0.0).of(1, 1) == 0


def test_what_binds_is_told_by_rows() -> None:
    timer = Measured(profile(), 1e9)
    assert decode_time(DEPLOYMENT, timer, 1, 9).limit == "memory bandwidth"
    assert prefill_time(DEPLOYMENT, timer, 512).limit == "compute"
