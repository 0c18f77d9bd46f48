"""SamplingParams: what is refused, and with which words."""

import dataclasses
from typing import Any

import pytest

from quire import Request, SamplingParams
from quire.engine.request import Sample, Status
from quire.errors import ConfigError, RequestError

NAN, INF = float("nan"), float("inf")

# field -> values that cannot be served
REFUSED: dict[str, list[Any]] = {
    "max_new_tokens": [0, -1, 1.5, True, "8", None, NAN],
    "temperature": [-0.1, 100.5, NAN, INF, -INF, "0.5", None, True, 1j, [1.0]],
    "top_k": [-1, 2.0, NAN, "3", None, True],
    "top_p": [0, 0.0, -0.5, 1.01, NAN, INF, "0.9", None, True],
    "min_p": [-0.01, 1.5, NAN, -INF, "0", None, False],
    "repetition_penalty": [0, 0.0, -1.0, 101, NAN, INF, "1", None, True],
    "presence_penalty": [-101, 100.1, NAN, INF, "1", None, True],
    "frequency_penalty": [-101, 100.1, NAN, -INF, "1", None, True],
    "beam_width": [0, -1, 65, 2.0, True, "2", None],
    "length_penalty": [-101, 100.1, NAN, INF, "1", None, True],
    "n": [0, -3, 1.0, True, "2", None],
    "seed": [-1, 2**64, 0.5, True, "7", NAN],
    "logprobs": [-1, 0.5, True, "5", NAN],
    "evict": ["", "h2p", "window", "window:budget=0", 5, True],
    "stop": ["", ["a", ""], [1], ["a", None], [b"a"]],
    "stop_token_ids": [[-1], [1.0], ["a"], [True], [3, None]],
}


# What is no more than a wrong type, or would crash or hang if it were let in.
ABSURD: list[tuple[str, Any]] = [
    ("temperature", 10**400),
    ("top_p", -(10**400)),
    ("stop", None),
    ("stop", 5),
    ("stop", b"bytes"),
    ("stop_token_ids", 5),
    ("stop_token_ids", None),
    ("stop_token_ids", "12"),
    ("ignore_eos", "no"),
    ("ignore_eos", 1),
    ("ignore_eos", None),
    ("n", 10**12),
]


def named(field: str) -> str:
    """A pattern for a field's name in a message, also where one item of it is at fault."""
    return field.replace("_", "[ _]").removesuffix("s")


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_a_value_that_cannot_be_served_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=named(field)) as refusal:
        SamplingParams(**{field: value})
    items = value if isinstance(value, list) else []
    assert any(repr(part) in str(refusal.value) for part in [value, *items])


@pytest.mark.parametrize(("field", "value"), ABSURD, ids=lambda part: str(part)[:12])
def test_an_absurd_value_or_a_wrong_type_is_refused_and_not_a_crash(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=named(field)):
        SamplingParams(**{field: value})


def test_every_field_but_the_flag_has_refused_values_above() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - {"ignore_eos"} == set(REFUSED)


@pytest.mark.parametrize(
    "accepted",
    [
        {},
        {"max_new_tokens": 10**9, "top_k": 10**9, "logprobs": 0},
        {"temperature": 0},
        {"temperature": 100.0, "top_p": 1, "min_p": 1},
        {"top_p": 1e-9, "min_p": 0},
        {"presence_penalty": -100, "frequency_penalty": 100, "repetition_penalty": 100},
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"seed": None, "logprobs": None},
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_accepted(accepted: dict[str, Any]) -> None:
    params = SamplingParams(**accepted)
    for name, value in accepted.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("max_tokens", "max_new_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("stop_tokens", "stop_token_ids"),
        ("log_probs", "logprobs"),
    ],
)
def test_an_unknown_name_is_refused_and_the_nearest_named(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong!r}; did you mean {nearest!r}"):
        SamplingParams(**{wrong: 1})


def test_an_unknown_name_like_no_other_lists_the_options() -> None:
    with pytest.raises(ConfigError, match=r"'xyzzy' \(options: max_new_tokens, temperature"):
        SamplingParams(**{"xyzzy": 1})


def test_defaults_are_greedy_and_change_nothing() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 1, 0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        1,
        0,
        0,
    )
    assert (params.n, params.seed, params.stop, params.stop_token_ids) == (1, None, (), ())


def test_parameters_are_frozen_and_compare_by_value() -> None:
    params = SamplingParams(seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]
    assert params == SamplingParams(seed=3) != SamplingParams(seed=4)
    assert dataclasses.replace(params, n=2) == SamplingParams(seed=3, n=2)


def test_stop_strings_and_tokens_become_tuples() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)


def test_stop_strings_and_tokens_of_an_iterator_are_not_lost() -> None:
    assert SamplingParams(stop=iter(["a", "b"])).stop == ("a", "b")  # type: ignore[arg-type]
    params = SamplingParams(stop_token_ids=iter([3, 4]))  # type: ignore[arg-type]
    assert params.stop_token_ids == (3, 4)


def test_a_request_is_finished_when_all_of_its_samples_are() -> None:
    request = Request(0, (1, 2), SamplingParams(n=2), 0, 0.0)
    request.samples = (Sample(request, 0, [1, 2]), Sample(request, 1, [1, 2, 5]))
    assert not request.finished
    assert request.samples[1].new_tokens == [5]
    assert [sample.pending for sample in request.samples] == [2, 3]
    request.samples[0].status = Status.FINISHED
    assert not request.finished
    request.samples[1].status = Status.FINISHED
    assert request.finished
    assert request.completions == []
