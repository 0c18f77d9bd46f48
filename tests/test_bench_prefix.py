"""bench/prefix.py and the prefix cases of bench/peers.py: what they count is right."""

import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny import VOCAB, random_prompt, write_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import peers
import peers_prefix
import prefix
import prefix_bookkeeping as books
from prefix_engine import Setting, restart, shared
from prefix_figures import Figure, Quiet, Report
from prefix_replay import pages_wanted, pretended
from prefix_replay import replay as replay_and_tell
from prefix_stub import LAYOUT, PAGE, stub_cache
from prefix_trace import conversation, lines, synthetic

from quire.analysis.replay import Replay
from quire.analysis.trace import BLOCK, Arrival, Tokens, read_trace, unbounded_hits


def common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def brute_force_hits(trace: Sequence[Arrival]) -> int:
    """Each prompt compared with every prompt before it, token by token."""
    tokens, before, hits = Tokens(trace), list[list[int]](), 0
    for arrival in trace:
        prompt = tokens.of_prompt(arrival)
        hits += max((common(prompt[:-1], other) for other in before), default=0)
        before.append(prompt)
    return hits


def one_by_one(trace: Sequence[Arrival]) -> list[Arrival]:
    """The same requests, each after the end of the one before."""
    return [
        Arrival(1e6 * at, each.input_length, each.output_length, each.blocks)
        for at, each in enumerate(trace)
    ]


def bench_replay(trace: Sequence[Arrival], num_pages: int, speed: float) -> Replay:
    return Replay(trace, LAYOUT, [num_pages], pretended(speed))


# -- traces ----------------------------------------------------------------------------------


