"""Logits and greedy continuations of tiny random checkpoints equal those of transformers.

Rules: with fp32 weights every logit is within 1e-4 of transformers' fp32 run, relative to the
largest; with bf16 weights our largest error against transformers' fp32 run of the same weights is
at most twice that of transformers' own bf16 run.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from checkpoints import (
    MIXED_WINDOWS,
    Config,
    tiny_config,
    write_checkpoint,
    write_with_transformers,
)
from quire import CacheConfig, Engine, SamplingParams
from quire.architectures import model_config
from quire.backends import backend_status
from quire.backends.rope import inverse_frequencies
from quire.config import RopeConfig
from quire.errors import CheckpointError, UnsupportedArchitecture
from quire.models.text import TextCodec
from turning import turn_all_keys

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Logits = npt.NDArray[np.float32]

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so that all three bands are there at head_dim 8
    "rope_theta": 10_000.0,
}


def heads(query: int, kv: int, dim: int = 8) -> Config:
    """Keys for so many heads."""
    return {
        "hidden_size": query * dim,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "head_dim": dim,
    }


MODELS: dict[str, Config] = {
    "llama MHA": tiny_config("llama", **heads(4, 4)),
    "llama GQA": tiny_config("llama"),
    "llama MQA": tiny_config("llama", **heads(4, 1)),
    "llama 6 and 3 heads": tiny_config("llama", **heads(6, 3)),
    "llama 5 heads and 1": tiny_config("llama", **heads(5, 1)),
    "llama 3 heads": tiny_config("llama", **heads(3, 3, 10)),
    "llama wide heads": tiny_config("llama", head_dim=20),
    "llama tied": tiny_config("llama", tie_word_embeddings=True),
    "llama attention bias": tiny_config("llama", attention_bias=True),
    "llama mlp bias": tiny_config("llama", mlp_bias=True),
    "llama gelu": tiny_config("llama", hidden_act="gelu"),
    "llama rope theta": tiny_config(
        "llama", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}
    ),
    "llama rope linear": tiny_config("llama", rope_parameters=LINEAR),
    "llama rope llama3": tiny_config("llama", rope_parameters=LLAMA3),
    "mistral": tiny_config("mistral"),
    "mistral window": tiny_config("mistral", sliding_window=9),
    "qwen2": tiny_config("qwen2"),
    "qwen2 tied": tiny_config("qwen2", tie_word_embeddings=True),
    "qwen2 mixed windows": tiny_config("qwen2", **MIXED_WINDOWS),
    "qwen3": tiny_config("qwen3"),
    "qwen3 bias": tiny_config("qwen3", attention_bias=True, head_dim=14),
    "qwen3 mixed windows": tiny_config("qwen3", **MIXED_WINDOWS),
    "gpt2": tiny_config("gpt2"),
    "gpt2 untied": tiny_config("gpt2", tie_word_embeddings=False, n_inner=72),
    "gpt2 gelu": tiny_config("gpt2", activation_function="gelu"),
}

# These see every chunk and page size; the others two combinations that differ in both.
THOROUGH = ("llama GQA", "mistral window", "qwen2 mixed windows")
PAGE_SIZES: tuple[Any, ...] = (1, 3, 16, 64, "whole")
BUDGETS = (5, 16, 512)
CORNERS = ((16, 3), (512, 64))
GRID = [
    *((name, budget, size) for name in THOROUGH for budget in BUDGETS for size in PAGE_SIZES),
    *((name, budget, size) for name in MODELS if name not in THOROUGH for budget, size in CORNERS),
]

every_model = pytest.mark.parametrize("name", MODELS)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 97, length).tolist()


def prompts(name: str) -> list[list[int]]:
    """Of different lengths, so that a batch is ragged; fewer for the less thorough."""
    lengths = (23, 1, 40, 8) if name in THOROUGH else (1, 40)
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


class Models:
    """Checkpoints on disk and what transformers makes of them, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._greedy: dict[str, list[tuple[int, ...]]] = {}

    def directory(self, name: str, dtype: str = "fp32") -> Path:
        path = self.root / dtype / name.replace(" ", "-")
        return path if path.exists() else write_with_transformers(path, MODELS[name], dtype=dtype)

    def theirs(self, name: str, stored: str, run: str) -> Any:
        """transformers' model of a checkpoint in dtype ``stored``, run in dtype ``run``."""
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.directory(name, stored), dtype=kinds[run], attn_implementation="eager"
        )
        return model.eval()

    def greedy(self, name: str) -> list[tuple[int, ...]]:
        """64 tokens after each of its prompts, as transformers continues it alone in fp32."""
        if name not in self._greedy:
            model = self.theirs(name, "fp32", "fp32")
            self._greedy[name] = [
                tuple(
                    model.generate(
                        torch.tensor([tokens]),
                        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                        do_sample=False,
                        max_new_tokens=64,
                        eos_token_id=None,
                        pad_token_id=0,
                    )[0, len(tokens) :].tolist()
                )
                for tokens in prompts(name)
            ]
        return self._greedy[name]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("parity"))


