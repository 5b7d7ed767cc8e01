"""Where a long run of Han characters can be cut for a tokenizer that keeps its words: the ids stay the same.

To a byte-level BPE a run of Han characters is one word, nearly always another one, so that no cache of words helps. Two
neighbours that no token holds together can never be merged across: the BPE of the run is that of the two parts. A mark
that is a word of its own is put there, and its id taken out again.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.tokenizer import Tokenizer, library_of
from megatron_aquila.data.tokenizer_files import byte_letters

MARK: Final = "\x01"
LINE_BITS: Final = 13  # of the number of lines in the table of pairs, 64 bytes each
MOST_PAIRS: Final = 1 << 18  # from tokens with parts of characters; beyond, cutting is not worth the doubt
CHARACTER: Final = re.compile(rb"[\x80-\xbf]+|[^\x80-\xbf][\x80-\xbf]*")  # or the part of one at the end of a token
HAN: Final = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
NEW_LINE: Final = 10
NO_BYTE: Final = 256


def mark_id(tokenizer: Tokenizer) -> int | None:
    """The id of the mark, or ``None`` where this tokenizer's text may not be cut: only GPT-2's words are known."""
    model = library_of(tokenizer).description
    bpe, words = model["model"], model["pre_tokenizer"]
    plain = bpe["type"] == "BPE" and not any(
        bpe.get(name)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    )
    is_gpt2 = words == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if not plain or not is_gpt2 or model["normalizer"] is not None:
        return None
    if any(HAN.search(token["content"]) for token in model["added_tokens"]):
        return None  # such a token is found in the text before any word is: a mark would part it
    return tokenizer.token_id(byte_letters()[ord(MARK)])


def pair_table(tokenizer: Tokenizer) -> NDArray[np.uint8] | None:
    """Two bits for each two Han characters that some token holds together, or parts of them; uint8 of 2**19.

    A Bloom filter (1970) of lines that a processor fetches at once (Putze, Sanders and Singler 2007): it takes one pair
    in some hundreds for one that is held, which only costs a cut. ``None``: too many tokens hold parts of characters.
    """
    vocab = library_of(tokenizer).description["model"]["vocab"]
    text = _text_of([token for token in vocab if not token.isascii()])
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    line = np.cumsum(codes == NEW_LINE)
    has_parts = np.bincount(line, (codes >= 0xDC80) & (codes <= 0xDCFF), minlength=1) > 0  # of no whole characters
    pairs = _broken_pairs([token for token, broken in zip(text.split("\n"), has_parts, strict=True) if broken])
    if pairs is None:
        return None
    is_wide = (codes >= 0x3400) & ~has_parts[line]  # Han is among these
    first = np.flatnonzero(is_wide[:-1] & is_wide[1:])
    left, right = np.concatenate([np.stack([codes[first], codes[first + 1]]), pairs], axis=1)
    bits = np.zeros(512 << LINE_BITS, dtype=np.uint8)
    bits[_places(left, right)] = 1
    return np.packbits(bits, bitorder="little")


def _places(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The two bits of each pair of code points; uint64 ``[2, pairs]``."""
    hashes = (left.astype(np.uint64) << np.uint64(16) | right) * np.uint64(0x9E3779B97F4A7C15)
    line, within = hashes >> np.uint64(64 - LINE_BITS), np.array([[40], [31]], dtype=np.uint64)
    return line * np.uint64(512) + (hashes >> within & np.uint64(511))


def _text_of(tokens: Sequence[str]) -> str:
    """What tokens stand for, a line each; a byte of a character that is not whole is a low surrogate."""
    to_byte = np.full(1 << 16, NO_BYTE, dtype=np.uint16)
    to_byte[[ord(letter) for letter in byte_letters()]] = np.arange(256)
    to_byte[NEW_LINE] = NEW_LINE
    data = to_byte[np.frombuffer("\n".join(tokens).encode("utf-16-le", "surrogatepass"), dtype="<u2")]
    if NO_BYTE in data:  # a token that is no bytes in letters is made of no text
        letters = frozenset(byte_letters())
        return _text_of([token for token in tokens if letters.issuperset(token)])
    return bytes(data.astype(np.uint8)).decode("utf-8", "surrogateescape")


def _broken_pairs(tokens: Sequence[str]) -> NDArray[np.uint32] | None:
    """The pairs of Han characters that ``tokens`` reach across, which begin or end within one; uint32 ``[2, pairs]``.

    ``None``: there are too many.
    """
    han = np.array([*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000)], dtype=np.uint32)
    data = np.frombuffer("".join(map(chr, han)).encode(), dtype=np.uint8).reshape(-1, 3).T.copy()  # [place in it, han]

    @cache
    def with_bytes(part: bytes, first: int) -> NDArray[np.uint32]:
        """The characters that have these bytes from the ``first`` on; none has more than three."""
        held, wanted = data[first : first + len(part)], np.frombuffer(part, dtype=np.uint8)[:, None]
        return han[(held == wanted).all(axis=0)] if len(held) == len(part) else han[:0]

    broken = [token.encode("utf-8", "surrogateescape") for token in tokens]
    pairs, count = [np.empty((2, 0), dtype=np.uint32)], 0
    for before, after in {pair for token in broken for pair in pairwise(CHARACTER.findall(token))}:
        left, right = with_bytes(before, 3 - len(before)), with_bytes(after, 0)
        count += len(left) * len(right)
        if count > MOST_PAIRS:
            return None
        pairs.append(np.stack([np.repeat(left, len(right)), np.tile(right, len(left))]))
    return np.concatenate(pairs, axis=1)
