"""Tokenizers, chat templates, and text that comes piece by piece."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from quire.errors import CheckpointError, RequestError
from quire.models.text import StreamDecoder, TextCodec, load_text_codec

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It isn't far, is it?",
    "naïve café, coöperate, Übermut, Ελληνικά, Привет, мир!",
    "你好,世界。こんにちは世界。안녕하세요 세계",
    "emoji 🙂🙃 👩‍👩‍👧‍👦 🇩🇪 👍🏽 and math ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
    "    indented\n\tcode():\r\n        return 42  # ok",
]
SPECIAL = ["<s>", "</s>", "<unk>"]
HELLO = "Hello, 世界 🙂"


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@cache
def byte_level() -> Tokenizer:
    """As of GPT-2, Llama 3 and Qwen: every token is a string of bytes, often half a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return with_bos(tokenizer)


@cache
def metaspace() -> Tokenizer:
    """As of Llama 2 and Mistral: a mark for each space, bytes for what has no token."""
    letters = sorted({c for c in "".join(CORPUS[:2]) if c.isalpha() and ord(c) < 0x250})
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", "▁▁", *letters, *".,?!'()", "▁th", "th", "he", "▁he", "il", "in"]:
        vocab.setdefault(token, len(vocab))
    merges = [("▁", "▁"), ("t", "h"), ("▁", "th"), ("h", "e"), ("▁", "he"), ("i", "l"), ("i", "n")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return with_bos(tokenizer)


@cache
def word_piece() -> Tokenizer:
    """As of BERT: a token's text depends on whether one stands before it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "metaspace": metaspace,
    "word piece": word_piece,
}


def codec(tokenizer: Tokenizer, template: str | None = None, **special: str) -> TextCodec:
    return TextCodec(tokenizer, template, special)


def pieces(text: TextCodec, ids: list[int]) -> list[str]:
    """What a stream gives for ``ids``, what it flushes last."""
    stream = StreamDecoder(text)
    return [*(stream.push(token) for token in ids), stream.flush()]


def save(directory: Path, tokenizer: Tokenizer, **settings: Any) -> TextCodec:
    """Write a tokenizer with its settings and load it as a checkpoint's."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_text_codec(directory)
    assert loaded is not None
    return loaded


# -- piece by piece ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*CORPUS, " ".join(CORPUS), HELLO, " ", "a", "\n\n", "🙂"])
def test_pieces_join_to_the_whole_text(kind: str, text: str) -> None:
    words = codec(KINDS[kind]())
    ids = words.encode(text)
    given = pieces(words, ids)
    assert "".join(given) == words.decode(ids)
    assert not any("\ufffd" in piece for piece in given)
    assert given[-1] == ""


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd\u2581"), max_size=30))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_comes_back_and_never_half_a_character(kind: str, text: str) -> None:
    words = codec(KINDS[kind]())
    given = pieces(words, words.encode(text))
    assert "".join(given) == text
    assert not any("\ufffd" in piece for piece in given)


@given(ids=st.lists(st.integers(0, 319), max_size=40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pieces_of_any_byte_level_tokens_join_to_their_decoding(ids: list[int]) -> None:
    """Also of tokens that are no text at all: then both have the same U+FFFD."""
    words = codec(byte_level())
    ids = [token % words.vocab_size for token in ids]
    assert "".join(pieces(words, ids)) == words.decode(ids)


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_pieces_of_any_words_join_to_their_decoding(data: st.DataObject) -> None:
    words = codec(word_piece())
    ids = data.draw(st.lists(st.integers(0, words.vocab_size - 1), max_size=20))
    assert "".join(pieces(words, ids)) == words.decode(ids)


@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_run_of_tokens_without_text_makes_the_next_one_slower(
    data: st.DataObject, kind: str
) -> None:
    """Bytes that are never a character, and special tokens, hundreds of them, between words.

    Words end with a letter, and no byte begins a character: bytes that follow bytes change how
    those before them decode (of byte tokens that make no text together, each is U+FFFD).
    """
    tokenizer = KINDS[kind]()
    words = codec(tokenizer)
    word = words.encode("th", add_special_tokens=False)
    begin = {tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(0xC2, 0xF5)}
    empty = [
        token
        for token in range(words.vocab_size)
        if words.decode([*word, token]) in ("th", "th\ufffd") and token not in begin
    ]
    ids: list[int] = []
    for _ in range(4):
        text = data.draw(st.sampled_from(CORPUS)) + " th"
        ids += words.encode(text, add_special_tokens=False)
        some = data.draw(st.lists(st.sampled_from(empty), min_size=1, max_size=3))
        ids += some * data.draw(st.integers(1, 100))
    watched = Watched(words)
    assert "".join(pieces(watched, ids)) == words.decode(ids)
    assert watched.longest < 80


class Watched(TextCodec):
    """Remembers how many tokens were decoded at once, at most."""

    def __init__(self, words: TextCodec) -> None:
        vars(self).update(vars(words))
        self.longest = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return super().decode(ids)


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    words = codec(byte_level())
    ids = words.encode("\U0001f9ff", add_special_tokens=False)
    assert len(ids) > 1, "a character that the tokenizer has not learnt"
    stream = StreamDecoder(words)
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1]) == "\U0001f9ff"
    assert stream.flush() == ""


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_flush_gives_an_unfinished_character_as_replacement(kind: str) -> None:
    words = codec(KINDS[kind]())
    ids = words.encode("a\U0001f9ff")
    stream = StreamDecoder(words)
    given = [stream.push(token) for token in ids[:-1]]
    assert "".join(given) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_a_stream_goes_on_after_a_flush() -> None:
    words = codec(byte_level())
    stream = StreamDecoder(words)
    for token in words.encode("one "):
        stream.push(token)
    stream.flush()
    assert "".join(stream.push(token) for token in words.encode("two")) == "two"


def test_spaces_between_words_are_kept_in_pieces() -> None:
    words = codec(metaspace())
    ids = words.encode("the hen in  the  ", add_special_tokens=False)
    assert "".join(pieces(words, ids)) == "the hen in  the  "


def test_special_tokens_give_no_text() -> None:
    words = codec(byte_level())
    ids = [0, *words.encode("ab"), 1, *words.encode("c"), 1]
    assert "".join(pieces(words, ids)) == "abc"
    assert words.token(1) == "</s>"


# -- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte level", "metaspace"])
def test_the_tokenizer_itself_adds_the_bos_token(tmp_path: Path, kind: str) -> None:
    words = save(tmp_path, KINDS[kind]())
    ids = words.encode(HELLO)
    assert ids[0] == 0
    assert ids[1:] == words.encode(HELLO, add_special_tokens=False)
    assert 0 not in ids[1:]
    assert words.decode(ids) == HELLO


def test_no_bos_token_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    words = save(tmp_path, word_piece(), bos_token="<s>")
    assert 0 not in words.encode("The dog")


def test_the_vocabulary_counts_added_tokens() -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    before = codec(tokenizer).vocab_size
    tokenizer.add_special_tokens(["<|new|>"])
    assert codec(tokenizer).vocab_size == before + 1


@pytest.mark.parametrize("text", ["\ud83d", "ab\udcffcd", "\ude42\ud83d"])
def test_lone_surrogates_are_refused_with_their_place(text: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate") as caught:
        codec(byte_level()).encode(text)
    first = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    assert f"character {first} " in str(caught.value)


def test_a_prompt_is_never_cut_or_padded(tmp_path: Path) -> None:
    """tokenizer.json may say how its training data were cut and padded; prompts are neither."""
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    whole = tokenizer.encode(CORPUS[0]).ids
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=1024, pad_id=2, pad_token="<unk>")
    words = save(tmp_path, tokenizer)
    assert words.encode(CORPUS[0]) == whole
    assert len(words.encode("a")) == 2


# -- chat templates ------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi <b>&amp; 'you' 🙂"},
    {"role": "assistant", "content": "Yes"},
]
SAID = "<s><|user|>Hi <b>&amp; 'you' 🙂</s><|assistant|>Yes</s><|assistant|>"


