"""The next tokens of samples, asked for in one call of whoever holds their logits."""

from collections.abc import Sequence

from quire.backends import Logits
from quire.engine.request import Sample
from quire.engine.shadow import Shadow
from quire.sampler import seen_of, uniform
from quire.sampling import Ask, Choice

__all__ = ["ask_of", "choose_for"]


def choose_for(
    deciding: Sequence[tuple[Sample, int]], logits: Logits, shadow: Shadow | None
) -> list[Choice]:
    """A choice for each (sample, row of ``logits``), in order; ``shadow`` keeps what it watches."""
    if shadow is not None:
        for sample, row in deciding:
            shadow.note(sample, logits, row)
    return logits.choose([ask_of(sample, row) for sample, row in deciding]) if deciding else []


def ask_of(sample: Sample, row: int, *, known: bool = True) -> Ask:
    """What a sample asks of a row of logits; ``known`` is False while its newest token is not."""
    request, tokens = sample.request, sample.tokens
    params, draw, prompt = request.params, 0.0, len(request.prompt_tokens)
    if params.is_plain:
        return Ask(row, params, draw, tokens, prompt)
    if params.temperature:
        draw = uniform(request.seed, sample.index, len(tokens) + (not known))
    if sample.seen is None:
        sample.seen = seen_of(tokens[:prompt], tokens[prompt:], params)
    else:
        sample.seen.follow(tokens, prompt)
    return Ask(row, params, draw, tokens, prompt, sample.seen)
