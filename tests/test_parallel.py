"""Splits over devices: what each holds and sends, by hand, and splits that cannot be."""

import json
from typing import Any

import pytest

from quire.analysis.catalogue import MODELS, known_model
from quire.analysis.families import shape_of
from quire.analysis.hardware import known_hardware
from quire.analysis.parallel import Split, split, split_time
from quire.analysis.roofline import Roof, decode_time, decoding
from quire.analysis.shape import Matrix, ModelShape
from quire.analysis.steps import Work, deploy, step_ops, weight_bytes
from quire.errors import ConfigError
from test_roofline import LATENT, LLAMA, MOE

H100 = known_hardware("h100")


def made(raw: dict[str, Any], tensor: int = 1, pipeline: int = 1) -> Split:
    return split(deploy(shape_of(raw, "tiny", "a test")), tensor, pipeline)


def test_two_devices_a_layer_by_hand() -> None:
    """Hidden 32, 4 heads of 8, 2 KV heads, MLP 44, vocabulary 97: each matrix is halved."""
    [stage] = made(LLAMA, 2).stages
    attention = 32 * 16 + 2 * 32 * 8 + 16 * 32
    mlp = 3 * 32 * 22
    norms = 3 * 2 * 32 + 32
    tables = 2 * 49 * 32  # 97 rows padded to 98
    assert stage.weight_bytes == 2 * (3 * (attention + mlp) + norms + tables)
    assert stage.kv_token_bytes == 3 * (8 + 8) * 2
    [layer] = stage.share.shape.layer_kinds
    assert (layer.num_heads, layer.kv.num_kv_heads) == (2, 1)


def test_kv_heads_fewer_than_devices_are_held_by_several() -> None:
    parted = made(LLAMA, 4)
    assert parted.stages[0].kv_token_bytes == 3 * (8 + 8) * 2
    assert "each of 2 KV heads is kept by 2 devices" in parted.notes
    assert any("padded" in note for note in parted.notes)


def test_latents_are_held_by_all_and_compressed_by_all() -> None:
    whole, [stage] = deploy(shape_of(LATENT, "tiny", "a test")), made(LATENT, 2).stages
    assert stage.kv_token_bytes == 3 * (16 + 4) * 2
    dense = stage.share.shape.layers[0].matrices
    sizes = [(m.inputs, m.outputs) for m in dense if m.part == "attention"]
    assert sizes == [(32, 12), (12, 24), (32, 20), (16, 28), (12, 32)]
    assert weight_bytes(whole) / 2 < stage.weight_bytes < 0.7 * weight_bytes(whole)
    assert "latents are kept whole on every device of a stage" in made(LATENT, 2).notes


def test_all_devices_have_the_router_and_a_part_of_every_expert() -> None:
    [stage] = made(MOE, 2).stages
    experts = [m for m in stage.share.shape.layers[0].matrices if m.part == "experts"]
    assert [(m.inputs, m.outputs, m.copies) for m in experts] == [
        (32, 6, 1),
        (32, 10, 6),
        (32, 10, 6),
        (10, 32, 6),
    ]


def on_both(shape: ModelShape) -> list[tuple[Matrix, int]]:
    """Matrices that each of two devices has whole, and how many layers have them."""
    found = []
    for layer, count in shape.layer_kinds.items():
        attention = [m for m in layer.matrices if m.part == "attention"]
        if layer.prefill_dims:  # those that compress
            narrow = [m for m in attention if m.inputs == shape.hidden_size > m.outputs]
        else:  # of keys and values, if one head has them all
            narrow = attention[1:3] if layer.kv.num_kv_heads == 1 else []
        routers = [m for m in layer.matrices if m.part == "experts" and m.copies == 1]
        gates = [m for m in layer.matrices if m.outputs == 1]
        found += [(m, count) for m in (*narrow, *routers, *gates)]
    return found


@pytest.mark.parametrize("name", sorted(MODELS))
def test_two_devices_a_layer_do_and_hold_together_what_one_does(name: str) -> None:
    """And once more what both have whole: routers, compressions, a row of padding."""
    served = deploy(known_model(name))
    shape, hidden = served.shape, served.shape.hidden_size
    if shape.layers[0].num_heads % 2:
        pytest.skip(f"{shape.layers[0].num_heads} heads cannot be divided by two")
    work = [Work(500, 1)] * 3 + [Work(64, 32)]
    parted, padding = split(served, 2, 2), shape.vocab_size % 2
    again = sum(35 * m.flops * count for m, count in on_both(shape)) + 4 * 2 * hidden * padding
    done = sum(op.flops for stage in parted.stages for op in stage.ops(work))
    assert 2 * done == sum(op.flops for op in step_ops(served, work)) + again
    twice = sum(m.numbers * count for m, count in on_both(shape)) + shape.numbers["norms"]
    twice += sum(m.copies * m.outputs * m.bias * count for m, count in shape.matrices())
    twice += (shape.positions + 2 * padding) * hidden
    tables = shape.numbers["embeddings"] if shape.tied else 0  # the head of the last stage
    least = weight_bytes(served) + float(tables * served.weight_bits["embeddings"] / 8)
    held = 2 * sum(stage.weight_bytes for stage in parted.stages)
    width = float(max(served.weight_bits.values()) / 8)
    more = width * (twice + (2 * (padding + shape.positions) * hidden if shape.tied else 0))
    assert least * (1 - 1e-12) <= held <= (least + more) * (1 + 1e-12)


