"""What a step of the cuda backend hands over to the device: all its integers, in one copy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from checkpoints import tiny_config, write_checkpoint
from conformance.test_attention import Case, lay_out
from quire.backends import create_backend
from quire.batch import PagedBatch
from quire.engine.streamed import StreamedRun
from recording import Recorder, same_bits
from test_cuda import RUNS, STATUS
from tiny import VOCAB, random_prompt, tiny_engine, write_llama, write_mixed

pytestmark = pytest.mark.skipif(not RUNS, reason=f"cuda: {STATUS['cuda'].detail}")

if RUNS:
    import torch

    from quire.backends.cuda.attending import Attention
    from quire.backends.cuda.backend import CudaBackend
    from quire.backends.cuda.device import Device
    from quire.backends.cuda.pool import CudaPool

Copy = list[int]


class Copies:
    """Every copy from the host to the device, but for what is done in ``without``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made: list[Copy] = []
        self._patch, self._off = patch, 0
        to_device, renew = Device.to_device, Device.renew

        def first(device: Any, array: np.ndarray) -> Any:
            self._note(array)
            return to_device(device, array)

        def again(device: Any, there: Any, here: Any, count: int) -> None:
            self._note(here.numpy()[:count])
            renew(device, there, here, count)

        patch.setattr(Device, "to_device", first)
        patch.setattr(Device, "renew", again)

    def _note(self, array: np.ndarray) -> None:
        if not self._off:
            self.made.append(array.ravel().tolist())

    def without(self, owner: Any, name: str) -> None:
        """Leave out what this method copies."""
        inner = getattr(owner, name)

        def silent(*args: Any) -> Any:
            self._off += 1
            try:
                return inner(*args)
            finally:
                self._off -= 1

        self._patch.setattr(owner, name, silent)


