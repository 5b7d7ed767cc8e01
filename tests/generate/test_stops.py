"""Pieces join to the text, end at stop words, and never break a character."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.generate.stops import REPLACEMENT, Stops, TextStream


def letters(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: bytes, stops: Stops, prompt: bytes = b"") -> list[str]:
    stream = TextStream(letters, list(prompt), stops)
    out = []
    for byte in text:
        out.append(stream.add(byte))
        if stream.stopped:
            return out
    return [*out, stream.finish()]


@given(st.text(), st.text())
def test_pieces_are_whole_characters_and_join_to_the_text(prompt: str, text: str) -> None:
    found = pieces(text.encode(), Stops(), prompt.encode())
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in found)


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_shown_as_such_and_hold_nothing_up(data: bytes) -> None:
    found = "".join(pieces(data + b"abcdefgh", Stops()))
    assert found.endswith("efgh")


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_word(text: str, words: list[str]) -> None:
    found = "".join(pieces(text.encode(), Stops(words=tuple(words))))
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(word) for word in words)]
    if not ends:
        assert found == text
    else:
        head = text[: ends[0]]
        assert found == head[: min(head.find(word) for word in words if word in head)]


def test_a_stop_id_is_not_shown_and_gives_up_what_was_held() -> None:
    stops = Stops(ids=frozenset(b"!"), words=("ab",))
    assert pieces(b"xa!b", stops) == ["x", "", "a"]


def test_a_character_of_several_tokens(aquila_tokenizer_dir: Path) -> None:
    files = ("vocab.json", "merges.txt", "special_tokens.txt")
    vocab, merges, specials = (aquila_tokenizer_dir / name for name in files)
    tokenizer = load_tokenizer("AquilaTokenizer", vocab_file=vocab, merge_file=merges, special_tokens_file=specials)
    ids = tokenizer.encode("龘靐齉 ok")
    stream = TextStream(tokenizer.decode, [], Stops())
    found = [stream.add(token) for token in ids]
    assert "" in found, "a rare character takes several tokens"
    assert "".join(found) == "龘靐齉 ok"
    assert all(REPLACEMENT not in piece for piece in found)


@pytest.mark.parametrize("word", ["###", "\n\n"])
def test_a_stop_word_within_a_token(word: str) -> None:
    spelled = ["one", f"two{word}three"]
    stream = TextStream(lambda ids: "".join(spelled[number] for number in ids), [], Stops(words=(word,)))
    assert [stream.add(0), stream.add(1), stream.stopped] == ["one", "two", True]
