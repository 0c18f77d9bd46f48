"""bench/peers.py: its arithmetic, its protocol, and what it says of peers that are not there."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tiny import VOCAB, write_llama

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", BENCH / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


FAKE = f"""
import os, sys
sys.path.insert(0, {str(BENCH / "peers_workers")!r})
import protocol

class Fake:
    def load(self, message):
        print("what libraries print")
        return "fake 1.0"

    def run(self, prompts, new):
        BODY
        clock = protocol.Clock(len(prompts))
        for step in range(new):
            clock.arrived({{at: [step] for at in range(len(prompts))}})
        return clock.times, clock.ids

protocol.serve(Fake())
"""


def fake(peers: ModuleType, folder: Path, name: str, body: str = "pass") -> object:
    script = folder / f"{name}.py"
    script.write_text(FAKE.replace("BODY", body), encoding="utf-8")
    engine = peers.Engine(name, script, "json")
    load = {"threads": 1, "tokens": 999, "longest": 999, "sequences": 8, "chunk": 9, "set": {}}
    return peers.Contestant(engine, Path(sys.executable), folder, load, {}, timeout=20)


def compared(peers: ModuleType, case: str, rounds: int, *who: object) -> tuple[object, list[str]]:
    """The comparison, over, and its printed rows with their notes."""
    comparison = peers.Comparison(
        "160m", who, read=20e9, vocabulary=VOCAB, pause=0.0, patience=0.0, chances=1
    )
    notes: list[str] = []
    names = [one.engine.name for one in who]  # type: ignore[attr-defined]
    try:
        rows = comparison.run(peers.parse_case(case), rounds)
    finally:
        comparison.close()
    return comparison, [peers.format_row(row, names, notes) for row in rows] + notes


def test_cases_by_name(peers: ModuleType) -> None:
    case = peers.parse_case("decode@4096")
    assert (case.prompt, case.sequences, case.new, case.tokens) == (4096, 1, 193, 4289)
    assert peers.parse_case("batch32").tokens == 32 * 1088
    for wrong in ("decode", "decode@", "batch", "batch@8", "prefill@-1", ""):
        with pytest.raises(ValueError, match="is not a case"):
            peers.parse_case(wrong)
    for names in peers.CASES.values():
        assert all(peers.parse_case(name).name == name for name in names.split(","))


def test_rates_come_from_arrival_times(peers: ModuleType) -> None:
    prefill = peers.measures(peers.parse_case("prefill@512"), [[0.25]])
    assert prefill == {"prefill@512": [2048]}
    # Tokens a quarter of a second apart in the first window, half a second in the others.
    times = [1.0]
    for step in range(192):
        times.append(times[-1] + (0.25 if step < 64 else 0.5))
    decode = peers.measures(peers.parse_case("decode@512"), [times])
    assert decode == {"decode@512": [4, 2, 2]}


def test_a_batch_counts_while_it_is_whole(peers: ModuleType) -> None:
    # The second starts 10 s after the first, which ends at 64 s; then the second goes on faster.
    first = [1.0 + step for step in range(64)]
    second = [11.0 + step if step < 54 else 64.0 + (step - 53) / 2 for step in range(64)]
    rates = peers.measures(peers.parse_case("batch2"), [first, second])
    assert rates == {"batch2": [2.0], "batch2 whole": [2 * 1088 / 69.0]}
    # Never whole: only the rate over all of it is left.
    apart = [first, [100.0 + step for step in range(64)]]
    assert list(peers.measures(peers.parse_case("batch2"), apart)) == ["batch2 whole"]


def test_a_missing_token_is_an_error(peers: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"1 x 1 tokens were asked for, \{2\} came"):
        peers.measures(peers.parse_case("prefill@512"), [[0.1, 0.2]])


def test_the_bus_limit_counts_weights_once_and_every_cached_token(peers: ModuleType) -> None:
    shape = {
        "vocab_size": 10,
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    # q and o 4 x 4, k and v 2 x 4, three of 6 x 4, two norms; the last norm; the head of 10 x 4.
    weights = 2 * (2 * (16 + 16 + 8 + 8 + 72 + 8) + 4 + 40)
    assert peers.weight_bytes(shape) == weights
    assert peers.kv_bytes(shape) == 2 * 2 * 2 * 1 * 2
    case = peers.parse_case("batch8")
    cached = 8 * (1024 + 32) * 16
    assert peers.bus_limit(shape, case, 1e6) == pytest.approx(8 * 1e6 / (weights + cached))
    assert peers.bus_limit(shape, peers.parse_case("prefill@512"), 1e6) is None


def test_the_ratio_is_of_rounds_and_of_the_best_peer(peers: ModuleType) -> None:
    def cell(row: str, engine: str, *rounds: float) -> object:
        return peers.Cell("160m", row, engine, [[value] for value in rounds])

    ours = cell("decode@512", "quire", 30, 20, 33)
    slow, best = cell("decode@512", "slow", 5, 5, 5), cell("decode@512", "best", 10, 10, 30)
    assert peers.times_best([ours, slow, best]) == (2.0, "best")
    assert peers.times_best([ours]) is None
    # Seconds: fewer are better.
    start = [cell("start", "quire", 2), cell("start", "slow", 9), cell("start", "best", 1)]
    assert peers.times_best(start) == (0.5, "best")
    notes: list[str] = []
    line = peers.format_row([ours, slow, best], ["quire", "slow", "best"], notes)
    assert line.split()[:3] == ["decode@512", "30", "±"]
    assert "22%" in line
    assert "2.00 x best" in line
    assert notes == []


def test_engines_take_turns_over_the_protocol(peers: ModuleType, tmp_path: Path) -> None:
    who = [fake(peers, tmp_path, "quire"), fake(peers, tmp_path, "other")]
    comparison, lines = compared(peers, "batch2", 2, *who)
    assert [len(cell.rounds) for cell in comparison.cells.values()] == [2] * 4  # type: ignore[attr-defined]
    assert comparison.agree == {"other": (4, 4)}  # type: ignore[attr-defined]
    assert "limit" in lines[0]
    assert all("x other" in line for line in lines)
    assert who[0].about == "fake 1.0"  # type: ignore[attr-defined]


def test_a_disturbed_turn_is_taken_again_and_the_last_chance_counts(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = itertools.count(0, 100)
    monkeypatch.setattr(peers, "busy_seconds", lambda: next(moments))
    who = [fake(peers, tmp_path, name) for name in ("quire", "other")]
    comparison = peers.Comparison(
        "160m", who, read=1e9, vocabulary=VOCAB, pause=0.0, patience=0.0, chances=2
    )
    try:
        comparison.run(peers.parse_case("prefill@16"), 1)
    finally:
        comparison.close()
    for cell in comparison.cells.values():
        assert len(cell.rounds) == 1
        assert cell.disturbed[0] > peers.QUIET
    assert comparison.agree == {}  # their prompts were not the same any more


def test_a_crash_is_told_with_the_tail_of_stderr(peers: ModuleType, tmp_path: Path) -> None:
    crash = fake(peers, tmp_path, "crash", "print('the end is near', file=sys.stderr); os._exit(3)")
    error = fake(peers, tmp_path, "error", "raise RuntimeError('no such kernel')")
    cannot = fake(peers, tmp_path, "cannot", "raise protocol.Unsupported('has no batches')")
    mute = fake(peers, tmp_path, "mute", "import time; time.sleep(60)")
    mute.timeout = 0.5  # type: ignore[attr-defined]
    short = fake(peers, tmp_path, "short", "new -= new > 4")
    well = fake(peers, tmp_path, "quire")
    everyone = [crash, error, cannot, mute, short, well]
    _, lines = compared(peers, "batch2", 2, *everyone)
    text = "\n".join(lines)
    assert "ended with status 3" in text
    assert "the end is near" in text
    assert "no such kernel" in text
    assert "cannot: has no batches" in text
    assert "no answer in 0 s" in text
    assert "64 tokens were asked for, {63} came" in text
    assert lines[0].count("±") == 1  # the one that is well goes on alone


def test_an_absent_peer_is_named(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "make_model", lambda *_: tmp_path)
    ghost = peers.Engine("ghost", tmp_path / "ghost.py", "no_such_module_anywhere")
    options = peers.parse(["--cache", str(tmp_path), "--envs", str(tmp_path), "--threads", "1"])
    options.engines = [peers.ENGINES[0], ghost]
    found, absent = peers.contestants("160m", [peers.parse_case("start")], options)
    assert [one.engine.name for one in found] == ["quire"]
    assert absent == ["ghost is absent: no environment has no_such_module_anywhere"]


def test_start_counts_from_the_process(peers: ModuleType, tmp_path: Path) -> None:
    comparison, lines = compared(peers, "start", 1, fake(peers, tmp_path, "quire"))
    (cell,) = comparison.cells.values()  # type: ignore[attr-defined]
    assert cell.rounds[0][0] > 0
    assert len(lines) == 1


def test_the_quire_worker(peers: ModuleType, tmp_path: Path) -> None:
    import quire

    model = write_llama(tmp_path / "tiny", dtype="bf16")
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9]]
    sizes = {"threads": 1, "tokens": 64, "longest": 32, "sequences": 2, "chunk": 4, "set": {}}
    process = peers.Process(Path(sys.executable), peers.WORKERS / "run_quire.py")
    try:
        about = process.ask({"do": "load", "model": str(model), **sizes}, 60)["about"]
        answer = process.ask({"do": "run", "prompts": prompts, "new": 6}, 60)
    finally:
        process.close()
    assert about.startswith(f"quire {quire.__version__}, ")
    params = quire.SamplingParams(max_new_tokens=6, ignore_eos=True)
    expected = quire.Engine(model, threads=1).generate(prompts, params)
    assert answer["ids"] == [list(done.token_ids) for done in expected]
    for times in answer["times"]:
        assert len(times) == 6
        assert times == sorted(times)
    assert answer["peak"] is None or answer["peak"] > 1 << 20


def test_rows_of_earlier_runs_are_kept(peers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    peers.merge(path, {"threads": 2}, [peers.Cell("160m", row, "quire", [[1.0]]) for row in "ab"])
    peers.merge(path, {"threads": 1}, [peers.Cell("160m", "b", "quire", [[2.0, 4.0]])])
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [(cell["row"], cell["median"], cell["threads"]) for cell in cells] == [
        ("a", 1.0, 2),
        ("b", 3.0, 1),
    ]


@pytest.mark.parametrize("option", ["--engines=none", "--models=9t", "--cases=x", "--set=quire"])
def test_wrong_options_are_refused(peers: ModuleType, tmp_path: Path, option: str) -> None:
    with pytest.raises(SystemExit):
        peers.parse(["--cache", str(tmp_path), option])