def test_the_generator_is_deterministic_and_grows_by_turns() -> None:
    trace = synthetic(300, seed=3)
    assert trace == synthetic(300, seed=3)
    assert trace != synthetic(300, seed=4)
    assert len(trace) == 300
    assert [a.seconds for a in trace] == sorted(a.seconds for a in trace)
    for arrival in trace:
        assert len(arrival.blocks) == -(-arrival.input_length // BLOCK)
        assert arrival.output_length >= 1
    firsts = Counter(arrival.blocks[0] for arrival in trace)
    assert firsts.most_common(1)[0][1] > 3 * len(trace) / len(firsts)  # some are popular


def test_a_conversation_grows_and_keeps_its_whole_blocks() -> None:
    rng, ids = np.random.default_rng(0), itertools.count(10)
    talks = [conversation(rng, 0.0, [1, 2], ids) for _ in range(30)]
    assert max(map(len, talks)) > 3
    for before, after in itertools.chain(*map(itertools.pairwise, talks)):
        whole = before.input_length // BLOCK
        assert after.blocks[:whole] == before.blocks[:whole]
        assert after.input_length > before.input_length + before.output_length
        assert after.seconds > before.seconds
    seen = Counter(block for talk in talks for turn in talk for block in turn.blocks[2:])
    unfinished = [turn.blocks[-1] for talk in talks for turn in talk if turn.input_length % BLOCK]
    assert all(seen[block] == 1 for block in unfinished)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_hit_rate_is_that_of_a_dict_where_nothing_is_evicted(seed: int) -> None:
    trace = one_by_one(synthetic(24, seed))
    again = trace[5]
    repeated = Arrival(1e9, again.input_length, 1, again.blocks)
    parted = Arrival(2e9, BLOCK - 7, 3, again.blocks[:1])  # ends inside a page
    trace = [*trace, repeated, parted]
    replay = bench_replay(trace, pages_wanted(trace), 1e6)
    done = replay.run()
    replay.cache.check()
    assert done.hit_tokens == unbounded_hits(trace) == brute_force_hits(trace) > 0
    assert (done.evicted_pages, done.preemptions, done.refused) == (0, 0, 0)
    assert done.prompt_tokens == sum(arrival.input_length for arrival in trace)
    replies = sum(arrival.output_length - 1 for arrival in trace)
    assert done.computed_tokens == done.prompt_tokens - done.hit_tokens + replies
    assert replay.cache.sequences == ()
    assert 0 < replay.cache.cached_pages[0] <= pages_wanted(trace)


def test_requests_side_by_side_share_what_is_whole() -> None:
    """The same requests at once: what an unfinished page would have given may be missing."""
    trace = [Arrival(0.0, 3 * BLOCK + 100, 4, (1, 2, 3, 10 + at)) for at in range(6)]
    done = bench_replay(trace, pages_wanted(trace), 1e4).run()
    assert done.hit_tokens == unbounded_hits(trace) == 5 * 3 * BLOCK


def test_a_replay_is_deterministic_and_a_small_pool_evicts() -> None:
    trace = synthetic(24, seed=2)
    num_pages = max(pages_wanted([arrival]) for arrival in trace) + 10
    runs = [bench_replay(trace, num_pages, 1e5) for _ in range(2)]
    one, other = (replay.run() for replay in runs)
    assert one == other
    assert one.evicted_pages > 0
    assert one.hit_tokens < unbounded_hits(trace)
    assert one.peak_bytes <= one.pool_bytes
    runs[0].cache.check()
    refused = bench_replay(trace, num_pages // 4, 1e5).run()
    assert refused.refused > 0
    assert refused.requests + refused.refused == len(trace)


def test_the_example_is_what_the_generator_writes() -> None:
    path = Path(__file__).parents[1] / "examples" / "trace.jsonl"
    assert path.read_text(encoding="utf-8") == lines(synthetic(64, seed=1))
    for written, made in zip(read_trace(path), synthetic(64, seed=1), strict=True):
        assert abs(written.seconds - made.seconds) <= 0.0005
        assert (written.input_length, written.output_length) == (
            made.input_length,
            made.output_length,
        )


def test_a_trace_is_told_by_the_size_of_the_pool() -> None:
    report = Report()
    replay_and_tell(report, synthetic(24, seed=2), "synthetic, seed 2")
    parts = dict.fromkeys(figure.part for figure in report.figures)
    assert len(parts) == 5  # the dict's, without limit, and three shares
    kept = [figure.median for figure in report.figures if "index at the end" in figure.name]
    assert sorted(kept) == [*kept[1:], kept[0]]
    assert kept[0] / 4 >= kept[3] > 0


# -- bookkeeping, shared, restart ------------------------------------------------------------


def test_bookkeeping_misses_and_hits_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    cache = stub_cache(300)
    assert len(books.admit(cache, books.prompt(1))) == len(books.STAGES)
    assert cache.match(books.PrefixQuery(books.prompt(1))).tokens == books.PROMPT
    assert cache.match(books.PrefixQuery(books.prompt(2))).tokens == 0
    assert books.prompt(1) == books.prompt(1)
    report = Report()
    books.bookkeeping(report, [6 * books.PROMPT_PAGES], 7, patience=0.0)
    books.memory(report, 2 * books.PROMPT_PAGES)
    names = {figure.name.split(":")[0] for figure in report.figures}
    assert {"fill", "miss", "hit", "decode", "allocator"} <= names
    assert all(value > 0 for figure in report.figures for value in figure.values)
    assert "asked: microseconds" in capsys.readouterr().out


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    model = write_llama(
        tmp_path_factory.mktemp("models") / "tiny", dtype="bf16", max_position_embeddings=4096
    )
    return Setting(model, 1, 1, Quiet(0.0, 1), 4096, VOCAB)


def test_restart_takes_prompts_from_where_it_says(setting: Setting) -> None:
    report = Report()
    restart(report, setting, [5 * PAGE + 1])
    figures = {figure.name: figure for figure in report.figures}
    assert "nothing cached" in figures["cold"].note
    assert f"{5 * PAGE} on disk" in figures["disk"].note  # so few are computed sooner
    assert f"{5 * PAGE} on disk" in figures["disk, file not in memory"].note
    assert f"{5 * PAGE} from pool" in figures["session"].note
    assert "swap: times better" in " ".join(figures)
    assert all(value > 0 for figure in report.figures for value in figure.values)


def test_shared_compares_the_same_work(setting: Setting) -> None:
    report = Report()
    shared(report, setting, 2)
    notes = [figure.note for figure in report.figures]
    assert notes[:3] == [f"{count:,} prompt tokens cached" for count in (2048, 2 * 2048, 0)]
    seconds = {figure.name: figure.median for figure in report.figures}
    assert seconds["warm over unshared"] == seconds["warm"] / seconds["unshared"]
    assert seconds["cold over unshared"] == seconds["cold"] / seconds["unshared"]


def test_a_figure_has_median_spread_and_what_was_asked() -> None:
    figure = Figure("part", "name", "s", [1.0, 2.0, 4.0], "at most 3", "a note", 0.5)
    assert (figure.median, figure.spread) == (2.0, 0.75)
    line = figure.line()
    assert "± 75%" in line
    assert "asked: at most 3" in line
    assert "others kept 0.50 processors busy" in line


@pytest.mark.parametrize(
    "options",
    [
        ["--parts=none"],
        ["--parts=shared"],
        ["--parts=trace", "--rounds=0"],
        ["--parts=trace", "--trace=no such file"],
    ],
)
def test_wrong_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        prefix.parse(options)


# -- the cases of bench/peers.py -------------------------------------------------------------


def test_prefix_cases_by_name() -> None:
    case = peers.parse_case("shared16")
    assert (case.sequences, case.prompt, case.new) == (16, 2112, 16)
    assert (case.keeps, case.drawn, case.tokens) == (True, 2176, 16 * 2128)
    case = peers.parse_case("multiturn")
    assert (case.sequences, case.prompt, case.new) == (1, 1024 + 5 * 320, 64)
    assert (case.keeps, case.drawn) == (True, 1024 + 5 * 256)
    for wrong in ("shared", "shared0", "shared@16", "multiturn@6", "multi"):
        with pytest.raises(ValueError, match="is not a case"):
            peers.parse_case(wrong)
    assert not peers.parse_case("batch8").keeps
    assert peers.better("shared16 warm", 1, 2) == peers.better("multiturn", 1, 2) == 2


class Recorded:
    """A run that answers at once: token i comes after i + 1 seconds."""

    def __init__(self, *, missing: int = 0) -> None:
        self.asked: list[list[list[int]]] = []
        self._missing = missing

    def __call__(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        self.asked.append(prompts)
        count = new - self._missing
        times = [[float(at + 1) for at in range(count)] for _ in prompts]
        return {"times": times, "ids": [[7] * count for _ in prompts], "peak": len(self.asked)}


def test_requests_of_a_shared_case_share_the_first_tokens_and_no_more() -> None:
    ids = [list(range(at * 9000, at * 9000 + peers_prefix.SHARED_IDS)) for at in range(3)]
    run = Recorded()
    answer = peers_prefix.run_shared("shared3", ids, run)
    assert answer["rows"] == {"shared3": [16.0], "shared3 warm": [16.0]}
    assert answer["peak"] == 2
    prompts = [prompt for asked in run.asked for prompt in asked]
    assert {len(prompt) for prompt in prompts} == {2112}
    for one, other in itertools.combinations(prompts, 2):
        assert common(one, other) == 2048
    with pytest.raises(ValueError, match="3 x 16 tokens were asked for"):
        peers_prefix.run_shared("shared3", ids, Recorded(missing=1))


def test_a_conversation_repeats_what_was_said() -> None:
    ids = [list(range(1000, 1000 + peers_prefix.MULTITURN_IDS))]
    run = Recorded()
    answer = peers_prefix.run_multiturn("multiturn", ids, run)
    assert answer["rows"] == {"multiturn": [1.0]}
    turns = [prompts[0] for prompts in run.asked]
    assert [len(turn) for turn in turns] == [1024 + at * 320 for at in range(6)]
    for before, after in itertools.pairwise(turns):
        assert after[: len(before)] == before
        assert after[len(before) : len(before) + 64] == [7] * 64
    assert [token for token in turns[-1] if token >= 1000] == ids[0]


def test_an_engine_that_keeps_nothing_stays_out(tmp_path: Path) -> None:
    engine = peers.Engine("forgetful", tmp_path, "json", keeps=False)
    one = peers.Contestant(engine, Path(sys.executable), tmp_path, {"chunk": 9}, {})
    comparison = peers.Comparison("160m", [one], read=1e9, vocabulary=VOCAB, pause=0, patience=0)
    [[cell]] = comparison.run(peers.parse_case("shared2"), 1)
    assert (cell.row, cell.rounds, cell.note) == ("shared2", [], "keeps nothing between requests")


@pytest.mark.parametrize("keeps", [True, False])
def test_the_quire_worker_keeps_prefixes_if_asked(tmp_path: Path, keeps: bool) -> None:
    model = write_llama(tmp_path / "tiny", dtype="bf16")
    sizes = {"threads": 1, "tokens": 64, "longest": 32, "sequences": 2, "chunk": 4, "set": {}}
    load = {"do": "load", "model": str(model), **sizes, "prefix_cache": keeps}
    process = peers.Process(Path(sys.executable), peers.WORKERS / "run_quire.py")
    run = {"do": "run", "prompts": [random_prompt(30)], "new": 2}
    try:
        process.ask(load, 60)
        first, again = (process.ask(run, 60) for _ in range(2))
    finally:
        process.close()
    assert first["ids"] == again["ids"]
