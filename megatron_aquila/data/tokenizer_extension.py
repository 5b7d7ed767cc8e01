"""A vocabulary that another one is merged into: old ids stay, and what an old tokenizer makes of the new tokens."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import tokenizers

from megatron_aquila.data.huggingface_tokenizer import save_huggingface_tokenizer
from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer, from_proto, model_messages
from megatron_aquila.data.tokenizer import LibraryTokenizer, Tokenizer
from megatron_aquila.errors import DataError


def extend(base: Tokenizer, added: Tokenizer) -> Tokenizer:
    """``base`` with the pieces of ``added`` that it lacks, behind all its ids. What it had keeps its id.

    The merges of ``base`` go first. Of byte-level BPE each new piece gets the merge of the two parts that it falls into
    by then, so that it is reached; one that falls into more is left out, and so are special tokens of ``added``.

    Raises:
        DataError: the two are not of one kind: byte-level BPE, or SentencePiece models of one algorithm.
    """
    if isinstance(base, SentencePieceTokenizer) and isinstance(added, SentencePieceTokenizer):
        return _extend_sentencepiece(base, added)
    if isinstance(base, LibraryTokenizer) and isinstance(added, LibraryTokenizer):
        return _extend_bpe(base, added)
    raise DataError(f"a {base.kind} cannot take the pieces of a {added.kind}; give two tokenizers of one kind")


def _extend_bpe(base: LibraryTokenizer, added: LibraryTokenizer) -> LibraryTokenizer:
    whole, other = (json.loads(one.model.to_str()) for one in (base, added))
    model = whole["model"]
    for name, found in (("the base", whole), ("what is added", other)):
        if found["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(found["decoder"]):
            raise DataError(f"{name} is no byte-level BPE: {found['model']['type']}")
    specials = {token["content"]: token["id"] for token in whole["added_tokens"]}
    # Special tokens stand in the vocabulary too, or the library would number them behind it anew.
    vocab: dict[str, int] = {**model["vocab"], **specials}
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    theirs, size = {token["content"] for token in other["added_tokens"]}, base.vocab_size
    for piece, _ in sorted(other["model"]["vocab"].items(), key=lambda item: int(item[1])):
        if piece in vocab or piece in theirs:
            continue
        parts = _cut(piece, ranks)
        if len(parts) == 2:
            ranks[parts[0], parts[1]] = len(ranks)
            vocab[piece], size = size, size + 1
    model["vocab"], model["merges"] = vocab, [list(pair) for pair in ranks]
    return LibraryTokenizer(
        kind="HuggingFaceTokenizer",
        model=tokenizers.Tokenizer.from_str(json.dumps(whole)),
        bos_token=base.bos_token,
        eod_token=base.eod_token,
        pad_token=base.pad_token,
        allow_special_tokens=base.allow_special_tokens,
    )


def _cut(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """What byte-level BPE with these merges makes of a piece."""
    parts = list(piece)
    while len(parts) > 1:
        found = [(rank, place) for place, pair in enumerate(pairwise(parts)) if (rank := ranks.get(pair)) is not None]
        if not found:
            break
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _extend_sentencepiece(base: SentencePieceTokenizer, added: SentencePieceTokenizer) -> SentencePieceTokenizer:
    pb2 = model_messages()
    whole, other = pb2.ModelProto(), pb2.ModelProto()
    whole.ParseFromString(base.proto)
    other.ParseFromString(added.proto)
    kinds = [proto.trainer_spec.model_type for proto in (whole, other)]
    if kinds[0] != kinds[1]:
        names = [pb2.TrainerSpec.ModelType.Name(kind) for kind in kinds]
        raise DataError(f"a {names[0]} model cannot take the pieces of a {names[1]} model; their scores differ in kind")
    is_bpe = kinds[0] == pb2.TrainerSpec.BPE
    known = {piece.piece for piece in whole.pieces}
    lowest = min(piece.score for piece in whole.pieces)
    for piece in other.pieces:
        if piece.type != pb2.ModelProto.SentencePiece.NORMAL or piece.piece in known:
            continue
        if is_bpe:  # scores are the order of merges, of a unigram model logarithms of probabilities
            lowest -= 1
        whole.pieces.add(piece=piece.piece, score=lowest if is_bpe else piece.score)
    whole.trainer_spec.vocab_size = len(whole.pieces)
    return from_proto(whole.SerializeToString(), allow_special_tokens=base.allow_special_tokens)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of ``save_huggingface_tokenizer`` into ``folder``, which is made.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: the tokenizer cannot be written: {error.strerror}") from error
    save_huggingface_tokenizer(tokenizer, folder)


def old_pieces(old: Tokenizer, new: Tokenizer) -> list[tuple[int, ...]]:
    """For each id of ``new`` the ids of ``old`` that it consists of: itself where it was there.

    A special token, or one that ``old`` cannot write, consists of what its name is cut into, or of nothing.

    Raises:
        DataError: an id of ``old`` is another token in ``new``, or none.
    """
    if new.vocab_size < old.vocab_size:
        raise DataError(
            f"the new tokenizer has {new.vocab_size} tokens, the old one {old.vocab_size}; extend the old one, so that "
            "ids are kept"
        )
    found: list[tuple[int, ...]] = []
    for number in range(new.vocab_size):
        data = new.token_bytes(number)
        if number < old.vocab_size:
            if data != old.token_bytes(number):
                raise DataError(
                    f"id {number} is {old.token_bytes(number)!r} in the old tokenizer and {data!r} in the new one; "
                    "extend the old one, so that ids are kept"
                )
            found.append((number,))
            continue
        found.append(_old_ids(old, data))
    return found


def _old_ids(old: Tokenizer, data: bytes) -> tuple[int, ...]:
    """A token in pieces, without the space that a SentencePiece model puts before a text where it has none."""
    ids = old.encode_bytes(data)
    if ids and old.decode_bytes(ids) != data and old.decode_bytes(ids).lstrip(b" ") == data.lstrip(b" "):
        bare = old.encode_bytes(data.lstrip(b" "))
        ids = bare if old.decode_bytes(bare) == data else ids
        if old.token_bytes(ids[0]) == b" " and not data.startswith(b" "):
            ids = ids[1:]
    return tuple(number for number in ids if number != old.unknown)