def config_of(config: Config) -> Any:
    """transformers' config; a copy goes in, because transformers fills in rope parameters."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(config))


def logits_of(model: Any, tokens: list[int]) -> Logits:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


EngineOf = Callable[..., Engine]


@pytest.fixture(params=[s.name for s in backend_status() if s.available])
def engine_of(request: pytest.FixtureRequest) -> EngineOf:
    """Makes engines on each backend that is available here, in turn."""

    def make(directory: Path, page_size: Any = 16, max_batch_tokens: int = 512) -> Engine:
        cache = CacheConfig(page_size=page_size, kv_memory="8MiB")
        return Engine(
            directory, backend=request.param, cache=cache, max_batch_tokens=max_batch_tokens
        )

    return make


# -- logits --------------------------------------------------------------------------------------


@every_model
def test_logits_in_fp32_are_within_1e_4(models: Models, engine_of: EngineOf, name: str) -> None:
    tokens = prompt(60, seed=7)
    theirs = logits_of(models.theirs(name, "fp32", "fp32"), tokens)
    assert np.ptp(theirs, axis=1).min() > 1, "logits so flat prove nothing"
    ours = engine_of(models.directory(name)).logits(tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@every_model
def test_logits_in_fp32_are_within_1e_4_with_keys_and_queries_rotated(
    models: Models, engine_of: EngineOf, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation itself loses nothing: pages are fp32."""
    tokens = prompt(60, seed=7)
    theirs = logits_of(models.theirs(name, "fp32", "fp32"), tokens)
    turn_all_keys(monkeypatch)
    engine = engine_of(models.directory(name))
    assert all(shape.rotated for shape in engine.cache.layout.shapes)
    assert np.abs(engine.logits(tokens) - theirs).max() <= 1e-4 * np.abs(theirs).max()


@every_model
def test_logits_of_bf16_weights_err_at_most_twice_as_much_as_theirs(
    models: Models, engine_of: EngineOf, name: str
) -> None:
    tokens = prompt(60, seed=8)
    exact = logits_of(models.theirs(name, "bf16", "fp32"), tokens)
    theirs = logits_of(models.theirs(name, "bf16", "bf16"), tokens)
    engine = engine_of(models.directory(name, "bf16"))
    assert engine.cache.layout.format_text == "bf16"
    ours = engine.logits(tokens)
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max()


@pytest.mark.parametrize("name", ["llama GQA", "qwen3", "gpt2"])
def test_logits_of_fp16_weights_err_at_most_twice_as_much_as_theirs_in_bf16(
    models: Models, engine_of: EngineOf, name: str
) -> None:
    """fp16 keeps three bits more than bf16, so the bf16 rule is a lenient one here."""
    tokens = prompt(60, seed=9)
    directory = models.directory(name, "fp16")
    kind = transformers.AutoModelForCausalLM
    exact, narrow = (
        kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    ours = engine_of(directory).logits(tokens)
    error = np.abs(logits_of(narrow, tokens) - logits_of(exact, tokens)).max()
    assert np.abs(ours - logits_of(exact, tokens)).max() <= 2 * error


@pytest.mark.parametrize("name", ["llama GQA", "qwen2 mixed windows", "gpt2"])
def test_a_sharded_checkpoint_of_transformers_loads(
    models: Models, engine_of: EngineOf, tmp_path: Path, name: str
) -> None:
    model = models.theirs(name, "fp32", "fp32")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    tokens = prompt(20, seed=10)
    whole, sharded = engine_of(models.directory(name)), engine_of(tmp_path)
    assert np.array_equal(sharded.logits(tokens), whole.logits(tokens))


# -- greedy continuations ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "budget", "page_size"), GRID)
def test_64_greedy_tokens_of_a_batch_are_theirs(
    models: Models, engine_of: EngineOf, name: str, budget: int, page_size: Any
) -> None:
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    engine = engine_of(models.directory(name), page_size, budget)
    ours = [done.token_ids for done in engine.generate(prompts(name), params)]
    assert ours == models.greedy(name)


@pytest.mark.parametrize("name", THOROUGH)
def test_64_greedy_tokens_of_a_prompt_alone_are_theirs(
    models: Models, engine_of: EngineOf, name: str
) -> None:
    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    engine = engine_of(models.directory(name))
    for tokens, theirs in zip(prompts(name), models.greedy(name), strict=True):
        assert engine.generate([tokens], params)[0].token_ids == theirs


@every_model
def test_continuations_are_worth_comparing(models: Models, name: str) -> None:
    """A model that repeats one token would agree by accident."""
    assert len({token for tokens in models.greedy(name) for token in tokens}) >= 10
    assert len(set(models.greedy(name))) == len(prompts(name))


# -- config --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize(
    "rope",
    [
        LINEAR,
        LLAMA3,
        LLAMA3 | {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
        LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0, "factor": 32.0},
    ],
    ids=["linear", "llama3", "llama 3.1", "other factors"],
)
def test_rope_frequencies_are_theirs(rope: Config, dim: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config("llama", **heads(4, 2, dim), rope_parameters=rope)
    theirs, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](
        config_of(config), device=torch.device("cpu")
    )
    settings = model_config(config).rope
    assert settings is not None
    ours = inverse_frequencies(settings, dim)
    assert factor == 1
    # A dozen roundings at 2**-24 each, and an exponent whose own one grows by ln(theta) < 14.
    assert np.abs(ours / theirs.numpy() - 1).max() <= (12 + 14) * 2**-24


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_default_rope_frequencies_are_theirs(theta: float, dim: int) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": theta}
    config = tiny_config("llama", **heads(4, 2, dim), rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config_of(config)).inv_freq.numpy()
    ours = inverse_frequencies(RopeConfig(theta=theta), dim)
    assert np.abs(ours / theirs - 1).max() <= (4 + 14) * 2**-24


