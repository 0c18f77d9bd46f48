"""TextStream against a model that decodes and searches the whole text after every token."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.output import TextStream


class BytesCodec:
    """A codec whose token i is ``pieces[i]``; a stand-in for a byte-level tokenizer."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; unfinished and broken characters become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")


def stream_of(pieces: Sequence[bytes], stop: Sequence[str]) -> TextStream:
    return TextStream(BytesCodec(pieces), stop)  # type: ignore[arg-type]


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.index(word), word) for word in stop if word in text]
    return min(found) if found else None


def settled_texts(pieces: Sequence[bytes]) -> list[str]:
    """The whole text after each token, without a character that is still unfinished.

    A tail of U+FFFD may yet become a character; so the text up to the last push that ended
    without one is what can be known.
    """
    texts, known = [], ""
    for count in range(1, len(pieces) + 1):
        now = b"".join(pieces[:count]).decode("utf-8", "replace")
        known = known if now.endswith("\ufffd") else now
        texts.append(known)
    return texts


def expected_end(pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[int, str, str | None]:
    """(tokens pushed, the text, the stop string): what a full search after each token finds."""
    for count, text in enumerate(settled_texts(pieces), start=1):
        found = first_stop(text, stop)
        if found is not None:
            return count, text[: found[0]], found[1]
    text = b"".join(pieces).decode("utf-8", "replace")
    found = first_stop(text, stop)
    cut = text if found is None else text[: found[0]]
    return len(pieces), cut, None if found is None else found[1]


characters = st.sampled_from(["a", "b", "c", "ab", "é", "☃", "🦊", " "])


@st.composite
def token_pieces(draw: st.DrawFn) -> list[bytes]:
    """UTF-8 text cut anywhere, also inside characters, with broken bytes now and then."""
    text = "".join(draw(st.lists(characters, max_size=16))).encode()
    noise = draw(
        st.lists(st.tuples(st.integers(0, len(text)), st.sampled_from([b"\xff", b"\xe2"])))
    )
    for at, broken in sorted(noise, reverse=True)[:2]:
        text = text[:at] + broken + text[at:]
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=14))
    edges = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


stop_words = st.lists(
    st.lists(characters, min_size=1, max_size=4).map("".join), max_size=3, unique=True
)


@given(pieces=token_pieces(), stop=stop_words)
@settings(deadline=None, max_examples=600)
def test_the_pieces_are_the_text_up_to_the_first_stop_string(
    pieces: list[bytes], stop: list[str]
) -> None:
    pushed, text, word = expected_end(pieces, stop)
    stream = stream_of(pieces, stop)
    shown: list[str] = []
    met = None
    for token in range(len(pieces)):
        piece, met = stream.push(token)
        shown.append(piece)
        assert text.startswith("".join(shown))  # never a part of a stop string that was completed
        if met is not None:
            assert token + 1 == pushed
            break
    else:
        piece, met = stream.flush()
        shown.append(piece)
    assert met == word
    assert "".join(shown) == stream.text == text


@given(pieces=token_pieces(), stop=stop_words)
@settings(deadline=None, max_examples=300)
def test_no_more_is_held_back_than_may_begin_a_stop_string(
    pieces: list[bytes], stop: list[str]
) -> None:
    stream = stream_of(pieces, stop)
    for token, text in enumerate(settled_texts(pieces)):
        _, met = stream.push(token)
        if met is not None:
            return
        beginnings = {word[:size] for word in stop for size in range(1, len(word))}
        held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        assert len(stream.text) == len(text) - held


def test_a_stop_string_across_tokens_is_cut_and_its_beginning_never_shown() -> None:
    stream = stream_of([b"one S", b"T", b"OP two"], ["STOP"])
    assert stream.push(0) == ("one ", None)
    assert stream.push(1) == ("", None)
    assert stream.push(2) == ("", "STOP")
    assert stream.text == "one "


def test_what_only_began_a_stop_string_is_shown_after_all() -> None:
    stream = stream_of([b"a S", b"TO", b"NE", b" ST"], ["STOP"])
    assert [stream.push(i) for i in range(4)] == [
        ("a ", None),
        ("", None),
        ("STONE", None),
        (" ", None),
    ]
    assert stream.flush() == ("ST", None)
    assert stream.text == "a STONE ST"


@pytest.mark.parametrize(
    ("stop", "text", "word"),
    [(["c", "bcd"], "a", "bcd"), (["abc", "ab"], "", "ab"), (["zz"], "abcd", None)],
)
def test_of_several_stop_strings_the_first_in_the_text_counts(
    stop: list[str], text: str, word: str | None
) -> None:
    stream = stream_of([b"abcd"], stop)
    assert stream.push(0)[1] == word
    assert stream.text == text


def test_a_character_is_shown_whole() -> None:
    fox = "🦊".encode()
    stream = stream_of([b"x" + fox[:1], fox[1:3], fox[3:] + b"y"], [])
    assert [stream.push(i)[0] for i in range(3)] == ["", "", "x🦊y"]


def test_an_unfinished_character_at_the_end_is_a_replacement_character() -> None:
    stream = stream_of([b"x", "🦊".encode()[:2]], [])
    assert [stream.push(i)[0] for i in range(2)] == ["x", ""]
    assert stream.flush() == ("\ufffd", None)
    assert stream.text == "x\ufffd"


def test_flush_completes_a_stop_string_that_an_unfinished_character_hid() -> None:
    stream = stream_of([b"ab", b"c\xe2"], ["bc"])
    assert stream.push(0) == ("a", None)
    assert stream.push(1) == ("", None)
    assert stream.flush() == ("", "bc")
    assert stream.text == "a"


def test_without_a_codec_every_piece_is_empty() -> None:
    stream = TextStream(None, ["a"])
    assert stream.push(3) == ("", None)
    assert stream.flush() == ("", None)
    assert stream.text == ""
