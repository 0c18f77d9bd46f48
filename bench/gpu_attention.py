"""Parts ``decode`` and ``prefill`` of ``bench/gpu.py``: attention over pages."""

import itertools
import math
from functools import partial
from typing import Any

import torch
from gpu_dense import copying, multiplying
from gpu_pages import FullPool, Heads
from gpu_rows import Row, summary
from gpu_timing import Call, Setting, paired
from torch.nn.attention import SDPBackend, sdpa_kernel

from quire.backends import create_backend
from quire.errors import BackendError

__all__ = ["decode", "error_ratio", "prefill"]

FORMATS = {"bf16": None, "int8": 1.7, "int4": 2.5}  # times the tokens/s of bf16 that are asked
CONTEXTS = tuple(itertools.product((8, 16, 64), (8192, 16384, 32768)))
LARGE, SMALL = Heads(32, 8, 128), Heads(4, 2, 32)


def decode(setting: Setting) -> None:
    """One token of each sequence: its rate, and the share of the copy bandwidth that it reads at.

    Bytes are those of the pages; page tables, queries and partial results are not counted.
    """
    backend = create_backend("cuda")
    cases = setting.choose(CONTEXTS, ((8, 8192), (64, 32768)), ((2, 64),))
    heads = setting.choose(LARGE, LARGE, SMALL)
    most = max(s for s, _ in cases), max(s * c for s, c in cases)
    pools: dict[str, FullPool] = {}
    for name in FORMATS:
        try:
            pools[name] = FullPool(backend, setting.kind, name, heads, most)
        except BackendError as error:
            setting.emit(Row(setting.part, name, note=f"not stored: {error}"))
            continue
        check = partial(_check_decode, setting, backend, pools[name], name, cases[0])
        setting.attempt(f"{name} beside float64", check)
    copy, moved = copying(setting)
    for sequences, context in cases:
        measure = partial(_decode_case, setting, backend, pools, (copy, moved))
        setting.attempt(f"{sequences} x {context}", partial(measure, (sequences, context)))


def _query(setting: Setting, tokens: int, heads: Heads) -> Any:
    return torch.randn(tokens, heads.query, heads.dim, device=setting.kind)


def _decode_case(
    setting: Setting,
    backend: Any,
    pools: dict[str, FullPool],
    ceiling: tuple[Call, float],
    case: tuple[int, int],
) -> None:
    (copy, copied), (sequences, context) = ceiling, case
    repeats = setting.choose(11, 5, 2)
    calls: dict[str, Call] = {"copy": copy}
    for name, full in pools.items():
        batch = full.batch(sequences, context, 1)
        query = _query(setting, sequences, full.heads)
        calls[name] = partial(backend.attend, query, full.pool, batch, 0)
    taken = setting.watch.rounds(calls, repeats)
    for name, full in pools.items():
        seconds, spread = summary(taken[name])
        moved = full.moved(sequences, context)
        share = moved / copied * paired(taken[name], taken["copy"])
        flops = 4.0 * sequences * context * full.heads.query * full.heads.dim
        row = partial(
            Row, setting.part, f"{sequences} x {context}, {name}", sequences / seconds, "tokens/s",
            spread, repeats, seconds=seconds, flops=flops, bytes=moved,
        )  # fmt: skip
        if name == "bf16" or "bf16" not in taken:
            setting.emit(row(ratio=share, of="copy bandwidth", at_least=0.85))
            continue
        times = paired(taken[name], taken["bf16"])
        note = f"{share:.0%} of the copy bandwidth"
        setting.emit(row(ratio=times, of="bf16 tokens/s", at_least=FORMATS[name], note=note))


def _check_decode(
    setting: Setting, backend: Any, full: FullPool, name: str, case: tuple[int, int]
) -> None:
    """A kernel that is wrong has no speed: the first sequence beside float64."""
    batch = full.batch(*case, 1)
    query = _query(setting, case[0], full.heads)
    out = backend.attend(query, full.pool, batch, 0)[:1]
    ratio = error_ratio(out, query[:1], *full.seen(batch))
    setting.emit(_agreement(setting, f"{name} beside float64, {case[0]} x {case[1]}", ratio))


