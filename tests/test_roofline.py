"""Operations and bytes of a step against explicit loops, torch's own count, and hand arithmetic."""

import itertools
import json
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest

from quire.analysis.catalogue import known_model
from quire.analysis.families import shape_of
from quire.analysis.hardware import Hardware, known_hardware
from quire.analysis.memory import score_matrix_bytes, stored_bits
from quire.analysis.roofline import (
    Roof,
    cache_read_bytes,
    compute_bound_batch,
    decode_time,
    decoding,
    prefill_time,
    step_time,
)
from quire.analysis.shape import ModelShape
from quire.analysis.steps import (
    Op,
    Work,
    deploy,
    seen_pairs,
    step_ops,
    weight_bytes,
)
from quire.errors import ConfigError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA = {"model_type": "llama", **SIZES}
MIXED = {
    "model_type": "qwen3",
    **SIZES,
    "head_dim": 12,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
MOE = {
    "model_type": "qwen3_moe",
    **SIZES,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
LATENT = {
    "model_type": "deepseek_v3",
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
}
WORKS = [
    [Work(0, 1)],
    [Work(0, 13)],
    [Work(9, 5, 0)],
    [Work(40, 1)] * 3,
    [Work(30, 1), Work(2, 1), Work(5, 6), Work(0, 20, 0), Work(5, 6, 2)],
]


def shape(raw: dict[str, Any]) -> ModelShape:
    return shape_of(raw, "tiny", "a test")


def total(ops: tuple[Op, ...], field: str, what: str | None = None) -> float:
    return sum(getattr(op, field) for op in ops if what in (None, op.what))


def attention_by_loops(raw: dict[str, Any], work: list[Work]) -> int:
    """A multiplication and an addition for each number, of each key that each head's query sees."""
    dim = raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
    types = raw.get("layer_types", ["full_attention"] * raw["num_hidden_layers"])
    count = 0
    for kind, each in itertools.product(types, work):
        for position in range(each.context, each.context + each.new):
            for key in range(position + 1):
                if kind == "sliding_attention" and key <= position - raw["sliding_window"]:
                    continue
                for _head in range(raw["num_attention_heads"]):
                    count += 2 * dim  # the score
                    count += 2 * dim  # its share of the sum of values
    return count


def linear_by_loops(raw: dict[str, Any], work: list[Work]) -> int:
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    dim, kv = raw.get("head_dim", hidden // heads), raw["num_key_value_heads"]
    count = 0
    for each in work:
        for _layer, _token in itertools.product(range(raw["num_hidden_layers"]), range(each.new)):
            count += 2 * hidden * heads * dim  # queries
            count += 2 * hidden * kv * dim + 2 * hidden * kv * dim  # keys, values
            count += 2 * heads * dim * hidden  # output
            if "num_experts" in raw:
                count += 2 * hidden * raw["num_experts"]  # router
                for _expert in range(raw["num_experts_per_tok"]):
                    count += 3 * 2 * hidden * raw["moe_intermediate_size"]
            else:
                count += 3 * 2 * hidden * raw["intermediate_size"]
        for _logit in range(each.logits):
            count += 2 * hidden * raw["vocab_size"]
    return count


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("raw", [LLAMA, MIXED, MOE], ids=["llama", "windows", "experts"])
def test_operations_are_those_of_explicit_loops(raw: dict[str, Any], work: list[Work]) -> None:
    ops = step_ops(deploy(shape(raw)), work)
    assert total(ops, "flops", "attention") == attention_by_loops(raw, work)
    assert total(ops, "flops", "linear") == linear_by_loops(raw, work)


@pytest.mark.parametrize(
    ("window", "context", "new"),
    list(itertools.product((None, 1, 2, 7), (0, 1, 5, 6, 7, 30), (1, 2, 9))),
)
def test_pairs_are_counted_exactly(window: int | None, context: int, new: int) -> None:
    seen = 0
    for query in range(context, context + new):
        seen += sum(1 for key in range(query + 1) if window is None or key > query - window)
    assert seen_pairs(window, context, new) == seen


FORMATS = ("auto", "int8", "int4")
TAKEN = [
    *itertools.product([LLAMA | {"head_dim": 32}, MIXED | {"head_dim": 32}, LATENT], FORMATS),
    *((raw | {"head_dim": 32}, "k=int8,v=int2") for raw in (LLAMA, MIXED)),  # a latent has one
]


@pytest.mark.parametrize(("raw", "kv"), TAKEN)
def test_a_decode_step_reads_the_bytes_that_a_token_sees(raw: dict[str, Any], kv: str) -> None:
    served = deploy(shape(raw), kv_format=kv)
    for context in (0, 1, 31, 32, 33, 63, 64, 100, 158):
        read = cache_read_bytes(served, 3, context)
        assert abs(read - 3 * served.layout.seen_bytes(context)) < 3  # which rounds down


def test_weights_are_read_once_a_step_and_embeddings_by_row() -> None:
    served = deploy(shape(LLAMA))
    table, rows = 97 * 32 * 2, 4 * 32 * 2
    for work in ([Work(5, 4)], [Work(5, 1)] * 4):
        read = total(step_ops(served, work), "weight_bytes")
        assert read == weight_bytes(served) - table + rows
    tied = deploy(shape({**LLAMA, "tie_word_embeddings": True}))
    assert total(step_ops(tied, [Work(5, 4)]), "weight_bytes") == weight_bytes(tied) + rows
    assert not [op for op in step_ops(served, [Work(0, 9, 0)]) if op.part == "head"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_expected_experts_are_the_mean_over_all_choices(tokens: int) -> None:
    pairs = list(itertools.combinations(range(6), 2))
    choices = list(itertools.product(pairs, repeat=tokens))
    mean = Fraction(sum(len(set().union(*each)) for each in choices), len(choices))
    [op] = [
        op
        for op in step_ops(deploy(shape(MOE)), [Work(8, tokens)])
        if op.part == "experts" and op.copies != 1 and op.inputs == 20
    ]
    assert op.copies == pytest.approx(float(mean))
    assert op.weight_bytes == pytest.approx(3 * float(mean) * 20 * 32 * 2)


def latent_by_loops(context: int, new: int, expanded: bool) -> int:
    """One layer's attention with its expansion matrix, for one sequence, head by head."""
    raw, count = LATENT, 0
    rank, plain, rotary, value = 16, 8, 4, 6
    for _head in range(raw["num_attention_heads"]):
        if expanded:
            for _token in range(context + new):
                count += 2 * rank * (plain + value)
        for position in range(context, context + new):
            if not expanded:
                count += 2 * plain * rank + 2 * rank * value  # into the latent's space and back
            for _key in range(position + 1):
                count += 2 * (plain + rotary) + 2 * value if expanded else 4 * rank + 2 * rotary
    return count


@pytest.mark.parametrize(
    ("context", "new"), [(0, 1), (0, 20), (50, 1), (50, 2), (50, 20), (10, 30)]
)
def test_latent_attention_takes_the_cheaper_of_two_ways(context: int, new: int) -> None:
    ops = step_ops(deploy(shape(LATENT)), [Work(context, new)])
    expansion = [op for op in ops if (op.inputs, op.outputs) == (16, 4 * (8 + 6))]
    found = sum(op.flops for op in ops if op.what == "attention") + expansion[0].flops
    ways = {way: latent_by_loops(context, new, way) for way in (True, False)}
    assert found == 3 * min(ways.values())  # layers
    if new == 1 and context:
        assert ways[False] < ways[True]
    if context == 0 and new > 1:
        assert ways[True] < ways[False]
    keep = total(ops, "kv_bytes")
    assert keep == 3 * (context + new) * (16 + 4) * 2


def torch_model(kind: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    config = getattr(transformers, f"{kind}Config")(**more)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


@pytest.mark.parametrize("raw", [LLAMA, MOE, LATENT], ids=["llama", "experts", "latent"])
def test_operations_are_those_that_torch_counts(raw: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    more = {k: v for k, v in raw.items() if k not in ("model_type", "dtype")}
    if raw is LATENT:
        more |= {"n_group": 1, "topk_group": 1, "head_dim": 4}
    if raw is not LLAMA:
        more["experts_implementation"] = "eager"  # which multiplies as torch can count
    name = {"llama": "Llama", "qwen3_moe": "Qwen3Moe", "deepseek_v3": "DeepseekV3"}
    model = torch_model(name[raw["model_type"]], **more)
    tokens = 11
    ids = torch.arange(tokens).remainder(97)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    ops = step_ops(deploy(shape(raw)), [Work(0, tokens, tokens)])
    assert products == total(ops, "flops", "linear")
    # eager attention computes the upper triangle, too; some versions, rotary angles by a product
    square = total(ops, "flops", "attention") * tokens * tokens / seen_pairs(None, 0, tokens)
    rotary = 4 if raw is LATENT else 8
    assert counts["aten.bmm"] - square in (0, rotary * tokens)


FAST = Hardware("fast", "gpu", 80 * 2**30, 2e12, {"fp32": 2e13, "fp16": 3e14}, None, "a test")


def test_llama_2_7b_by_hand() -> None:
    """2 x 6.6e9 operations a token, 13.5 GB of weights: 148 tokens a second at 2 TB/s."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    head = table = 32000 * 4096
    norms = (2 * 32 + 1) * 4096
    served = deploy(known_model("llama-2-7b"))
    assert weight_bytes(served) == 2 * (32 * layer + head + table + norms) == 13_476_831_232
    assert 2e12 / weight_bytes(served) == pytest.approx(148.4, abs=0.05)
    ops = step_ops(served, [Work(0, 1)])
    assert (
        total(ops, "flops", "linear") == 2 * (32 * layer + head) == pytest.approx(2 * 6.607e9, 1e-4)
    )
    # of the table of embeddings a step reads one row
    assert total(ops, "weight_bytes") == 2 * (32 * layer + head + 4096 + norms)
    made = decode_time(served, Roof(FAST), 1, 0)
    assert 148.4 < 1 / made.seconds < 2e12 / (13.4768e9 - 2 * table)
    assert made.limit == "memory bandwidth"
    assert made.bytes / 2e12 == pytest.approx(made.seconds)
    # of 4,096 tokens, 2 GiB of keys and values
    assert cache_read_bytes(served, 1, 4095) == 2 * 32 * 4096 * 4096 * 2 == 2**31


def test_the_score_matrix_of_4096_tokens_is_64_mib() -> None:
    assert score_matrix_bytes(4096, 4096) == 64 * 2**20


def test_a_roof_takes_the_longer_of_moving_and_computing() -> None:
    served, roof = deploy(shape({**LLAMA, "dtype": "float16"})), Roof(FAST)
    ops = step_ops(served, [Work(20, 3)])
    made = step_time(served, roof, [Work(20, 3)])
    expected = 0.0
    for op in ops:
        expected += max(op.bytes / 2e12, op.flops / 3e14)
    assert made.seconds == pytest.approx(expected)
    assert sum(made.by_part.values()) == pytest.approx(made.seconds)
    assert sum(made.shares.values()) == pytest.approx(1)
    assert made.intensity == made.flops / made.bytes
    assert set(made.by_part) == {"embeddings", "attention", "mlp", "cache", "norms", "head"}
    assert json.loads(json.dumps(made.as_dict()))["limit"] == made.limit


class Counting:
    """A timer of another kind: a second an operation, and one a step."""

    def seconds(self, op: Op) -> float:
        return float(op.count)

    def limit(self, op: Op) -> Any:
        return "compute"

    def overhead(self, shape: ModelShape, work: Sequence[Work]) -> float:
        return 1.0


def test_any_timer_will_do() -> None:
    made = step_time(deploy(shape(LLAMA)), Counting(), [Work(3, 1)])
    # a lookup; seven matrices, attention and norms of three layers; the head; overhead
    assert made.seconds == 1 + 3 * (7 + 1 + 1) + 1 + 1
    assert made.shares["overhead"] == 1 / made.seconds


def test_prefill_in_chunks_does_the_same_operations_and_reads_weights_again() -> None:
    served, roof = deploy(shape(MIXED)), Roof(known_hardware("h200"))
    whole, parts = prefill_time(served, roof, 50), prefill_time(served, roof, 50, chunk=16)
    assert (whole.steps, parts.steps) == (1, 4)
    assert whole.flops == parts.flops
    assert parts.bytes > whole.bytes + 3 * 0.9 * weight_bytes(served) * (1 - 97 / 1000)
    rest = prefill_time(served, roof, 50, chunk=16, cached=32)
    assert rest.steps == 2
    expected = [step_time(served, roof, [Work(32, 16, 0)]), step_time(served, roof, [Work(48, 2)])]
    assert rest.seconds == pytest.approx(sum(each.seconds for each in expected))
    for wrong in ({"tokens": 0}, {"tokens": 5, "cached": 5}, {"tokens": 5, "chunk": 0}):
        with pytest.raises(ConfigError, match="there must be a token to compute"):
            prefill_time(served, roof, **wrong)


def test_a_long_prefill_is_limited_by_computing_and_decoding_by_memory() -> None:
    served, roof = deploy(known_model("llama-3.1-8b")), Roof(known_hardware("h100"))
    assert prefill_time(served, roof, 8192).limit == "compute"
    assert decode_time(served, roof, 1, 8192).limit == "memory bandwidth"
    # with many sequences the cache outweighs the weights, and never leaves the memory's roof
    many = decode_time(served, roof, 4096, 8192)
    assert many.by_part["cache"] > many.seconds / 2
    assert many.limit == "memory bandwidth"


@pytest.mark.parametrize("raw", [LLAMA, MOE, LATENT], ids=["llama", "experts", "latent"])
def test_compute_bound_batch_is_the_first_of_a_plain_search(raw: dict[str, Any]) -> None:
    slow = Hardware("slow", "machine", 2**30, 1e9, {"fp32": 5e9}, None, "a test")  # ridge 5
    served = deploy(shape(raw))

    def bound(sequences: int) -> bool:
        ops = [op for op in step_ops(served, decoding(sequences, 9)) if op.what == "linear"]
        moved = sum(op.weight_bytes + op.activation_bytes for op in ops)
        return sum(op.flops for op in ops) / 5e9 >= moved / 1e9

    first = next(n for n in range(1, 1000) if bound(n))
    assert compute_bound_batch(served, slow) == first > 1
    assert all(bound(n) for n in range(first, first + 50))


def test_compute_bound_batch_of_a_matrix_by_hand() -> None:
    """B rows through n x m of 2 bytes each: 2Bnm operations, 2nm + 2B(n + m) bytes."""
    served = deploy(known_model("llama-2-7b"))
    a100 = known_hardware("a100")
    ridge = 312e12 / 2.039e12
    found = compute_bound_batch(served, a100)
    # without activations B would be the ridge; with them 1 / B = 1 / ridge - (1 / n + 1 / m)
    # lies between that of the largest and that of the smallest matrix
    largest = 1 / (1 / ridge - (1 / 4096 + 1 / 32000))
    smallest = 1 / (1 / ridge - (1 / 4096 + 1 / 4096))
    assert found is not None
    assert largest < found < smallest


def test_no_batch_is_compute_bound_where_activations_outweigh_computing() -> None:
    wild = Hardware("wild", "gpu", 2**30, 1e9, {"fp32": 1e12}, None, "a test")  # ridge 1000
    assert compute_bound_batch(deploy(shape(LLAMA)), wild) is None  # at most 2nm / 2(n + m) < 22


def test_weights_by_part() -> None:
    made = stored_bits(shape(LLAMA), "int4")
    assert (made["mlp"], made["head"], made["embeddings"], made["norms"]) == (4, 16, 16, 16)
    assert stored_bits(shape(LLAMA), "fp32")["head"] == 32
    assert stored_bits(known_model("gpt-oss-20b"))["experts"] == Fraction(17, 4)
    with pytest.raises(ConfigError, match="did you mean 'mxfp4'"):
        stored_bits(shape(LLAMA), "mxfp5")


@pytest.mark.parametrize(("context", "new", "logits"), [(-1, 1, 1), (0, 0, 0), (3, 2, 3)])
def test_work_that_cannot_be(context: int, new: int, logits: int) -> None:
    with pytest.raises(ConfigError, match="a step cannot add"):
        Work(context, new, logits)
    with pytest.raises(ConfigError, match="not 0"):
        decoding(0, 5)
