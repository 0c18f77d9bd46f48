"""What lossy settings cost on a text: the meter behind ``quire measure``.

The exact cache (the checkpoint's own dtype, nothing shared, nothing dropped) and every candidate
read the same passages and are told the same tokens, side by side, with the same weights. Each
passage is a prompt, prefilled in chunks as a request's would be, and a continuation that is told
one token a step; only predictions in the continuation are judged, since there every policy has
acted on the prompt and goes on acting, token by token. Losses are of the cache alone: both sides
compute with the same weights in the same order.

Everything but the speeds is a pure function of weights, text, settings and backend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quire.analysis.candidates import Setting, Track, open_tracks
from quire.analysis.divergence import log_softmax
from quire.analysis.losses import Interval, Losses, Summary
from quire.analysis.recall import (
    RecallScore,
    RecallTrial,
    RecallWords,
    distances,
    recall_trial,
    recall_trials_in_prompt,
    recall_words,
)
from quire.analysis.speed import NEW_TOKENS, Speed, measure_speed
from quire.analysis.text import documents, limited, passages
from quire.analysis.walk import walk
from quire.engine import Engine
from quire.errors import QuireError, RequestError

__all__ = ["Measurement", "Plan", "Report", "measure"]

MOST_CONTEXT = 2048
MOST_LANES = 16
LANES_BYTES = 256 * 2**20  # of exact keys and values, or of a step's logits in float64
SEED = 0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    context        tokens of a passage; None is the model's context, at most 2,048
    tokens         most targets; None judges the whole text
    recall_trials  texts with values to recall, each asked for all of its values after the prompt,
                   and for one value at a time in the prompt; 0 leaves recall out
    speed          whether to measure speeds
    """

    context: int | None = None
    tokens: int | None = None
    recall_trials: int = 25
    speed: bool = True


@dataclass(frozen=True)
class Measurement:
    """What one setting takes and loses.

    bytes_per_token      keys and values held at the end of a passage, over its tokens
    bytes_per_token_in_pool   the same, counted on the pages that the pool gives out, with the
                         empty slots of unfinished pages and whatever else lies in them
    compression          the exact cache's bytes per token over these
    summary              losses; of the exact cache itself, all nothing
    recall               share of right answers by distance in tokens, asked after the prompt: what
                         to keep was chosen without knowing the question. None where it cannot be
                         asked
    recall_mean, recall_interval   over all distances; of 95 %
    recall_in_prompt, ..._mean, ..._interval   the same, with the question in the prompt
    """

    setting: Setting
    bytes_per_token: float
    bytes_per_token_in_pool: float
    compression: float
    summary: Summary
    recall: dict[str, float] | None
    recall_mean: float | None
    recall_interval: Interval | None
    recall_in_prompt: dict[str, float] | None
    recall_in_prompt_mean: float | None
    recall_in_prompt_interval: Interval | None
    speed: Speed | None


@dataclass(frozen=True)
class Report:
    """The exact cache's own figures, each candidate's or the reason why it has none.

    context          tokens of a passage
    tokens           targets, over all passages
    recall_missing   why recall could not be asked; None if it was, or was not wanted
    """

    context: int
    tokens: int
    exact: Measurement
    candidates: tuple[tuple[Setting, Measurement | str], ...]
    recall_missing: str | None