def _agreement(setting: Setting, case: str, ratio: float) -> Row:
    return Row(setting.part, case, ratio=ratio, of="error of bf16 operands", at_most=2.0)


def error_ratio(out: Any, query: Any, key: Any, value: Any) -> float:
    """Error of ``out`` [n, H * D] over that of plain arithmetic with operands rounded to bf16.

    Both against float64, root mean square; query [n, H, D] are the last n of ``key`` and ``value``
    [context, G, D].
    """
    rows, heads, dim = query.shape
    share, context = heads // key.shape[1], len(key)
    key, value = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (key, value))
    places = torch.arange(context, device=key.device)
    hidden = places[None, :] > places[context - rows :, None]

    def mix(narrow: Any) -> Any:
        scores = narrow(query.double()).transpose(0, 1) @ key.transpose(1, 2) / math.sqrt(dim)
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        return (narrow(weights) @ value).transpose(0, 1).reshape(rows, -1)

    exact, plain = mix(lambda x: x), mix(lambda x: x.bfloat16().double())
    return float(((out.double() - exact).norm() / (plain - exact).norm()).item())


def prefill(setting: Setting) -> None:
    """A whole prompt, causal, beside torch's SDPA on contiguous bf16 tensors."""
    heads = setting.choose(LARGE, LARGE, SMALL)
    tokens, repeats = setting.choose(8192, 8192, 64), setting.choose(15, 7, 2)
    backend = create_backend("cuda")
    full = FullPool(backend, setting.kind, "bf16", heads, (1, tokens))
    batch, query = full.batch(1, tokens, tokens), _query(setting, tokens, heads)
    ours = partial(backend.attend, query, full.pool, batch, 0)
    few = min(16, tokens)
    ratio = error_ratio(ours()[-few:], query[-few:], *full.seen(batch))
    setting.emit(_agreement(setting, f"{few} of {tokens} rows beside float64", ratio))
    multiply, operations = multiplying(setting)
    calls: dict[str, Call] = {"ours": ours, "multiply": multiply}
    theirs = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    if setting.kind == "cpu":
        theirs = {"flash": SDPBackend.MATH}
    for name, kind in theirs.items():
        call = setting.attempt(f"torch's SDPA, {name}", partial(_sdpa, setting, full, tokens, kind))
        if call is not None:
            calls[name] = call
    taken = setting.watch.rounds(calls, repeats)
    flops = 4.0 * heads.query * heads.dim * tokens * (tokens + 1) / 2
    moved = full.moved(1, tokens) + 8.0 * tokens * heads.query * heads.dim
    for name in [name for name in calls if name != "multiply"]:
        seconds, spread = summary(taken[name])
        share = flops / operations * paired(taken[name], taken["multiply"])
        row = partial(
            Row, setting.part, f"{tokens} causal, {'ours' if name == 'ours' else 'SDPA ' + name}",
            flops / seconds / 1e12, "TF/s", spread, repeats,
            seconds=seconds, flops=flops, bytes=moved if name == "ours" else None,
            note=f"{share:.0%} of the bf16 product's rate",
        )  # fmt: skip
        if name == "ours" and "flash" in taken:
            times = paired(taken["ours"], taken["flash"])
            setting.emit(row(ratio=times, of="SDPA flash", at_least=0.8))
        else:
            setting.emit(row())


def _sdpa(setting: Setting, full: FullPool, tokens: int, kind: Any) -> Call:
    """That kernel over tensors as torch likes them; raises where it does not run."""
    heads = full.heads

    def random(count: int) -> Any:
        return torch.randn(1, count, tokens, heads.dim, device=setting.kind).bfloat16()

    query, key, value = random(heads.query), random(heads.kv), random(heads.kv)

    def call() -> Any:
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

    call()
    setting.watch.synchronize()
    return call
