"""Which prompts an engine can serve: text to token ids, and every refusal with its numbers."""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from quire.cache import KVCache, PrefixQuery
from quire.config import ModelConfig
from quire.errors import RequestError
from quire.layout import packed_pages, pages_for
from quire.models import TextCodec
from quire.sampling import SamplingParams

__all__ = [
    "Prompt",
    "PromptReader",
    "as_params",
    "as_prompts",
    "params_of_each",
    "require_salt",
]

Prompt = str | Sequence[int]


class PromptReader:
    """Prompts of one model and one cache. ``directory`` names the model in messages."""

    def __init__(
        self, directory: Path, config: ModelConfig, codec: TextCodec | None, cache: KVCache
    ) -> None:
        self.directory, self.config, self.codec, self.cache = directory, config, codec, cache

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; RequestError for one that is empty or not of this vocabulary."""
        if isinstance(prompt, str):
            if self.codec is None:
                raise RequestError(
                    f"{self.directory} has no tokenizer, so prompts must be lists of token ids"
                )
            tokens = self.codec.encode(prompt)
            if not tokens and self.config.bos_token_id is not None:
                tokens = [self.config.bos_token_id]
        else:
            if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
                raise RequestError(f"a prompt must be text or a list of token ids, not {prompt!r}")
            tokens = list(prompt)
        if not tokens:
            raise RequestError("the prompt is empty; give at least one token")
        vocab = self.config.vocab_size
        for at, token in enumerate(tokens):
            integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not integer or not 0 <= token < vocab:
                raise RequestError(
                    f"token {at} of the prompt is {token!r}; ids of this model are 0 to {vocab - 1}"
                )
        return [int(token) for token in tokens]

    def query(self, prompt: Prompt, salt: str) -> PrefixQuery:
        """A prompt to look up in the prefix cache; RequestError for a salt that is not text."""
        return PrefixQuery(self.tokens(prompt), require_salt(salt))

    def require_context(self, prompt: int, new: int) -> None:
        """Raise RequestError unless ``prompt`` and ``new`` tokens fit the model's context."""
        limit = self.config.max_position
        if prompt + new > limit:
            raise RequestError(
                f"the prompt has {prompt} tokens; with room for {new} new ones that is more than "
                f"the model's context of {limit}; shorten it by {prompt + new - limit}"
            )

    def require_servable(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError for a request that this engine can never serve."""
        self.require_context(len(tokens), 1)
        if params.stop and self.codec is None:
            raise RequestError(
                "stop strings need a tokenizer, which this checkpoint does not have; use "
                "stop_token_ids"
            )
        for token in params.stop_token_ids:
            if token >= self.config.vocab_size:
                raise RequestError(
                    f"stop token id {token} is outside the vocabulary of {self.config.vocab_size}"
                )

    def fits_pool(self, tokens: Sequence[int], params: SamplingParams) -> bool:
        """True if a request finds room in the pool when it has it for itself."""
        most = self.most_tokens(tokens, params)
        needed = self._pages_needed(len(tokens), most, params.beam_width)
        return all(map(operator.le, needed, self.cache.num_pages))

    def most_tokens(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """Tokens that the longest reply leaves in the cache; the last one is never fed back."""
        return min(len(tokens) + params.max_new_tokens, self.config.max_position) - 1

    def require_kept_fit(self, tokens: Sequence[int], params: SamplingParams, budget: int) -> None:
        """Raise RequestError if the tokens that eviction leaves, a page above ``budget`` included,
        do not fit the pool.
        """
        size = self.cache.layout.page_size
        most = min(self.most_tokens(tokens, params), budget + size)
        [pages] = self.cache.num_pages
        if pages_for(most, size) > pages:
            raise RequestError(
                f"{len(tokens)} prompt tokens and up to {params.max_new_tokens} new ones, of which "
                f"eviction keeps {most} at a time, a page above the budget included, need "
                f"{pages_for(most, size)} pages of {size} tokens, but the pool has {pages}; lower "
                "the budget or raise kv_memory"
            )

    def require_unstreamed(
        self, tokens: Sequence[int], params: SamplingParams, policy: str
    ) -> None:
        """Raise RequestError for a request that could only be streamed, which ``policy`` cannot."""
        if not self.fits_pool(tokens, params):
            raise RequestError(
                f"{len(tokens)} prompt tokens and up to {params.max_new_tokens} new ones do not "
                f"fit the pool, and {policy} chooses among pages in the pool: what is streamed "
                "reads all of them; raise kv_memory, lower max_new_tokens or use evict='none'"
            )

    def require_fit(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError, with the numbers, for a request that does not fit the pool."""
        most = self.most_tokens(tokens, params)
        layout = self.cache.layout
        needed = self._pages_needed(len(tokens), most, params.beam_width)
        for area, need, pages in zip(layout.areas, needed, self.cache.num_pages, strict=True):
            if need > pages:
                kind = "open pages" if area.is_open else "pages"
                beams = f" in {params.beam_width} beams" if params.beam_width > 1 else ""
                raise RequestError(
                    f"{len(tokens)} prompt tokens and up to {params.max_new_tokens} new "
                    f"ones{beams} need {need} {kind} of {layout.page_size} tokens "
                    f"({layout.groups[area.group].name()}), but the pool has {pages}; lower "
                    "max_new_tokens, shorten the prompt, raise kv_memory, or give a host_cache or "
                    "cache_dir to stream from"
                )

    def _pages_needed(self, prompt: int, most: int, beams: int) -> tuple[int, ...]:
        """Pages in each area of all beams at once, which share the whole pages of the prompt."""
        layout, size = self.cache.layout, self.cache.layout.page_size
        shared = 0 if self.cache.prefix is None else prompt // size  # by a beam that comes back
        needed: list[int] = []
        for group, packs in enumerate(layout.packs):
            for area, one in enumerate(layout.most_pages(group, most, 1)):
                own = pages_for(most, size) - shared
                if packs:  # the first page counts with the open ones, of which none is shared
                    own = one if area else one - packed_pages(shared * size, size)
                others = (beams - 1) * min(one, own) + beams  # each may have to copy a page
                needed.append(one if beams == 1 else one + others)
        return tuple(needed)


def require_salt(salt: str) -> str:
    """``salt`` if it is text that can be encoded; else RequestError."""
    try:
        str.encode(salt)
    except (TypeError, UnicodeEncodeError):
        raise RequestError(f"salt must be text, not {salt!r}") from None
    return salt


def as_prompts(prompts: Sequence[Prompt] | Prompt) -> list[Prompt]:
    """A list of prompts from one prompt or several; RequestError for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be text or a list, not {prompts!r}")
    listed = list(prompts)
    if listed and all(isinstance(item, int | np.integer) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def as_params(params: SamplingParams | None) -> SamplingParams:
    """What a request is given, or the defaults; RequestError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params must be SamplingParams, not {params!r}")
    return params


def params_of_each(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams]:
    """Of every prompt: its own, or those of all. RequestError for anything else."""
    if not isinstance(params, Sequence):
        return [as_params(params)] * prompts
    if len(params) != prompts:
        raise RequestError(
            f"{prompts} prompts and {len(params)} SamplingParams; give one a prompt, or one for all"
        )
    return list(map(as_params, params))