@pytest.mark.parametrize("place", ["text", "list", "file", "file and text"])
def test_a_chat_template_from_each_of_its_places(tmp_path: Path, place: str) -> None:
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    if place == "text":
        settings["chat_template"] = CHAT
    if place == "list":
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}]
        settings["chat_template"] = named
    if place.startswith("file"):
        (tmp_path / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    if place == "file and text":
        settings["chat_template"] = "the file wins"
    assert save(tmp_path, byte_level(), **settings).render_chat(TALK) == SAID


@pytest.mark.parametrize("template", [None, [], [{"name": "rag", "template": "x"}]])
def test_no_chat_template_is_a_refusal(tmp_path: Path, template: Any) -> None:
    words = save(tmp_path, byte_level(), chat_template=template)
    with pytest.raises(RequestError, match="no chat template"):
        words.render_chat(TALK)


@pytest.mark.parametrize("template", [["x"], [None], [{"name": ["default"]}], 3, {"default": CHAT}])
def test_a_chat_template_of_a_kind_that_does_not_exist_is_refused(
    tmp_path: Path, template: Any
) -> None:
    with pytest.raises((CheckpointError, RequestError), match=r"chat.template"):
        save(tmp_path, byte_level(), chat_template=template).render_chat(TALK)


def test_blocks_leave_no_blank_lines() -> None:
    template = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert codec(byte_level(), template).render_chat(talk) == "a\nb\n"


def test_a_template_may_leave_a_loop() -> None:
    """transformers gives templates ``break`` and ``continue``, and published ones use them."""
    template = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert codec(byte_level(), template).render_chat(talk) == "a"


def test_tojson_writes_json_and_not_html() -> None:
    """As in transformers. Jinja's own filter writes < as an escape, and the model would see it."""
    words = codec(byte_level(), "{{ messages[0].content | tojson }}")
    assert words.render_chat(TALK) == json.dumps(TALK[0]["content"], ensure_ascii=False)


def test_raise_exception_refuses_with_the_templates_words() -> None:
    template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first!') }}{% endif %}"
    )
    with pytest.raises(RequestError, match="system first!"):
        codec(byte_level(), template).render_chat(TALK)


