"""One engine in a process of its own, for ``bench/prefix.py``: what a restart finds.

Reads one JSON object from stdin, writes one to stdout, ends.

    {"at": seconds, "model": PATH, "threads": N, "pages": N, "prompt": [id, ...],
     "cache_dir": PATH | null, "host_cache": bytes | null, "load": PATH | null,
     "save": PATH | null, "evictions": N}
        -> {"start": s, "load": s, "first": [s, ...], "recomputed": [s, ...],
            "cached": {tier: tokens}, "decision": text | null, "reason": text | null}

``at`` is the time.time() at which the process was asked for, ``start`` the seconds from there to an
engine that is ready (for a session file, its identity included), ``load`` those of load_session.
``first``: seconds from submission to the first token. With ``evictions``, the pool is emptied so
many times before each of two: the prompt again, then the prompt under another salt (recomputed).
"""

import json
import sys
import time
from typing import Any

import quire

ONE = quire.SamplingParams(max_new_tokens=1, ignore_eos=True)


def first_token(
    engine: quire.Engine, prompt: list[int], salt: str = ""
) -> tuple[float, quire.Completion]:
    """Seconds to the first token, which is the only one, and what came."""
    start = time.perf_counter()
    request = engine.submit(prompt, ONE, salt=salt)
    while not request.finished:
        engine.step()
    return time.perf_counter() - start, request.completions[0]


def empty_pool(engine: quire.Engine) -> None:
    """Make the pool give up every cached page, as a sequence that needs all of it does."""
    tokens = engine.cache.num_pages[0] * engine.cache.layout.page_size
    sequence = engine.cache.create()
    engine.cache.rollback(engine.cache.reserve([(sequence, tokens)]))
    engine.cache.release(sequence)


def work(asked: dict[str, Any]) -> dict[str, Any]:
    """All that was asked for."""
    cache = quire.CacheConfig(
        num_pages=asked["pages"],
        cache_dir=asked["cache_dir"],
        disk_cache="8GiB" if asked["cache_dir"] else None,
        host_cache=asked["host_cache"],
    )
    prompt = asked["prompt"]
    with quire.Engine(asked["model"], threads=asked["threads"], cache=cache) as engine:
        if asked["load"] or asked["save"]:
            _ = engine.identity  # digests all weights, once
        answer: dict[str, Any] = {"start": time.time() - asked["at"], "load": 0.0, "reason": None}
        if asked["load"]:
            start = time.perf_counter()
            answer["reason"] = engine.load_session(asked["load"]).reason
            answer["load"] = time.perf_counter() - start
        seconds, done = first_token(engine, prompt)
        first, recomputed = [seconds], []
        for turn in range(asked["evictions"]):
            empty_pool(engine)
            seconds, done = first_token(engine, prompt)
            first.append(seconds)
            empty_pool(engine)
            recomputed.append(first_token(engine, prompt, str(turn))[0])
        if asked["save"]:
            request = engine.submit(prompt, ONE)
            while not request.finished:
                engine.step()
            engine.save_session(request, asked["save"])
    return {
        **answer,
        "first": first,
        "recomputed": recomputed,
        "cached": done.cached_tokens_by_tier,
        "decision": done.tier_decision,
    }


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin))))
