"""What a caller asks for and what comes back.

A :class:`Request` is one prompt; each of its ``n`` samples is a :class:`Sample`, the unit that the
scheduler runs.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from quire.cache import KVCache, PrefixQuery
from quire.engine.reading import ReadUsage
from quire.engine.tiering import Load
from quire.evict_choice import EvictChoice
from quire.sampling import SamplingParams, Seen, TokenLogprob

if TYPE_CHECKING:
    from quire.engine.streamed import StreamPlan

__all__ = [
    "Completion",
    "FinishReason",
    "Request",
    "Sample",
    "Status",
    "StepOutput",
]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Completion:
    """One finished sample.

    finish_reason        ``stop``, ``length``, ``cancelled`` or ``error``
    stop_reason          what stopped it: the stop string or the token id
    token_ids            new tokens, a stop or EOS token included
    cached_tokens        prompt tokens that were found in the cache and not computed
    cached_tokens_by_tier   how many of them in each tier: ``pool``, ``host``, ``disk``
    tier_decision        whether what tiers held was loaded or computed, with the expected costs;
                         None if they held nothing
    ttft_s               seconds from submission to the first new token
    decode_tokens_per_s  new tokens after the first, per second since the first; None below 2
    kv_bytes_peak        most bytes of KV pages it held at a time
    seed                 of its random stream, also when it was drawn
    index                which of the ``n`` samples of its prompt
    preemptions          why it lost its pages and was computed again, once for each time
    error                with finish_reason ``error``: what went wrong
    streamed             of a context larger than the pool: what was read from where, how fast
    score                of a beam: summed log-probability over length ** length_penalty
    evicted_tokens       how many tokens its eviction policy dropped from the cache (of each KV
                         head; heads drop different ones)
    reading              what its tokens read where a policy chose pages; None if they read all
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    cached_tokens: int
    cached_tokens_by_tier: dict[str, int]
    new_tokens: int
    ttft_s: float | None
    decode_tokens_per_s: float | None
    kv_bytes_peak: int
    seed: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    preemptions: tuple[str, ...] = ()
    error: str | None = None
    score: float | None = None
    tier_decision: str | None = None
    streamed: str | None = None
    evicted_tokens: int = 0
    reading: ReadUsage | None = None


class Status(Enum):
    """Where a sample is."""

    IDLE = "idle"  # a place for a beam, and no beam in it
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sample:
    """One sample of a request as the engine runs it.

    tokens    prompt and new tokens
    computed  how many of them have keys and values in the cache
    sequence  handle in the KVCache while it runs
    cached_tokens  by tier, what was found in the cache when it first ran
    load      pages on their way up from a tier; until they are there it computes nothing
    stream    how to stream it from below, if its context is larger than the pool
    counted   what it held in the last step is in ``kv_bytes_peak``
    parked    a beam whose logits are there, and not yet those of all its siblings
    asked_tiers   tiers had nothing to load since it began to wait
    evicted_tokens   dropped from the cache since it last began to run
    reading   what it read where its policy chose pages; None if it read all
    seen      what penalties change, if there are any
    """

    request: "Request"
    index: int
    tokens: list[int]
    status: Status = Status.IDLE
    sequence: int | None = None
    computed: int = 0
    first_token_at: float | None = None
    last_token_at: float | None = None
    kv_bytes_peak: int = 0
    counted: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    preemptions: list[str] = field(default_factory=list)
    completion: Completion | None = None
    cached_tokens: dict[str, int] | None = None
    score: float | None = None
    load: Load | None = None
    parked: bool = False
    asked_tiers: bool = False
    tier_decision: str | None = None
    stream: "StreamPlan | None" = None
    streamed: str | None = None
    evicted_tokens: int = 0
    reading: ReadUsage | None = None
    seen: Seen | None = None
    _query: PrefixQuery | None = None

    @property
    def prefix_query(self) -> PrefixQuery:
        """All of its tokens, to be looked up in the prefix index."""
        if self._query is None or self._query.num_tokens != len(self.tokens):
            self._query = PrefixQuery(self.tokens, self.request.salt)
        return self._query

    @property
    def match_limit(self) -> int:
        """How many leading tokens may be taken from the cache instead of being computed.

        With eviction no more than the budget, and none if every query has to be seen.
        """
        choice, budget, most = self.request.eviction, self.request.budget, len(self.tokens) - 1
        if choice is None or budget is None:
            return most
        return 0 if choice.watches_all else min(most, budget)

    @property
    def most_kept(self) -> int:
        """The most of its tokens that have to be in the cache at a time."""
        most = self.request.most_kept
        return len(self.tokens) if most is None else min(len(self.tokens), most)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are to be computed now; 0 while others are being loaded."""
        return 0 if self.load is not None else self.uncomputed

    @property
    def uncomputed(self) -> int:
        """Tokens whose keys and values are not there yet."""
        return len(self.tokens) - self.computed

    def count_bytes(self, cache: KVCache) -> None:
        """Note what it holds there now, if that is more than ever before."""
        assert self.sequence is not None
        self.kv_bytes_peak = max(self.kv_bytes_peak, cache.allocated_bytes(self.sequence))
        self.counted = True

    @property
    def new_tokens(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt_tokens) :]


@dataclass(eq=False)
class Request:
    """A prompt that was submitted. ``arrival`` orders requests; ``submitted_at`` is in seconds.

    Prefixes are shared only with requests of the same ``salt``.

    stop_tokens   ids that end a sample, the checkpoint's own included
    most_tokens   a sample ends when it has so many, the prompt's included
    eviction      which tokens are dropped when it outgrows its budget; None for none
    budget        tokens that it keeps then
    most_kept     the most tokens that it must be able to keep for that, at a time
    reading       which pages its reply reads when it outgrows its budget; None for all
    """

    arrival: int
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    seed: int
    submitted_at: float
    samples: tuple[Sample, ...] = ()
    salt: str = ""
    stop_tokens: frozenset[int] = frozenset()
    most_tokens: int = 0
    eviction: EvictChoice | None = None
    budget: int | None = None
    most_kept: int | None = None
    reading: EvictChoice | None = None

    @property
    def finished(self) -> bool:
        """True when every sample is done."""
        return all(sample.status is Status.FINISHED for sample in self.samples)

    @property
    def completions(self) -> list[Completion]:
        """Results of the samples that are done, in order."""
        return [s.completion for s in self.samples if s.completion is not None]


@dataclass(frozen=True)
class StepOutput:
    """What one step brought one sample: a token, the text it completed, perhaps the end.

    ``token_id`` is None for a sample that ended without one (an error).
    """

    request: Request
    index: int
    token_id: int | None
    text: str
    completion: Completion | None = None