def test_strftime_now_gives_the_year() -> None:
    year = codec(byte_level(), "{{ strftime_now('%Y') }}").render_chat(TALK)
    assert year.isdigit()
    assert len(year) == 4


ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "init": "{{ strftime_now.__init__.__globals__ }}",
    "attr filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "indirect format": "{{ ['{0.__class__.__mro__}']|map('format', '')|first }}",
    "self": "{{ self.__init__.__globals__.__builtins__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/hostname' %}",
    "mutation": "{% set x = messages.append(1) %}{{ messages }}",
    "item mutation": "{% set x = messages[0].update({'role': 'system'}) %}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(escape: str) -> None:
    talk = [dict(message) for message in TALK]
    try:
        rendered = codec(byte_level(), ESCAPES[escape]).render_chat(talk)
    except RequestError:
        rendered = ""
    assert "class" not in rendered
    assert "module" not in rendered
    assert talk == TALK


@pytest.mark.parametrize("escape", ["classes", "globals", "init", "format", "mutation", "include"])
def test_an_escape_is_refused_as_a_bad_request(escape: str) -> None:
    with pytest.raises(RequestError, match="chat template failed"):
        codec(byte_level(), ESCAPES[escape]).render_chat([dict(message) for message in TALK])


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages | nothing }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.nothing.at_all }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0].content.index('zz') }}",
        "{{ 'x'.encode('utf-9') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_a_refusal_and_no_traceback(template: str) -> None:
    with pytest.raises(RequestError, match="chat template failed"):
        codec(byte_level(), template).render_chat(TALK)


# -- files ---------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_text_codec(tmp_path) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "vocab.txt"])
def test_an_old_tokenizer_alone_is_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="save_pretrained") as caught:
        load_text_codec(tmp_path)
    assert f"{name} but no tokenizer.json" in str(caught.value)


def test_an_old_tokenizer_beside_the_new_one_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"old")
    save(tmp_path, byte_level())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"\0" * 100]
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_text_codec(tmp_path)


def test_flipped_bits_in_a_tokenizer_never_give_another_exception(tmp_path: Path) -> None:
    raw = byte_level().to_str().encode()
    rng = np.random.default_rng(0)
    path, refused = tmp_path / "tokenizer.json", 0
    for trial in range(200):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged[: rng.integers(len(raw))] if trial % 10 == 0 else damaged)
        try:
            load_text_codec(tmp_path)
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_damaged_tokenizer_settings_are_named(tmp_path: Path, content: bytes) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        load_text_codec(tmp_path)


def test_a_chat_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(CheckpointError, match=r"chat.template"):
        load_text_codec(tmp_path)
