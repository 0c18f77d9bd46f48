"""``torch.cuda`` in software: what is late there, what is lost, what is refused, as on a card.

What the backend does on it is in test_whole_card.py.
"""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from softcard.runtime import Runtime  # noqa: E402
from softcard.tensors import CardTensor  # noqa: E402


@pytest.fixture
def card() -> Iterator[Runtime]:
    """A late one of 64 KiB, on which a kernel adds 1 to its first argument."""

    def launch(kernel: Any, grid: Any, args: Any, named: Any) -> None:
        args[0].add_(1)

    runtime = Runtime(launch, total=1 << 16)
    with runtime.plugged_in():
        yield runtime


def pinned(*numbers: float) -> Any:
    held = torch.empty(len(numbers), pin_memory=True)
    held.numpy()[...] = numbers
    return held


def test_tensors_say_that_they_are_on_a_card_and_are_read_by_copies_alone(card: Runtime) -> None:
    x = torch.arange(3.0, device="cuda")
    assert (x.device.type, x.is_cuda) == ("cuda", True)
    for read in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match="numpy"):
            read()
    assert x.tolist() == x.cpu().tolist() == x.to("cpu").tolist() == [0, 1, 2]
    assert x.to("cpu").device.type == "cpu"
    assert x.to(torch.int64).tolist() == [0, 1, 2]
    assert (x[1].item(), card.fetched > 0) == (1, True)


def test_results_are_those_of_the_host(card: Runtime) -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))

    def some(x: Any, y: Any) -> list[Any]:
        z = (x @ y).index_select(0, torch.tensor([2, 0], device=x.device))
        whole = torch.cat([z, x.t()[:2].contiguous()])
        whole[1:3].mul_(2)
        whole[[0, 1]] = y[:2]
        values, at = torch.topk(whole, 2, dim=1)
        parts = whole.split([1, 3], 1)
        return [
            values,
            at,
            *parts,
            whole.sort(stable=True, dim=1).values,
            whole.view(torch.int32) >> 3,
        ]

    for here, there in zip(some(a, b), some(a.to("cuda"), b.to("cuda")), strict=True):
        assert isinstance(there, CardTensor)
        assert there.dtype == here.dtype
        assert there.tolist() == here.tolist()


def test_a_product_of_narrow_numbers_may_give_wide_ones(card: Runtime) -> None:
    x = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16)
    wide = torch.mm(x.to("cuda"), x.to("cuda").t(), out_dtype=torch.float32)
    assert wide.item() == 1 + 2**-18


def test_tensors_of_host_and_card_do_not_mix(card: Runtime) -> None:
    x, y = torch.ones(2, device="cuda"), torch.ones(2)
    with pytest.raises(RuntimeError, match="of the host among those of the card"):
        x + y
    with pytest.raises(ValueError, match="cpu tensor"):
        card.launch("kernel", (1,), (y,), {})
    assert (x + torch.tensor(1.0)).tolist() == [2, 2]  # a lone number may come from anywhere


# -- late ----------------------------------------------------------------------------------------


def test_a_copy_reads_pinned_memory_when_the_card_comes_to_it(card: Runtime) -> None:
    held, plain = pinned(1, 2), torch.ones(2)
    late, early = (each.to("cuda", non_blocking=True) for each in (held, plain))
    held.numpy()[...] = 7
    plain.numpy()[...] = 7
    assert (late.tolist(), early.tolist()) == ([7, 7], [1, 1])
    assert card.sent == 2


def test_what_comes_back_is_there_behind_an_event(card: Runtime) -> None:
    x, held = torch.tensor([1.0, 2.0], device="cuda"), pinned(0, 0)
    held[:1].copy_(x[:1], non_blocking=True)
    mark = torch.cuda.current_stream().record_event()
    x.zero_()  # behind the mark
    assert np.isnan(held.tolist()[0])
    mark.synchronize()
    assert held.tolist() == [1, 0]
    assert card.timeline.waits == 2  # for x at first, and for the mark
    with pytest.raises(RuntimeError, match="not pinned"):
        torch.empty(2).copy_(x, non_blocking=True)


@pytest.mark.parametrize("policy", ["once", 0, 1, 2])
def test_other_moments(policy: "str | int") -> None:
    card = Runtime(lambda *_: None, policy=policy)
    with card.plugged_in():
        held, found = pinned(1), set()
        for _ in range(40):
            held.numpy()[...] = 1
            x = held.to("cuda", non_blocking=True)
            held.numpy()[...] = 2
            found.add(x.item())
    assert found == ({1} if policy == "once" else {1, 2})


def test_a_time_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="'lat': say late, once, beside or a number"):
        Runtime(lambda *_: None, policy="lat")


