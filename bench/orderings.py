"""Which published orderings of lossy caches show on a model, and why.

    python bench/orderings.py formats keys values split first
    python bench/orderings.py rotation-int8 rotation-fp8 rotation-int4 rotation-int2
    python bench/orderings.py channels
    python bench/orderings.py eviction

Codings are compared token by token, over the passages that ``quire measure`` takes, beside the
exact cache: bars are 95 % intervals of a paired block bootstrap. docs/measure.md has the figures
for quill. Deterministic but for the order in which BLAS sums.
"""

import argparse
import itertools
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from coded import EXACT, CodedModel, Recipe, by_channel, by_token, hadamard, rotated

import quire
from quire.analysis.candidates import Setting, base_config
from quire.analysis.divergence import kl_divergence, log_softmax
from quire.analysis.losses import bootstrap, wilson
from quire.analysis.quality import Measurement, Plan, measure
from quire.analysis.recall import distances, recall_trial, recall_words
from quire.analysis.text import Passage, documents, held_out, limited, passages
from quire.models import load_text_codec, resolve_model

__all__ = ["main"]

Float64 = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.float32]

KEYS = [
    Recipe(f"k={format} by {name}", code(format), EXACT.value)
    for format in ("int8", "int4", "int2")
    for name, code in (("channel", by_channel), ("token", by_token))
]
VALUES = [
    Recipe(f"v={format} by {name}", EXACT.key, code(format))
    for format in ("int4", "int2")
    for name, code in (("token", by_token), ("channel", by_channel))
]
SPLIT = [
    Recipe(f"k={key},v={value}", _key(key), by_token(value))
    for a, b in (("int8", "int4"), ("int8", "int2"), ("int4", "int2"))
    for key, value in ((a, b), (b, a))
    for _key in (lambda name: by_token(name) if name == "int8" else by_channel(name),)
]
FIRST = [
    Recipe(f"{format}, first page {what}", by_channel(format), by_token(format), keep)
    for format in ("int4", "int2")
    for what, keep in (("bf16", True), ("coded", False))
]
FORMATS = [
    Recipe(f"{format}, as engines store it", by_token(format), by_token(format), False, True)
    for format in ("int8", "fp8")
] + [Recipe(format, by_channel(format), by_token(format)) for format in ("int4", "int2")]


def _rotations(format: str) -> list[Recipe]:
    found = []
    for name, code in (("channel", by_channel), ("token", by_token)):
        plain = Recipe(f"k={format} by {name}", code(format), EXACT.value)
        found += [replace(plain, name=f"{plain.name}, rotated", key=rotated(plain.key)), plain]
    plain = Recipe(f"v={format} by token", EXACT.key, by_token(format))
    return [
        replace(plain, name=f"{plain.name}, rotated", value=rotated(plain.value)),
        plain,
        *found,
    ]


# Neighbours are compared: the first of each pair is the one that should lose less.
GROUPS = {
    "keys": KEYS,
    "values": VALUES,
    "split": SPLIT,
    "first": FIRST,
    **{f"rotation-{format}": _rotations(format) for format in ("int8", "fp8", "int4", "int2")},
    "formats": FORMATS,
}


@dataclass(frozen=True)
class Judged:
    """Of one recipe: nats lost and KL of every target, float64 [targets], and answers."""

    name: str
    change: Float64
    kl: Float64
    same: float
    right: int
    asked: int


