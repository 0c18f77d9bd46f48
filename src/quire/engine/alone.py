"""The sample that has the engine for itself: at most one, whose context is larger than the pool."""

from collections.abc import Sequence

from quire.backends import Backend, Logits
from quire.cache import KVCache
from quire.config import EngineConfig
from quire.engine.pins import Pins
from quire.engine.prompts import PromptReader
from quire.engine.request import Sample
from quire.engine.streamed import StreamedRun, StreamPlan, plan_stream
from quire.engine.tiering import PrefixTiers
from quire.errors import CacheFull
from quire.models import CausalLM
from quire.sampling import SamplingParams

__all__ = ["Alone"]


class Alone:
    """Plans requests that must be streamed, and runs the one whose turn it is.

    tiers   lend the memory that pages are streamed from; None, or closed, for none
    pins    are let go before the pool's memory is given back
    """

    def __init__(
        self,
        config: EngineConfig,
        cache: KVCache,
        backend: Backend,
        tiers: PrefixTiers | None,
        pins: Pins,
    ) -> None:
        self._config, self._cache, self._backend = config, cache, backend
        self._tiers, self._pins = tiers, pins
        self._run: StreamedRun | None = None

    def plan(
        self, prompts: PromptReader, tokens: Sequence[int], params: SamplingParams
    ) -> StreamPlan | None:
        """How to stream a request that does not fit the pool; RequestError if it cannot be."""
        if self._tiers is None or not self._tiers.tiers:
            prompts.require_fit(tokens, params)
        if prompts.fits_pool(tokens, params):
            return None
        most, chunk = prompts.most_tokens(tokens, params), self._config.max_batch_tokens
        return plan_stream(self._cache, self._config.cache, most, params, chunk)

    @property
    def running(self) -> bool:
        """True while a context larger than the pool has the memory of the pool."""
        return self._run is not None

    def require_pool(self, what: str) -> None:
        """Raise CacheFull while a context larger than the pool has the memory of the pool."""
        if self._run is not None:
            raise CacheFull(
                f"{what} needs pages of the pool, but a context larger than the pool is running; "
                "wait until it has ended"
            )

    def open(self, sample: Sample) -> None:
        """Let a sample run, unless it does. Nothing else may run, or hold pages.

        Raises TierError, OSError or MemoryError, with nothing begun, if there is no memory for it.
        """
        if self._run is not None:
            return
        assert sample.stream is not None
        assert self._tiers is not None
        run = StreamedRun(sample, sample.stream, self._cache, self._tiers, self._config.cache)
        try:
            self._tiers.store()
            while self._pins.drop_one():
                pass
            run.begin(self._backend)
            self._tiers.settle()
        except BaseException:
            run.close()
            raise
        self._run = run

    def step(self, model: CausalLM) -> Logits | None:
        """Compute its next tokens; logits [1, vocab] if those were all there are."""
        assert self._run is not None
        return self._run.step(model, self._config.max_batch_tokens)

    def end(self, sample: Sample) -> None:
        """``sample`` ends; if it was the one that ran, the pool's memory is the pool's again."""
        if self._run is not None and self._run.sample is sample:
            self._run.close()
            self._run = None