@dataclass
class Steps:
    """Forward passes of an engine: (tokens, wanted rows) of each sequence, and what was copied."""

    engine: quire.Engine
    copies: Copies
    parts: list[list[tuple[int, int]]] = field(default_factory=list)
    copied: list[list[Copy]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._inner = self.engine._forward.run
        self.engine._forward.run = self._run  # type: ignore[method-assign]

    def _run(self, parts: Any, samples: Any = ()) -> Any:
        self.copies.made.clear()
        logits = self._inner(parts, samples)
        self.parts.append([(len(tokens), len(rows)) for _, tokens, rows in parts])
        self.copied.append(self.copies.made[:])
        return logits


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made in the test compute with ``cuda-exact``."""
    use("cuda-exact", monkeypatch)


def use(name: str, patch: pytest.MonkeyPatch) -> None:
    """Engines compute with the backend ``name``."""
    patch.setattr("quire.engine.engine.create_backend", lambda *asked: create_backend(name))


LONG = quire.SamplingParams(max_new_tokens=5, ignore_eos=True)


def run_all(engine: quire.Engine) -> None:
    while engine.has_work:
        engine.step()


# -- every family of models, in the ordinary path ------------------------------------------------


def small(kind: str) -> Callable[[Path], Any]:
    return partial(write_checkpoint, config=tiny_config(kind, vocab_size=VOCAB))


PACKED = {"kv_format": "int4", "page_size": 32}
KINDS: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "biases": (small("qwen2"), {}),
    "norms of heads": (small("qwen3"), {}),
    "gpt2": (small("gpt2"), {}),
    "windows": (write_mixed, {"page_size": 3}),
    "int4": (write_llama, PACKED),
    "op by op": (write_llama, {"kv_format": "int8"}),
}
FEW = quire.SamplingParams(max_new_tokens=3, ignore_eos=True)


@dataclass
class Ran:
    """Steps of an engine, the logits that they gave, and those of each prompt in one go."""

    steps: Steps
    recorder: Recorder
    whole: dict[tuple[int, ...], np.ndarray]


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A prefill alone, a long one in chunks, one beside it, another beside two that decode."""
    write, settings = KINDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        use("cuda-exact", patch)
        if request.param == "op by op":
            patch.setattr("quire.backends.cuda.backend.fused", lambda params: params)
        model = tmp_path_factory.mktemp("steps") / "model"
        write(model)
        most = 35 if settings is PACKED else 10  # pages are completed, and packed, in any chunk
        engine = tiny_engine(model, max_batch_tokens=most, prefix_cache=False, **settings)
        engine.generate([random_prompt(3)], quire.SamplingParams(max_new_tokens=2))
        steps = Steps(engine, Copies(patch))
        recorder = Recorder(engine, all_rows=False)
        engine.submit(random_prompt(5, 1), quire.SamplingParams(max_new_tokens=1))
        engine.step()
        engine.submit(random_prompt(most + 4, 2), FEW)
        engine.step()
        engine.submit(random_prompt(3, 3), FEW)
        engine.step()
        engine.submit(random_prompt(most + 1, 4), FEW)
        run_all(engine)
        law = tiny_engine(model, max_batch_tokens=96, prefix_cache=False, **settings)
        texts = {tuple(sample.tokens) for sample, _, _ in recorder.rows}
        yield Ran(steps, recorder, {text: law.logits(list(text)) for text in texts})


def test_a_step_makes_one_copy_whatever_is_prefilled_beside_whatever_decodes(ran: Ran) -> None:
    parts, most = ran.steps.parts, ran.steps.engine.config.max_batch_tokens
    assert parts[0] == [(5, 1)], "a prefill alone"
    assert parts[1] == [(most, 0)], "a chunk whose logits nobody wants"
    assert parts[2] == [(4, 1), (3, 1)], "the end of a prefill beside another one"
    assert parts[3] == [(1, 1), (1, 1), (most - 2, 0)], "two that decode beside a chunk"
    assert parts[4] == [(1, 1), (1, 1), (3, 1)], "and beside its end"
    assert parts[5] == [(1, 1)], "a token decoded alone"
    assert [len(copied) for copied in ran.steps.copied] == [1] * len(parts)


def test_what_is_computed_after_one_copy_are_the_bits_of_the_whole_text_in_one_go(ran: Ran) -> None:
    """There the last layer computes all its rows; no row of a step is a part of another batch."""
    assert len(ran.recorder.rows) >= 10
    for sample, position, logits in ran.recorder.rows:
        assert same_bits(logits, ran.whole[tuple(sample.tokens)][position])


def test_the_fast_backend_makes_one_copy_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("cuda", monkeypatch)
    engine = tiny_engine(write_mixed(tmp_path / "model"), max_batch_tokens=16)
    engine.generate([random_prompt(3)], quire.SamplingParams(max_new_tokens=2))
    steps = Steps(engine, Copies(monkeypatch))
    engine.generate([random_prompt(length, length) for length in (5, 20)], FEW)
    assert len(steps.parts) > 2
    assert [len(copied) for copied in steps.copied] == [1] * len(steps.parts)


def test_a_decode_that_is_not_replayed_takes_tokens_from_where_they_were_chosen(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step of more sequences than a graph has: its ids are on the device already."""
    model = write_llama(tmp_path / "model")
    prompts = [random_prompt(length, length) for length in (5, 9)]
    law = tiny_engine(model).generate(prompts, LONG)
    monkeypatch.setattr("quire.backends.cuda.backend.shape_of", lambda batch: None)
    engine = tiny_engine(model)
    requests = [engine.submit(prompt, LONG) for prompt in prompts]
    engine.step()  # the first copies what is the same in all steps, too
    copies, passes, inner = Copies(monkeypatch), [], engine._loaded.model.forward

    def counted(tokens: Any, *rest: Any) -> Any:
        copies.made.clear()
        logits = inner(tokens, *rest)
        passes.append((isinstance(tokens, torch.Tensor), len(copies.made)))
        return logits

    monkeypatch.setattr(engine._loaded.model, "forward", counted)
    run_all(engine)
    assert passes == [(True, 1)] * 3
    done = [completion for request in requests for completion in request.completions]
    assert [each.token_ids for each in done] == [each.token_ids for each in law]


@pytest.mark.parametrize(("kind", "layers"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_a_chunk_whose_logits_nobody_wants_attends_in_all_layers_but_the_last(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch, kind: str, layers: str
) -> None:
    config = tiny_config(kind, vocab_size=VOCAB, **{layers: 3})
    engine = tiny_engine(write_checkpoint(tmp_path / "model", config), max_batch_tokens=8)
    attended, inner = [], Attention.__call__

    def counted(self: Attention, query: Any, *args: Any) -> Any:
        attended.append(len(query))
        return inner(self, query, *args)

    monkeypatch.setattr(Attention, "__call__", counted)
    engine.submit(random_prompt(20), quire.SamplingParams(max_new_tokens=1))
    engine.step()
    assert attended == [8, 8]
    attended.clear()
    engine.step()
    engine.step()
    assert attended == [8, 8, 4, 4, 1]


# -- where more than the ordinary happens --------------------------------------------------------


def test_a_context_larger_than_the_pool_hands_over_each_pass_in_one_copy(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside its pages, layer by layer."""
    model = write_mixed(tmp_path / "model", max_position_embeddings=400)
    cache = quire.CacheConfig(page_size=4, num_pages=20, host_cache="8MiB")
    engine = quire.Engine(model, backend="reference", cache=cache, max_batch_tokens=37)
    prompt, params = random_prompt(100, seed=1), quire.SamplingParams(max_new_tokens=3)
    engine.generate([prompt[:3]], params)
    copies, passes, inner = Copies(monkeypatch), [], StreamedRun._forward
    copies.without(CudaPool, "import_pages")
    copies.without(CudaPool, "export_pages")

    def counted(self: StreamedRun, model: Any, chunk: Sequence[int], rows: Sequence[int]) -> Any:
        copies.made.clear()
        logits = inner(self, model, chunk, rows)
        passes.append((len(chunk), len(rows), len(copies.made)))
        return logits

    monkeypatch.setattr(StreamedRun, "_forward", counted)
    [done] = engine.generate([prompt], params)
    assert done.streamed is not None
    assert passes == [(37, 0, 1), (37, 0, 1), (26, 1, 1), (1, 1, 1), (1, 1, 1)]
    engine.close()


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("policy", ["snapkv:budget=12,window=4", "quest:budget=12,dense=1"])
def test_steps_of_policies_hand_over_all_in_one_copy(
    tmp_path: Path, on_cuda: None, monkeypatch: pytest.MonkeyPatch, kind: str, policy: str
) -> None:
    model, sparse = tmp_path / "model", []
    small(kind)(model)
    engine = tiny_engine(model, max_batch_tokens=16, prefix_cache=False)
    engine.generate([random_prompt(3)], quire.SamplingParams(max_new_tokens=2))
    silent = CudaBackend.choose_pages

    def counted(self: CudaBackend, *args: Any) -> Any:
        sparse.append(args)
        return silent(self, *args)

    monkeypatch.setattr(CudaBackend, "choose_pages", counted)
    steps = Steps(engine, Copies(monkeypatch))
    params = quire.SamplingParams(max_new_tokens=4, ignore_eos=True, evict=policy)
    engine.submit(random_prompt(14, 1), params)
    engine.submit(random_prompt(7, 2), FEW)
    run_all(engine)
    assert bool(sparse) == policy.startswith("quest")
    assert [(1, 1), (5, 1)] in steps.parts, "a mixed step"
    assert [len(copied) for copied in steps.copied] == [1] * len(steps.parts)


def test_what_a_policy_attends_to_beside_a_step_hands_over_no_page_table_again(
    on_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, batch = create_backend("cuda-exact"), batch_of(((40, 1), (7, 5), (31, 1)))
    backend.take_step([1] * 7, batch, [0, 5, 6])
    copies, others = Copies(monkeypatch), batch.select(np.array([0, 3]))
    step = backend._step(others)
    assert step is backend._step(others)
    assert len(copies.made) == 1
    assert len(copies.made[0]) <= 2 + 2 + 2 + 4, (
        "positions, places, slots and where sequences begin"
    )
    assert step.groups[0].indices is backend._step(batch).groups[0].indices
    assert len(copies.made) == 1, "the step itself is still there"


# -- what is handed over -------------------------------------------------------------------------


def batch_of(sequences: tuple[tuple[int, int], ...]) -> PagedBatch:
    return lay_out(Case(sequences, (4, 2, 16), page_size=4)).batch


@pytest.mark.parametrize("rows", [[], [1, 5], list(range(7))], ids=["none", "some", "all"])
def test_all_integers_of_a_step_are_in_its_copy_once_and_aligned(
    rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, batch = create_backend("cuda"), batch_of(((40, 1), (7, 5), (31, 1)))
    copies = Copies(monkeypatch)
    tokens, wanted = backend.take_step(range(7), batch, rows)
    arrays = [tokens, batch.positions, batch.query_indptr]
    arrays += [batch.chunks.sequences, batch.chunks.indptr]
    group = batch.groups[0]
    arrays += [group.slots, group.indptr, group.indices, group.first_page]
    some = None
    if len(rows) == 2:
        some = backend.select(batch, wanted)
        arrays += [wanted, some.positions, some.places, some.query_indptr, some.groups[0].slots]
        arrays += [some.chunks.sequences, some.chunks.indptr]
        assert backend.select(batch, wanted) is some
        assert backend.select(batch, list(wanted)) is not some, "other rows, for all it knows"
    else:
        assert wanted is rows
    there = [backend.device.integers(array) for array in arrays]
    assert [copy.tolist() for copy in there] == [array.tolist() for array in arrays]
    assert all(copy.data_ptr() % 16 == 0 for copy in there)
    assert len({copy.untyped_storage().data_ptr() for copy in there}) == 1
    if some is not None:
        assert backend._step(some).groups[0].indices is backend._step(batch).groups[0].indices
    assert len(copies.made) == 1
    assert len(copies.made[0]) == sum(len(array) + len(array) % 2 for array in arrays)


def test_tokens_that_are_on_the_device_are_used_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, batch = create_backend("cuda"), batch_of(((40, 1), (7, 1)))
    chosen, copies = torch.tensor([5, 3]), Copies(monkeypatch)
    tokens, rows = backend.take_step(chosen, batch, range(2))
    assert tokens is chosen
    assert rows == range(2)
    assert backend.device.integers(tokens) is chosen
    assert len(copies.made) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_buffers_of_a_captured_step_are_aligned(
    tmp_path: Path, on_cuda: None, count: int, packed: bool
) -> None:
    """So that it launches kernels as a step does that is not captured."""
    settings = PACKED if packed else {}
    engine = tiny_engine(write_mixed(tmp_path / "model"), **settings)
    params = quire.SamplingParams(max_new_tokens=2, ignore_eos=True)
    engine.generate([random_prompt(3, seed) for seed in range(count)], params)
    (graph,) = engine.cache.pools[0].graphs.values()
    copies = [tensor for _, tensor in graph._buffers.taken.whole.held._pairs.values()]
    assert len(copies) >= 8
    assert all(copy.data_ptr() % 16 == 0 for copy in copies)