class Bench:
    """Passages of the held-out text, and texts with values to recall, judged beside bf16."""

    def __init__(self, model: CodedModel, tokens: int, trials: int, context: int = 2048) -> None:
        codec = load_text_codec(resolve_model(None))
        assert codec is not None
        self._model = model
        lead, texts = documents(codec, held_out())
        found = [passages(lead, document, context) for document in texts]
        self._passages = limited(found, tokens)
        counts = np.cumsum([0, *(len(each.targets) for each in self._passages)])
        self._starts = counts.astype(np.int64)
        wanted = distances(context)
        words = recall_words(codec, len(wanted))
        assert words is not None
        filler = list(itertools.chain.from_iterable(texts))
        shape = (context, lead, wanted)
        self._trials = [recall_trial(words, filler, shape, f"0/{i}") for i in range(trials)]
        self._exact = [self._logits(each, EXACT) for each in self._passages]

    def judge(self, recipe: Recipe) -> Judged:
        """What ``recipe`` loses on every target."""
        change, kl, same = [], [], []
        for passage, exact in zip(self._passages, self._exact, strict=True):
            one, other = log_softmax(exact), log_softmax(self._logits(passage, recipe))
            at = np.arange(len(one)), list(passage.targets)
            change.append(one[at] - other[at])
            kl.append(kl_divergence(one, other))
            same.append(one.argmax(axis=-1) == other.argmax(axis=-1))
        right = asked = 0
        for trial in self._trials:
            best = self._logits(trial.passage, recipe).argmax(axis=-1)
            right += sum(int(best[at]) == trial.passage.targets[at] for at in trial.asked)
            asked += len(trial.asked)
        joined = np.concatenate
        share = float(joined(same).mean())
        return Judged(recipe.name, joined(change), joined(kl), share, right, asked)

    def describe(self, judged: Judged) -> str:
        """A row: change of perplexity, mean KL, same top-1, values recalled."""
        low, high = np.expm1(bootstrap(judged.change, self._starts))
        nats = bootstrap(judged.kl, self._starts)
        recalled = wilson(judged.right, judged.asked)
        return (
            f"| {judged.name} | {np.expm1(judged.change.mean()):+.2%} [{low:+.2%}, {high:+.2%}] "
            f"| {judged.kl.mean():.1e} [{nats[0]:.1e}, {nats[1]:.1e}] | {judged.same:.2%} "
            f"| {judged.right / judged.asked:.0%} [{recalled[0]:.0%}, {recalled[1]:.0%}] |"
        )

    def compare(self, better: Judged, worse: Judged) -> str:
        """Whether the first loses less than the second, token by token."""
        low, high = bootstrap(worse.kl - better.kl, self._starts)
        shows = "shows" if low > 0 else "the contrary shows" if high < 0 else "does not show"
        ratio = worse.kl.mean() / better.kl.mean()
        change = (worse.change - better.change).mean()
        ends = bootstrap(worse.change - better.change, self._starts)
        return (
            f"{better.name} < {worse.name}: {shows}; KL {ratio:.2f} times, difference "
            f"[{low:.1e}, {high:.1e}] nats; perplexity {np.expm1(change):+.2%} "
            f"[{np.expm1(ends[0]):+.2%}, {np.expm1(ends[1]):+.2%}]"
        )

    def _logits(self, passage: Passage, recipe: Recipe) -> npt.NDArray[np.float32]:
        """Logits after every told token."""
        every = self._model.logits([*passage.prompt, *passage.told], recipe)
        return every[len(passage.prompt) :]


def codings(groups: list[str], tokens: int, trials: int) -> None:
    """Print a table of the recipes of ``groups``, and the comparison of each pair."""
    bench = Bench(CodedModel(resolve_model(None)), tokens, trials)
    for group in groups:
        print(f"\n## {group}\n\n| | perplexity | mean KL, nats | same top-1 | recalled |")
        print("|---|---|---|---|---|")
        judged = []
        for recipe in GROUPS[group]:
            judged.append(bench.judge(recipe))
            print(bench.describe(judged[-1]), flush=True)
        print()
        if group != "formats":
            for better, worse in zip(judged[::2], judged[1::2], strict=True):
                print(bench.compare(better, worse))