def test_streams_go_their_own_ways_but_for_events(card: Runtime) -> None:
    x, beside = torch.zeros(1, device="cuda"), torch.cuda.Stream()
    x.add_(1)
    with torch.cuda.stream(beside):
        early = x.clone()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        late = x.clone()
    beside.synchronize()
    assert late.tolist() == [1]
    assert np.isnan(early.tolist()[0])  # x was not even zero then


def test_memory_given_up_is_another_streams_at_once(card: Runtime) -> None:
    beside = torch.cuda.Stream()
    for waits in (True, False):
        x = torch.ones(4, device="cuda")
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            y = x + 1
        if waits:
            torch.cuda.current_stream().wait_stream(beside)
        del x
        torch.cuda.current_stream().synchronize()
        beside.synchronize()
        assert (y.tolist() == [2] * 4) == waits


def test_a_thread_that_begins_now_knows_the_card(card: Runtime) -> None:
    found = []

    def work() -> None:
        found.append(torch.ones(2, device="cuda"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].tolist() == [1, 1]


# -- graphs --------------------------------------------------------------------------------------


def test_a_captured_step_is_computed_when_it_is_replayed(card: Runtime) -> None:
    x, graph = torch.tensor([1.0], device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        card.launch("kernel", (1,), (y,), {})
    assert np.isnan(y.tolist()[0])
    for number in (1, 5):
        x.fill_(number)
        graph.replay()
        assert y.tolist() == [2 * number + 1]


def test_memory_of_graphs_is_held_where_a_tensor_is_left_of_it(card: Runtime) -> None:
    x, before = torch.ones(1000, device="cuda"), card.memory.held
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y = (x * 2)[:1] + 1
    assert card.memory.held - before == 512
    del y
    assert card.memory.held == before


def test_a_product_of_a_cards_own_dtype_is_written_where_it_is_wanted(card: Runtime) -> None:
    x, y = (torch.full(shape, 3.0, device="cuda").bfloat16() for shape in ((2, 5), (5, 4)))
    out = torch.zeros((2, 4), device="cuda")
    assert torch.mm(x, y, out_dtype=torch.float32, out=out) is out
    assert out.tolist() == [[45.0] * 4] * 2 == torch.mm(x, y, out_dtype=torch.float32).tolist()


def test_what_a_capture_refuses(card: Runtime) -> None:
    x, mark = torch.ones(2, device="cuda"), torch.cuda.Event()
    refused = [
        x.tolist, x[0].item, torch.cuda.synchronize, mark.synchronize, mark.query,
        lambda: torch.ones(2).to("cuda", non_blocking=True), lambda: x[x > 0],
    ]  # fmt: skip
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        for call in refused:
            with pytest.raises(RuntimeError, match="not permitted while a stream is capturing"):
                call()
        pinned(1).to("cuda", non_blocking=True)  # may be captured


@pytest.mark.parametrize(("mode", "fails"), [("global", True), ("thread_local", False)])
def test_another_thread_may_not_ask_for_memory_beside_a_capture(
    card: Runtime, mode: str, fails: bool
) -> None:
    failed = []

    def work() -> None:
        try:
            torch.ones(2, device="cuda")
        except RuntimeError as error:
            failed.append(error)

    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert bool(failed) == fails


def test_graphs_of_a_pool_overwrite_what_others_made(card: Runtime) -> None:
    x, pool = torch.ones(1, device="cuda"), torch.cuda.graph_pool_handle()
    graphs, out = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            out.append(x + 1)
    graphs[0].replay()
    assert out[0].tolist() == [2]
    graphs[1].replay()
    assert (out[1].tolist(), np.isnan(out[0].tolist()[0])) == ([2], True)


# -- memory --------------------------------------------------------------------------------------


def test_there_is_as_much_memory_as_the_card_has(card: Runtime) -> None:
    held = [torch.empty(1 << 12, dtype=torch.uint8, device="cuda") for _ in range(16)]
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 512 bytes"):
        torch.empty(1, device="cuda")
    assert torch.cuda.mem_get_info() == (0, 1 << 16)
    del held[3]
    assert torch.cuda.mem_get_info() == (0, 1 << 16)  # torch keeps it
    torch.empty(1024, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info() == (1 << 12, 1 << 16)


def test_a_tensor_that_becomes_a_part_of_another_gives_its_memory_up(card: Runtime) -> None:
    parts = [torch.ones(128, device="cuda") for _ in range(2)]
    whole = torch.cat(parts)
    assert card.memory.used == 2048
    for part, rows in zip(parts, whole.split(128), strict=True):
        part.set_(rows)
    assert card.memory.used == 1024
    parts[1].zero_()
    assert whole.sum().item() == 128
