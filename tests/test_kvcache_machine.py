"""KVCache against a model that is obviously right, over long random histories.

The model keeps a list of tokens for every sequence and, in each layer group, a tag for every page
that it should hold; equal tags are one shared page. From those it predicts what each call costs and
whether it is refused. The tokens are written where the batch says, as a model's append would. Where
tokens can be dropped, each layer and head keeps its own.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from caches import HEADS, Windows, as_kept, cache_over, ceil_div, layout_of, stored, write
from quire.cache import Reservation
from quire.errors import CacheError, CacheFull

PICK = st.integers(0, 59)  # modulo the number of sequences: shrinks well, and every one can be hit
MOST_SEQUENCES = 6
PACKED = "k=fp32,v=int4"


@dataclass(frozen=True)
class Setup:
    """A small cache, so that pages run out often. Every area has ``num_pages`` pages."""

    page_size: int
    windows: Windows
    num_pages: int
    longest: int = 40
    format: str = "fp32"

    def __str__(self) -> str:
        return f"page {self.page_size}, windows {self.windows}, {self.format}"


SETUPS = [
    Setup(1, (None,), 17),
    Setup(3, (None, None), 8),
    Setup(4, (None,), 6),
    Setup(20, (None,), 4, longest=20),
    Setup(1, (3,), 9),
    Setup(3, (1,), 4),
    Setup(4, (6, 6), 5),
    Setup(4, (None, 5), 7),
    Setup(3, (2, None, 7), 8),
    Setup(20, (None, 6), 4, longest=20),
    Setup(1, (None,), 17, format=PACKED),
    Setup(3, (None, None), 8, format=PACKED),
    Setup(4, (None,), 6, format=PACKED),
    Setup(3, (1,), 4, format=PACKED),
    Setup(3, (2, None, 7), 8, format=PACKED),
    Setup(4, (None, 5), 7, format=PACKED),
]


@dataclass
class Modelled:
    """One sequence as it should be; ``pages[g]`` maps page numbers to tags.

    ``tokens[place]`` is int64 [layers, heads]: who is kept there. Of ``dropped`` nothing is left.
    """

    tokens: list[npt.NDArray[np.int64]]
    pages: list[dict[int, int]]
    dropped: int = 0


@dataclass(eq=False)
class Pending:
    """An open reservation; ``grown[i][g]`` are the pages that sequence i has after a commit.

    ``taken`` are pages of each area.
    """

    reservation: Reservation
    chunks: list[tuple[int, list[npt.NDArray[np.int64]]]]
    grown: list[list[dict[int, int]]]
    taken: list[int] = field(default_factory=list)


class CacheMachine(RuleBasedStateMachine):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        layout = layout_of(setup.page_size, setup.windows, setup.format)
        self.cache, self.packs = cache_over(layout, setup.num_pages), setup.format == PACKED
        self.packed: set[int] = set()  # tags of packed pages
        self.groups = list(dict.fromkeys(setup.windows))
        self.model: dict[int, Modelled] = {}
        self.pending: list[Pending] = []
        self.next_token, self.next_tag = count(1), count()

    # -- the model ---------------------------------------------------------------------------

    def holders(self, group: int, tag: int) -> int:
        return sum(tag in seq.pages[group].values() for seq in self.model.values())

    def free(self) -> list[int]:
        held = self.by_area(
            [{t for s in self.model.values() for t in s.pages[g].values()} for g in self.all]
        )
        taken = [sum(p.taken[a] for p in self.pending) for a in range(len(held))]
        return [self.setup.num_pages - h - t for h, t in zip(held, taken, strict=True)]

    def by_area(self, tags: list[set[int]]) -> list[int]:
        """How many of each group's pages are in each area."""
        kinds = [(t & self.packed, t - self.packed) if self.packs else (t,) for t in tags]
        return [len(kind) for group in kinds for kind in group]

    @property
    def all(self) -> range:
        return range(len(self.groups))

    def grow(self, handle: int, new: int) -> tuple[list[dict[int, int]], list[int]]:
        """The pages of a sequence with ``new`` more tokens, each one it must take with a new tag,
        and how many it takes in each area.

        Tokens go through open pages; those that are whole then, but for the first, are packed.
        """
        seq, size = self.model[handle], self.setup.page_size
        length, grown, cost = len(seq.tokens), [], list[int]()
        for group in self.all:
            pages, taken, sealed = dict(seq.pages[group]), 0, 0
            for number in {position // size for position in range(length, length + new)}:
                if number not in pages or self.holders(group, pages[number]) > 1:
                    pages[number] = next(self.next_tag)
                    taken += 1
                if self.packs and number and (number + 1) * size <= length + new:
                    pages[number] = next(self.next_tag)
                    self.packed.add(pages[number])
                    sealed += 1
            grown.append(pages)
            cost += [sealed, taken] if self.packs else [taken]
        return grown, cost

    def first_seen(self, group: int, length: int) -> int:
        window = self.groups[group]
        return 0 if window is None else max(0, length - window + 1)

    def pick(self, number: int, idle: bool = True) -> int | None:
        reserved = {handle for p in self.pending for handle, _ in p.chunks}
        handles = [h for h in self.model if not (idle and h in reserved)]
        return handles[number % len(handles)] if handles else None

    def tokens(self, number: int) -> list[npt.NDArray[np.int64]]:
        layers = len(self.setup.windows)
        return [np.full((layers, HEADS), next(self.next_token)) for _ in range(number)]

    def try_reserve(self, wanted: list[tuple[int, int]]) -> Pending | None:
        """Reserve and write, or see that the cache refuses what the model says cannot fit."""
        wanted = [(h, min(n, self.setup.longest - len(self.model[h].tokens))) for h, n in wanted]
        grows = [self.grow(handle, new) for handle, new in wanted]
        grown, costs = [pages for pages, _ in grows], [cost for _, cost in grows]
        for (handle, new), cost in zip(wanted, costs, strict=True):
            assert self.cache.cost(handle, new) == tuple(cost)
        need = [sum(cost[a] for cost in costs) for a in range(len(self.free()))]
        if any(n > f for n, f in zip(need, self.free(), strict=True)):
            with pytest.raises(CacheFull):
                self.cache.reserve(wanted)
            return None
        made = self.cache.reserve(wanted)
        chunks = [(handle, self.tokens(new)) for handle, new in wanted]
        new = [int(token[0, 0]) for _, tokens in chunks for token in tokens]
        write(self.cache, made.batch, new)
        at = [(self.model[h], i) for h, tokens in chunks for i in range(len(tokens))]
        places = [len(seq.tokens) + i for seq, i in at]
        assert made.batch.places.tolist() == places
        assert made.batch.positions.tolist() == [
            place + seq.dropped for place, (seq, _) in zip(places, at, strict=True)
        ]
        self.pending.append(Pending(made, chunks, grown, need))
        return self.pending[-1]

    def settle(self, pending: Pending, keep: bool) -> None:
        self.pending.remove(pending)
        if not keep:
            self.cache.rollback(pending.reservation)
            return
        self.cache.commit(pending.reservation)
        for (handle, tokens), grown in zip(pending.chunks, pending.grown, strict=True):
            seq = self.model[handle]
            seq.tokens += tokens
            seq.pages = [
                {n: t for n, t in pages.items() if self.still_seen(g, n, len(seq.tokens))}
                for g, pages in enumerate(grown)
            ]

    def still_seen(self, group: int, number: int, length: int) -> bool:
        return (number + 1) * self.setup.page_size > self.first_seen(group, length)

    # -- what can happen ---------------------------------------------------------------------

    @precondition(lambda self: len(self.model) < MOST_SEQUENCES)
    @rule(number=st.integers(0, 12))
    def admit(self, number: int) -> None:
        handle = self.cache.create()
        assert handle not in self.model
        self.model[handle] = Modelled([], [{} for _ in self.groups])
        if pending := self.try_reserve([(handle, number)]):
            self.settle(pending, keep=True)

    @precondition(lambda self: self.model)
    @rule(which=PICK, number=st.integers(0, 9), keep=st.sampled_from([True, True, False]))
    def append(self, which: int, number: int, keep: bool) -> None:
        handle = self.pick(which)
        if handle is not None and (pending := self.try_reserve([(handle, number)])):
            self.settle(pending, keep)

    @precondition(lambda self: self.model)
    @rule(
        chunks=st.lists(st.tuples(PICK, st.integers(0, 6)), min_size=1, max_size=4),
        then=st.sampled_from(["commit", "commit", "roll back", "leave open"]),
    )
    def batch(self, chunks: list[tuple[int, int]], then: str) -> None:
        picked = {self.pick(which): number for which, number in chunks}
        wanted = [(handle, number) for handle, number in picked.items() if handle is not None]
        pending = self.try_reserve(wanted)
        if pending and then != "leave open":
            self.settle(pending, keep=then == "commit")

    @precondition(lambda self: self.pending)
    @rule(which=PICK, keep=st.booleans())
    def settle_an_open_one(self, which: int, keep: bool) -> None:
        pending = self.pending[which % len(self.pending)]
        self.settle(pending, keep)
        with pytest.raises(CacheError, match="already committed or rolled back"):
            self.cache.commit(pending.reservation)

    @precondition(lambda self: self.pending)
    @rule(which=PICK)
    def touch_a_reserved_one(self, which: int) -> None:
        chunks = self.pending[which % len(self.pending)].chunks
        if not chunks:
            return
        handle = chunks[which % len(chunks)][0]
        for refused in (
            lambda: self.cache.fork(handle),
            lambda: self.cache.truncate(handle, 0),
            lambda: self.cache.release(handle),
            lambda: self.cache.reserve([(handle, 1)]),
        ):
            with pytest.raises(CacheError, match="open reservation"):
                refused()

    @precondition(lambda self: len(self.model) < MOST_SEQUENCES)
    @rule(which=PICK)
    def fork(self, which: int) -> None:
        if (handle := self.pick(which)) is not None:
            source = self.model[handle]
            forked = self.cache.fork(handle)
            assert forked not in self.model
            pages = [dict(p) for p in source.pages]
            self.model[forked] = Modelled(list(source.tokens), pages, source.dropped)

    @precondition(lambda self: self.model)
    @rule(which=PICK, back=st.integers(0, 11))
    def truncate(self, which: int, back: int) -> None:
        if (handle := self.pick(which)) is None:
            return
        seq, size = self.model[handle], self.setup.page_size
        length = max(0, len(seq.tokens) - back)
        if seq.dropped and length < len(seq.tokens):
            with pytest.raises(CacheError, match="heads keep different ones"):
                self.cache.truncate(handle, length)
            return
        given_back = [
            {n for n in range(ceil_div(len(seq.tokens), size)) if n not in seq.pages[g]}
            for g in self.all
        ]
        if any(self.first_seen(g, length) // size in given_back[g] for g in self.all):
            with pytest.raises(CacheError, match="shortest possible length"):
                self.cache.truncate(handle, length)
            return
        whole = len(seq.tokens) // size
        if self.packs and length % size and 0 < length // size < whole:
            with pytest.raises(CacheError, match="that is packed"):
                self.cache.truncate(handle, length)
            return
        self.cache.truncate(handle, length)
        del seq.tokens[length:]
        seq.pages = [{n: t for n, t in pages.items() if n * size < length} for pages in seq.pages]

    @precondition(lambda self: self.model)
    @rule(which=PICK, share=st.floats(0, 1), seed=st.integers(0, 9))
    def evict(self, which: int, share: float, seed: int) -> None:
        """Each layer and head keeps tokens of its own; the first few are often kept by all."""
        if (handle := self.pick(which)) is None or not self.model[handle].tokens:
            return
        seq, random = self.model[handle], np.random.default_rng(seed)
        length, size = len(seq.tokens), self.setup.page_size
        kept = max(1, round(share * length))
        common = min(kept, 2 * seed)
        keep = [np.empty((HEADS, kept), np.int64) for _ in self.setup.windows]
        for places in keep:
            for row in places:
                rest = random.choice(np.arange(common, length), kept - common, replace=False)
                row[:] = [*range(common), *sorted(rest)]
        if any(self.groups):
            with pytest.raises(CacheError, match="cannot be dropped where layers keep a sliding"):
                self.cache.evict(handle, keep)
            return
        if self.packs:
            with pytest.raises(CacheError, match="cannot be dropped from int4 pages"):
                self.cache.evict(handle, keep)
            return
        same = [n for n in range(kept) if all((places[:, n] == n).all() for places in keep)]
        first = next((n for n in range(kept) if n not in same), kept) // size
        pages = {n: t for n, t in seq.pages[0].items() if n < ceil_div(kept, size)}
        shared = [n for n, t in pages.items() if n >= first and self.holders(0, t) > 1]
        if kept < length and len(shared) > self.free()[0]:
            with pytest.raises(CacheFull, match="dropping tokens writes"):
                self.cache.evict(handle, keep)
            return
        self.cache.evict(handle, keep)
        if kept < length:
            old, seq.dropped = seq.tokens, seq.dropped + length - kept
            seq.pages = [pages | {n: next(self.next_tag) for n in shared}]
            seq.tokens = [
                np.array([[old[p[h, n]][at, h] for h in range(HEADS)] for at, p in enumerate(keep)])
                for n in range(kept)
            ]

    @precondition(lambda self: self.model)
    @rule(which=PICK)
    def release(self, which: int) -> None:
        if (handle := self.pick(which)) is None:
            return
        pages = self.model[handle].pages
        alone = [{t for t in pages[g].values() if self.holders(g, t) == 1} for g in self.all]
        assert self.cache.freed_by_release(handle) == tuple(self.by_area(alone))
        self.cache.release(handle)
        del self.model[handle]
        with pytest.raises(CacheError, match="unknown"):
            self.cache.length(handle)

    @precondition(lambda self: self.model)
    @rule(which=PICK, group=PICK)
    def exhaust(self, which: int, group: int) -> None:
        """Ask for one page more than there are."""
        if (handle := self.pick(which)) is not None:
            each = 2 if self.packs else 1  # of a group's areas the last is that of open pages
            pages = self.free()[each * (group % len(self.groups)) + each - 1] + 1
            with pytest.raises(CacheFull, match=r"need .* are free"):
                self.cache.reserve([(handle, pages * self.setup.page_size)])

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def books_balance(self) -> None:
        self.cache.check()
        assert self.cache.sequences == tuple(self.model)
        assert self.cache.free_pages == tuple(self.free())

    @invariant()
    def every_sequence_holds_its_own_tokens(self) -> None:
        for handle, seq in self.model.items():
            assert self.cache.length(handle) == len(seq.tokens)
            assert self.cache.dropped(handle) == seq.dropped
            shape = len(seq.tokens), len(self.setup.windows), HEADS
            held = np.array(seq.tokens).reshape(shape)
            for layer, kv in enumerate(self.cache.to_arrays(handle, "BSHD").layers):
                rows = held[kv.start :, layer]
                wanted = [stored(layer, rows[:, head]) for head in range(HEADS)]
                key, value = (
                    np.stack([side[:, head] for head, side in enumerate(sides)], axis=1)
                    for sides in zip(*wanted, strict=True)  # each head, its own token
                )
                assert np.array_equal(kv.key[0], key)
                kept = as_kept(self.cache.pools[layer], value, kv.start, len(seq.tokens))
                assert np.array_equal(kv.value[0], kept)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_any_history_agrees_with_lists_of_tokens(setup: Setup) -> None:
    run_state_machine_as_test(
        partial(CacheMachine, setup),
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