def channels(tokens: int = 2000) -> None:
    """Print what scales have to span, what an error costs, and what the first tokens are given.

    largest / median   of the channels' root mean squares over a text
    span               mean of (max - min) over 32 tokens of a channel (and of a rotated one), and
                       over 32 channels of a token: the error of a coding is proportional to it
    aligned            of int4 keys by channel: the mean square of query times error, over what it
                       were if the same error lay in all channels alike; above 1, channels with
                       large errors are those that queries weigh most
    on first           share of attention on the first 4 tokens by queries behind 1,000
    """
    model = CodedModel(resolve_model(None))
    codec = load_text_codec(resolve_model(None))
    assert codec is not None
    lead, texts = documents(codec, held_out())
    text = [*lead, *itertools.chain.from_iterable(texts)][: tokens // 32 * 32]
    heads = ("largest / median", "span by channel", "rotated", "by token", "aligned", "on first")
    print(f"| layer | head | | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for layer, (query, key, value) in enumerate(model.numbers(text)):
        share = query.shape[1] // key.shape[1]
        for head in range(key.shape[1]):
            queries = query[:, share * head : share * (head + 1)]
            seen = (
                f"{_aligned(queries, key[:, [head]]):.2f} "
                f"| {_on_first(queries[1000:], key[:, head]):.1%}"
            )
            for what, numbers, more in (("key", key, seen), ("value", value, "|")):
                one = numbers[32:, head]
                size = np.sqrt((one**2).mean(axis=0))
                turned, _ = _spans(one @ hadamard(one.shape[1]))
                by_channel_, by_token_ = _spans(one)
                print(
                    f"| {layer} | {head} | {what} | {size.max() / np.median(size):.1f} "
                    f"| {by_channel_:.2f} | {turned:.2f} | {by_token_:.2f} | {more} |"
                )


def _spans(one: Numbers) -> tuple[float, float]:
    """Mean range of one head's numbers [tokens, dim], by channel and by token."""
    by_page = one.reshape(-1, 32, one.shape[1])
    by_vector = one.reshape(len(one), -1, 32)
    return float(np.ptp(by_page, axis=1).mean()), float(np.ptp(by_vector, axis=2).mean())


def _aligned(query: Numbers, key: Numbers) -> float:
    """Of queries [tokens, heads, dim] and one head of keys; see :func:`channels`."""
    error = ((by_channel("int4")(key) - key) ** 2).mean(axis=(0, 1))
    weight = (query**2).mean(axis=(0, 1))
    return float((weight * error).sum() / (weight.sum() * error.mean()))


def _on_first(query: Numbers, key: Numbers, first: int = 4) -> float:
    """Of queries [the last tokens, heads, dim] over keys [tokens, dim]."""
    scores = np.einsum("thd,nd->htn", query, key) * query.shape[-1] ** -0.5
    places = np.arange(len(key) - len(query), len(key))
    scores[:, np.arange(len(key)) > places[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return float((weights[..., :first].sum(axis=-1) / weights.sum(axis=-1)).mean())


POLICIES = (
    *(f"window:budget={budget},sink={sink}" for budget in (256, 512) for sink in (0, 1, 4)),
    *(f"{name}:budget={budget}" for name in ("snapkv", "h2o", "knorm") for budget in (256, 512)),
)


def eviction(tokens: int, trials: int, chunk: int, policies: list[str]) -> None:
    """Print losses and recall of policies, with prompts read in steps of ``chunk`` tokens."""
    config = replace(base_config(), max_batch_tokens=chunk)
    model = quire.Engine(cache=config.cache, max_batch_tokens=chunk)
    settings = [Setting("bf16", each) for each in policies]
    plan = Plan(tokens=tokens, recall_trials=trials, speed=False)
    report = measure(model, held_out(), settings, plan)
    print(f"steps of {chunk} tokens\n\n| | perplexity | mean KL | recalled, after | in |")
    print("|---|---|---|---|---|")
    for setting, found in report.candidates:
        assert isinstance(found, Measurement), found
        summary, (low, high) = found.summary, found.summary.perplexity_change_interval
        print(
            f"| `{setting.evict}` | {summary.perplexity_change:+.1%} [{low:+.1%}, {high:+.1%}] "
            f"| {found.summary.kl_mean:.3f} | {_shares(found.recall, found.recall_interval)} "
            f"| {_shares(found.recall_in_prompt, found.recall_in_prompt_interval)} |"
        )


def _shares(shares: dict[str, float] | None, ends: tuple[float, float] | None) -> str:
    assert shares is not None
    assert ends is not None
    each = " ".join(f"{100 * share:.0f}" for share in shares.values())
    return f"{each} [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}] %"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="+", choices=[*GROUPS, "channels", "eviction"])
    parser.add_argument("--tokens", type=int, default=8192, help="targets to judge")
    parser.add_argument("--trials", type=int, default=6, help="texts with values to recall")
    parser.add_argument("--chunk", type=int, default=512, help="max_batch_tokens, for eviction")
    parser.add_argument("--policy", action="append", help="for eviction, instead of its list")
    options = parser.parse_args()
    if "channels" in options.what:
        channels()
    if "eviction" in options.what:
        policies = options.policy or list(POLICIES)
        eviction(options.tokens, options.trials, options.chunk, policies)
    groups = [name for name in options.what if name in GROUPS]
    if groups:
        codings(groups, options.tokens, options.trials)


if __name__ == "__main__":
    main()
