"""Text in and out: the checkpoint's tokenizer, its chat template, and decoding piece by piece."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from quire.architectures import read_json
from quire.errors import CheckpointError, RequestError

__all__ = ["StreamDecoder", "TextCodec", "load_text_codec"]

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not yet a character
_LONGEST, _KEPT = 32, 4  # tokens that are decoded again and again; of them, those behind which
# a character may still be unfinished: it has four bytes at most


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str | None, special: Mapping[str, str]
    ) -> None:
        tokenizer.no_truncation()  # a prompt is never cut or filled up in silence
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}  # what single tokens decode to; streams ask for each
        self._template = chat_template
        self._special = dict(special)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with the BOS token where the checkpoint's tokenizer adds one.

        Raises RequestError for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt is not valid text: character {error.start} is a lone surrogate "
                "(the input was probably not UTF-8)"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens; unfinished characters become U+FFFD."""
        if len(ids) != 1:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        text = self._alone.get(ids[0])
        if text is None:
            text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
            self._alone[ids[0]] = text
        return text

    def token(self, token_id: int) -> str:
        """One token as text, special or not."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def vocabulary(self) -> dict[str, int]:
        """Token ids by how the tokenizer spells each token."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text for ``messages`` (``role`` and ``content``), ready for a reply.

        Raises RequestError if the checkpoint has no chat template or the template refuses.
        """
        if self._template is None:
            raise RequestError(
                "this checkpoint has no chat template; use generate with a prompt instead"
            )
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        env.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
        env.filters["tojson"] = _to_json
        try:
            return env.from_string(self._template).render(
                messages=list(messages), add_generation_prompt=True, **self._special
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(f"the checkpoint's chat template failed: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers writes it; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}`` marks replies for training; here, its body."""

    tags = {"generation"}  # noqa: RUF012  (the name and form that Jinja asks for)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class StreamDecoder:
    """Token ids one at a time to text, never half a character.

    Decodes a short tail of the ids twice, with and without the newest, because a tokenizer's text
    for a token may depend on the tokens before it.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tail: list[int] = []  # the ids that are decoded again
        self._settled = 0  # how many of them had their text given out, which is:
        self._before = ""

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is unfinished."""
        self._tail.append(token_id)
        now, before = self._codec.decode(self._tail), self._before
        if now.endswith(_UNFINISHED) or len(now) <= len(before):
            return self._shorten(now) if len(self._tail) >= _LONGEST else ""
        self._tail = self._tail[self._settled :]
        self._settled, self._before = len(self._tail), self._codec.decode(self._tail)
        return now[len(before) :]

    def _shorten(self, now: str) -> str:
        """What is certain of a long tail, which decodes to ``now``: bytes that will never be text,
        or tokens that have none. Else each of them would make the next one slower.
        """
        sure, rest = self._tail[:-_KEPT], self._tail[-_KEPT:]
        if self._settled > len(sure):
            return ""
        if now == self._before:  # what had text stays: a space may depend on it
            text, context = now, self._tail[: self._settled]
        else:
            text, context = self._codec.decode(sure), sure[-_KEPT:]
        before = self._codec.decode(context)
        if text + self._codec.decode([*context, *rest])[len(before) :] != now:
            return ""
        piece = text[len(self._before) :]
        self._tail, self._settled, self._before = [*context, *rest], len(context), before
        return piece

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        rest = self._codec.decode(self._tail)[len(self._before) :]
        self._tail, self._settled, self._before = [], 0, ""
        return rest


def load_text_codec(directory: Path) -> TextCodec | None:
    """The tokenizer of a model directory; None if it has none (the model then serves token ids).

    Raises CheckpointError for a tokenizer that cannot be read or has no ``tokenizer.json``.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        for legacy in ("tokenizer.model", "vocab.json", "vocab.txt"):
            if (directory / legacy).exists():
                raise CheckpointError(
                    f"{directory} has {legacy} but no tokenizer.json; load it once with "
                    "transformers' AutoTokenizer and save_pretrained() it to get one"
                )
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for any damaged file
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    return TextCodec(tokenizer, _chat_template(directory, settings), _special_tokens(settings))


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the chat template {path} cannot be read: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        named = [entry for entry in template if entry.get("name") == "default"]  # of several
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: chat_template must be text, not {template!r}")
    return template


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        if isinstance(value, Mapping):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            found[key] = value
    return found