OPTIONAL = {
    "llama": ("num_key_value_heads", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "mistral": ("sliding_window", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "qwen2": ("use_sliding_window", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "qwen3": ("use_sliding_window", "rms_norm_eps", "hidden_act", "head_dim"),
    "gpt2": ("n_inner", "layer_norm_epsilon", "activation_function", "tie_word_embeddings"),
}


def assert_refused_or_equal(short: Config, spelled_out: Config) -> None:
    """What Quire makes of a config with a key left out, beside transformers' value for it."""
    try:
        ours = model_config(short)
    except CheckpointError:
        return
    assert ours == model_config(spelled_out)


@pytest.mark.parametrize(
    ("model_type", "key"), [(kind, key) for kind, keys in OPTIONAL.items() for key in keys]
)
def test_an_absent_key_means_what_it_means_to_transformers(model_type: str, key: str) -> None:
    config = tiny_config(model_type)
    del config[key]
    assert_refused_or_equal(config, {**config, key: config_of(config).to_dict()[key]})


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_sliding_window_that_is_not_given_is_refused_or_theirs(model_type: str) -> None:
    config = tiny_config(model_type, use_sliding_window=True, max_window_layers=1)
    window = config_of(config).to_dict()["sliding_window"]
    assert_refused_or_equal(config, {**config, "sliding_window": window})


@pytest.mark.parametrize("key", ["rope_theta", "original_max_position_embeddings"])
def test_llama3_rope_without_one_of_its_numbers_is_refused_or_theirs(key: str) -> None:
    rope = {name: value for name, value in LLAMA3.items() if name != key}
    config = tiny_config("llama", rope_parameters=rope)
    theirs = config_of(config).to_dict()["rope_parameters"]
    assert_refused_or_equal(config, {**config, "rope_parameters": theirs})


def test_layer_types_of_a_llama_are_refused_or_without_effect(
    tmp_path: Path, engine_of: EngineOf
) -> None:
    """transformers' Llama has no windows, so layer_types must not change our logits unsaid."""
    extra = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}
    write_checkpoint(tmp_path, tiny_config("llama", **extra))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = prompt(40, seed=12)
    theirs = logits_of(model.eval(), tokens)
    try:
        ours = engine_of(tmp_path).logits(tokens)
    except UnsupportedArchitecture:
        return
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name", ["llama rope llama3", "mistral window", "qwen2 mixed windows", "qwen3", "gpt2"]
)
def test_nothing_that_transformers_writes_is_unknown(
    models: Models, engine_of: EngineOf, name: str
) -> None:
    assert engine_of(models.directory(name)).model_config.ignored_keys == ()


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_the_old_spelling_of_rope_scaling_gives_the_same_logits(
    tmp_path: Path, engine_of: EngineOf, scaling: Config, spelling: str
) -> None:
    """transformers itself reads the old spelling, so it is the judge."""
    old = {key: value for key, value in scaling.items() if not key.startswith("rope")}
    config = tiny_config("llama", rope_theta=10_000.0)
    config["rope_scaling"] = {spelling: scaling["rope_type"], **old}
    write_checkpoint(tmp_path, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = prompt(60, seed=11)
    theirs = logits_of(model.eval(), tokens)
    ours = engine_of(tmp_path).logits(tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


# -- chat templates ------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be <b>brief</b> & 'kind' 🙂"},
    {"role": "user", "content": "  Hi\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama": (
        "{{- bos_token }}{% set loop_messages = messages[1:] %}"
        "{% for message in loop_messages %}{% if loop.index0 == 0 %}{{ messages[0].content }}"
        "{% endif %}{{ '[' ~ message.role ~ '] ' ~ message.content | trim ~ eos_token }}"
        "{% endfor %}{%- if tools is defined and tools %}tools{% endif %}"
    ),
    "json": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "json options": (
        "{{ messages | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation block": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}"
        "{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}"
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates_render_as_in_transformers(kind: str) -> None:
    from tokenizers import Tokenizer, models

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wanted = theirs.apply_chat_template(
        TALK, chat_template=TEMPLATES[kind], tokenize=False, add_generation_prompt=True
    )
    assert TextCodec(tokenizer, TEMPLATES[kind], special).render_chat(TALK) == wanted