def test_stages_of_a_pipeline_hold_the_model_once() -> None:
    served = deploy(shape_of(LLAMA, "tiny", "a test"))
    for stages in (1, 2, 3):
        parted = split(served, pipeline=stages)
        assert sum(stage.weight_bytes for stage in parted.stages) == weight_bytes(served)
        assert sum(stage.kv_token_bytes for stage in parted.stages) == 3 * 2 * (8 + 8) * 2
        done = [op for stage in parted.stages for op in stage.ops([Work(9, 4)])]
        expected = step_ops(served, [Work(9, 4)])
        for field in ("flops", "weight_bytes", "kv_bytes", "activation_bytes"):
            assert sum(getattr(op, field) for op in done) == sum(
                getattr(op, field) for op in expected
            )
    assert [len(s.share.shape.layers) for s in split(served, pipeline=2).stages] == [1, 2]


def test_what_two_devices_send_by_hand() -> None:
    """Llama 2 7B: hidden states of 8 KiB; of two devices each sends half of twice that."""
    parted = split(deploy(known_model("llama-2-7b")), tensor=2)
    assert parted.sent([Work(100, 1)]) == {
        "layers": 32 * 2 * 8192,
        "embeddings": 8192,
        "logits": 32000 * 2 / 2,
        "stages": 0,
    }
    sent = 32 * 2 * 8192 + 8192 + 32000
    timed = split_time(parted, Roof(H100), [Work(100, 1)], H100.link_bandwidth)
    assert timed.link_seconds == pytest.approx(sent / 450e9)
    assert timed.seconds == pytest.approx(timed.stages[0].seconds + sent / 450e9)
    four = split(deploy(known_model("llama-2-7b")), tensor=4, pipeline=2)
    assert four.sent([Work(7, 5, 0)]) == {
        "layers": 5 * 32 * 2 * 2 * 3 / 4 * 8192,
        "embeddings": 5 * 2 * 3 / 4 * 8192,
        "logits": 0,
        "stages": 5 * 8192,
    }


def test_one_device_sends_nothing_and_takes_the_time_of_one() -> None:
    served = deploy(known_model("llama-3.1-8b"))
    timed = split_time(split(served), Roof(H100), decoding(4, 1000), None)
    assert timed.seconds == decode_time(served, Roof(H100), 4, 1000).seconds
    assert timed.busiest_stage_seconds == timed.seconds
    json.dumps(timed.as_dict())
    json.dumps(split(served, 2, 2).as_dict())


def test_tensor_parallelism_shortens_a_step_and_a_pipeline_does_not() -> None:
    served, work = deploy(known_model("llama-3.1-70b")), decoding(8, 2000)
    one = split_time(split(served), Roof(H100), work, 450e9).seconds
    eight = split_time(split(served, tensor=8), Roof(H100), work, 450e9)
    assert one / 8 < eight.seconds < one / 7
    staged = split_time(split(served, pipeline=8), Roof(H100), work, 450e9)
    assert staged.seconds > one
    assert one / 8 < staged.busiest_stage_seconds < one / 6


def test_splits_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="4 query heads, which 3 devices cannot divide evenly"):
        made(LLAMA, 3)
    with pytest.raises(ConfigError, match="3 layers, too few for 4 stages"):
        made(LLAMA, 1, 4)
    with pytest.raises(ConfigError, match="0 x 1 devices cannot be"):
        made(LLAMA, 0)
    six = {**LLAMA, "num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48}
    with pytest.raises(ConfigError, match="6 KV heads, which 4 devices can neither divide nor"):
        made(six, 4)
    with pytest.raises(ConfigError, match="a matrix of 45 outputs"):
        made({**LLAMA, "intermediate_size": 45}, 2)
    with pytest.raises(ConfigError, match="no bandwidth of a link between them is known"):
        split_time(made(LLAMA, 2), Roof(H100), [Work(0, 1)], None)
