"""What a finished sample gives back."""

from quire.engine.request import Completion, FinishReason, Sample

__all__ = ["completion_of"]

TIERS = ("pool", "host", "disk")


def completion_of(
    sample: Sample,
    text: str,
    reason: FinishReason,
    stopped_by: str | int | None,
    error: str | None,
) -> Completion:
    """The result of ``sample``, whose tokens gave ``text``."""
    request, new = sample.request, sample.new_tokens
    first, last = sample.first_token_at, sample.last_token_at
    cached = dict.fromkeys(TIERS, 0) | (sample.cached_tokens or {})
    decode_s = last - first if first is not None and last is not None else 0.0
    return Completion(
        text=text,
        token_ids=tuple(new),
        finish_reason=reason,
        stop_reason=stopped_by,
        prompt_tokens=len(request.prompt_tokens),
        cached_tokens=sum(cached.values()),
        cached_tokens_by_tier=cached,
        new_tokens=len(new),
        ttft_s=None if first is None else first - request.submitted_at,
        decode_tokens_per_s=(len(new) - 1) / decode_s if decode_s > 0 else None,
        kv_bytes_peak=sample.kv_bytes_peak,
        seed=request.seed,
        index=sample.index,
        logprobs=None if request.params.logprobs is None else tuple(sample.logprobs),
        preemptions=tuple(sample.preemptions),
        error=error,
        score=sample.score,
        tier_decision=sample.tier_decision,
        streamed=sample.streamed,
        evicted_tokens=sample.evicted_tokens,
        reading=sample.reading,
    )
