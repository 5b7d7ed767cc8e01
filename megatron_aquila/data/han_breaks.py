"""Where a long run of Han characters can be cut for a tokenizer that keeps its words: the ids stay the same.

To a byte-level BPE a run of Han characters is one word, nearly always another one, so that no cache of words helps. Two
neighbours that no token holds together can never be merged across: the BPE of the run is that of the two parts. A mark
that is a word of its own is put there, and its id taken out again.
"""

import json
import re
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from megatron_aquila.data.tokenizer import Tokenizer, byte_letters, library_of

MARK: Final = "\x01"
TABLE_BITS: Final = 22
MOST_PAIRS: Final = 1 << 18  # from tokens with parts of characters; beyond, cutting is not worth the doubt
CHARACTER: Final = re.compile(rb"[\x80-\xbf]+|[^\x80-\xbf][\x80-\xbf]*")  # or the part of one at the end of a token


def mark_id(tokenizer: Tokenizer) -> int | None:
    """The id of the mark, or ``None`` where this tokenizer's text may not be cut: only GPT-2's words are known."""
    model = json.loads(library_of(tokenizer).to_str())
    bpe, words = model["model"], model["pre_tokenizer"]
    plain = bpe["type"] == "BPE" and not any(
        bpe.get(name)
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    )
    is_gpt2 = words == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if not plain or not is_gpt2 or model["normalizer"] is not None:
        return None
    return library_of(tokenizer).token_to_id(byte_letters()[ord(MARK)])


def pair_table(tokenizer: Tokenizer) -> NDArray[np.uint8] | None:
    """A bit for each hash of two Han characters that some token holds together, or parts of them; uint8 of 2**19.

    Two pairs of one hash only cost a cut. ``None``: too many tokens hold parts of characters.
    """
    to_byte = {ord(letter): chr(byte) for byte, letter in enumerate(byte_letters())}
    whole, broken = [], []
    for token in library_of(tokenizer).get_vocab(with_added_tokens=False):
        if token.isascii():
            continue
        try:
            data = token.translate(to_byte).encode("latin-1")
            whole.append(data.decode("utf-8"))
        except UnicodeDecodeError:  # it begins or ends within a character
            broken.append(data)
        except UnicodeEncodeError:  # no bytes in letters: such a token is made of no text
            continue
    codes = np.frombuffer("\n".join(whole).encode("utf-32-le"), dtype="<u4")
    pairs = _broken_pairs(broken)
    if len(pairs) > MOST_PAIRS:
        return None
    left, right = (np.array([ord(pair[side]) for pair in pairs], dtype=np.uint32) for side in (0, 1))
    left, right = np.concatenate([codes[:-1], left]), np.concatenate([codes[1:], right])
    bits = np.zeros(1 << TABLE_BITS, dtype=np.uint8)
    is_wide = (left >= 0x3400) & (right >= 0x3400)  # Han is among these
    left, right = left[is_wide], right[is_wide]
    bits[(left * np.uint32(0x9E3779B1) ^ right * np.uint32(0x85EBCA6B)) >> np.uint32(32 - TABLE_BITS)] = 1
    return np.packbits(bits, bitorder="little")


def _broken_pairs(tokens: Sequence[bytes]) -> set[tuple[str, str]]:
    """The pairs of Han characters that such tokens reach across; more than ``MOST_PAIRS`` where there are too many."""
    ends, beginnings = _parts()
    pairs: set[tuple[str, str]] = set()
    for token in tokens:
        for left, right in pairwise(CHARACTER.findall(token)):
            pairs.update(product(ends.get(left, ()), beginnings.get(right, ())))
        if len(pairs) > MOST_PAIRS:
            break
    return pairs


def _parts() -> tuple[dict[bytes, list[str]], dict[bytes, list[str]]]:
    """The Han characters by what they end with, and by what they begin with, themselves included."""
    ends: dict[bytes, list[str]] = {}
    beginnings: dict[bytes, list[str]] = {}
    for code in (*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000)):
        data = chr(code).encode()
        for size in (1, 2, 3):
            ends.setdefault(data[-size:], []).append(chr(code))
            beginnings.setdefault(data[:size], []).append(chr(code))
    return ends, beginnings