def measure(
    model: Engine,
    texts: Mapping[str, str],
    settings: Sequence[Setting],
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measure ``settings`` beside the exact cache on ``texts`` (by name), on ``model``'s weights.

    ``progress`` is called with (what, done, total). Raises RequestError for a checkpoint without a
    tokenizer, texts that are too short and a context that the model does not have; QuireError if
    the exact cache itself cannot be measured.
    """
    return _Meter(model, texts, settings, Plan() if plan is None else plan, progress).run()


class _Meter:
    def __init__(
        self,
        model: Engine,
        texts: Mapping[str, str],
        settings: Sequence[Setting],
        plan: Plan,
        progress: Progress | None,
    ) -> None:
        if model.codec is None:
            raise RequestError(f"{model.directory} has no tokenizer, so it cannot read a text")
        self._codec, self._plan = model.codec, plan
        self._progress = progress or (lambda what, done, total: None)
        self._context = _context(model, plan)
        self._lead, self._documents = documents(model.codec, texts)
        found = [passages(self._lead, document, self._context) for document in self._documents]
        self._passages = limited(found, plan.tokens)
        self._lanes = _lanes(model, self._context)
        self._exact, self._tracks = open_tracks(model, settings, self._context, self._lanes)
        self._recall_missing: str | None = None

    def run(self) -> Report:
        """Losses, then recall, then speeds of all tracks. Raises what :func:`measure` does."""
        losses = self._score()
        recall = list(zip(*self._ask_all(), strict=True))
        speeds = [self._time(track) for track in self._all]
        made = [
            self._measurement(track, loss, scores, speed)
            for track, loss, scores, speed in zip(self._all, losses, recall, speeds, strict=True)
        ]
        assert isinstance(made[0], Measurement)
        candidates = zip((track.setting for track in self._tracks), made[1:], strict=True)
        tokens = sum(len(passage.targets) for passage in self._passages)
        return Report(self._context, tokens, made[0], tuple(candidates), self._recall_missing)

    @property
    def _all(self) -> list[Track]:
        return [self._exact, *self._tracks]

    def _score(self) -> list[Losses]:
        """Losses of the exact cache (against itself) and of every candidate."""
        losses = [Losses([len(p.targets) for p in self._passages]) for _ in self._all]
        done, total = 0, sum(len(p.targets) for p in self._passages)
        for told in walk(self._exact, self._tracks, self._passages, self._lanes, Track.note):
            targets = [self._passages[i].targets[told.at] for i in told.passages]
            assert told.logits[0] is not None
            exact = log_softmax(told.logits[0])
            for loss, logits in zip(losses, told.logits, strict=True):
                if logits is not None:
                    loss.add((told.passages, told.at), exact, logits, targets)
            done += len(targets)
            self._progress("reading the text", done, total)
        return losses

    def _ask_all(self) -> list[Sequence[RecallScore | None]]:
        """Scores of every track, asked after the prompt and asked in the prompt."""
        words = self._words() if self._plan.recall_trials else None
        if words is None:
            return [[None] * len(self._all)] * 2
        filler = [token for document in self._documents for token in document]
        wanted = distances(self._context)
        shape = (self._context, self._lead, wanted)
        seeds = [f"{SEED}/{i}" for i in range(self._plan.recall_trials)]
        after = [recall_trial(words, filler, shape, seed) for seed in seeds]
        within = [t for seed in seeds for t in recall_trials_in_prompt(words, filler, shape, seed)]
        return [
            self._ask(after, wanted, "asking after the prompt"),
            self._ask(within, wanted, "asking in the prompt"),
        ]

    def _ask(
        self, trials: Sequence[RecallTrial], wanted: Sequence[int], what: str
    ) -> list[RecallScore]:
        """Scores of every track; ``wanted`` are the distances, ``what`` is told of the progress."""
        scores = [RecallScore(wanted) for _ in self._all]
        done, total = 0, sum(len(trial.asked) for trial in trials)
        asked = [trial.passage for trial in trials]
        for told in walk(self._exact, self._tracks, asked, self._lanes):
            for row, number in enumerate(told.passages):
                distance = trials[number].asked.get(told.at)
                if distance is None:
                    continue
                answer = asked[number].targets[told.at]
                for score, logits in zip(scores, told.logits, strict=True):
                    if logits is not None:
                        score.add(distance, int(logits[row].argmax()) == answer)
                done += 1
                self._progress(what, done, total)
        return scores

    def _words(self) -> RecallWords | None:
        """What lines to recall are made of; None, with the reason kept, if nothing can be asked."""
        wanted = distances(self._context)
        words = recall_words(self._codec, len(wanted))
        tokens = sum(map(len, self._documents))
        if not wanted:
            self._recall_missing = f"passages of {self._context} tokens are too short"
        elif words is None:
            self._recall_missing = "the tokenizer has no single tokens for '# set NAME VALUE'"
        elif tokens < self._context:
            self._recall_missing = f"the text has {tokens} tokens, and a passage {self._context}"
        return words if self._recall_missing is None else None

    def _time(self, track: Track) -> Speed | None:
        if not self._plan.speed or track.error is not None:
            return None
        done = self._all.index(track)
        self._progress(f"timing {track.setting.name}", done, len(self._all))
        longest = max(self._documents, key=len)
        tokens = [*self._lead, *longest][: self._context - NEW_TOKENS]
        try:
            return measure_speed(track.engine, tokens)
        except QuireError as error:
            track.stop(error)
            return None

    def _measurement(
        self,
        track: Track,
        losses: Losses,
        recall: tuple[RecallScore | None, ...],
        speed: Speed | None,
    ) -> Measurement | str:
        after, within = recall
        if track.error is not None:
            return track.error
        return Measurement(
            setting=track.setting,
            bytes_per_token=track.bytes_per_token,
            bytes_per_token_in_pool=track.stored_bytes / track.stored_tokens,
            compression=self._exact.bytes_per_token / track.bytes_per_token,
            summary=losses.summary(),
            recall=None if after is None else after.accuracy,
            recall_mean=None if after is None else after.mean,
            recall_interval=None if after is None else after.interval,
            recall_in_prompt=None if within is None else within.accuracy,
            recall_in_prompt_mean=None if within is None else within.mean,
            recall_in_prompt_interval=None if within is None else within.interval,
            speed=speed,
        )


def _context(model: Engine, plan: Plan) -> int:
    limit = model.model_config.max_position
    if plan.context is None:
        return min(limit, MOST_CONTEXT)
    if not NEW_TOKENS + 8 <= plan.context <= limit:
        raise RequestError(
            f"a passage of {plan.context} tokens cannot be measured: this model allows "
            f"{NEW_TOKENS + 8} to {limit}"
        )
    return plan.context


def _lanes(model: Engine, context: int) -> int:
    """Passages at a time, so that neither their exact cache nor a step's logits grow large."""
    kept = model.cache.usage().bytes_per_token * context
    row = 8 * model.model_config.vocab_size
    return max(1, min(MOST_LANES, int(LANES_BYTES // kept), LANES_BYTES // row))
