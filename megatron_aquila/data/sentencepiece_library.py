"""A SentencePiece model as tokenizer.json says it, for transformers and whatever else reads no .model file.

transformers makes a tokenizer of its own where a .model lies alone: it loses the space before a text, or joins it with
one that is there. Here a text is changed and cut as SentencePiece does it, and special tokens are recognised first.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer, model_messages
from megatron_aquila.data.tokenizer import SPACE
from megatron_aquila.errors import DataError

_BYTE: Final = ("<", "0", "x", "[0-9A-F]", "[0-9A-F]", ">")  # how a byte piece is named
_UNKNOWN: Final = "unknown piece"  # no text spells it: what is cut has no space


def library_model(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The tokenizers library's object with the ids of ``tokenizer``.

    Where the library would take a text for the piece that it names, as it does in unigram models and in BPE with
    symbols of its own, the unknown piece has another name, and texts are cut within the names of byte pieces; these
    are left as they are where every place in them has some piece that lies across it.

    Raises:
        DataError: it is neither a BPE nor a unigram model, has settings that tokenizer.json has no word for, or
            protobuf is not installed.
    """
    pb2 = model_messages()
    proto, kinds = pb2.ModelProto(), pb2.ModelProto.SentencePiece
    proto.ParseFromString(tokenizer.proto)
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    _check(proto, pb2)
    own = sorted((piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED), key=len, reverse=True)
    is_bpe = trained.model_type == pb2.TrainerSpec.BPE
    names = [piece.piece for piece in proto.pieces]
    cuts: list[str] = []
    if own or not is_bpe:
        names[trained.unk_id] = _UNKNOWN
        cuts = _cut(proto, kinds)
    if is_bpe:
        model: models.Model = models.BPE(
            {name: number for number, name in enumerate(names)},
            list(_merges(proto, {kinds.NORMAL, kinds.USER_DEFINED})),
            unk_token=names[trained.unk_id],
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
            ignore_merges=own != [],
        )
    else:
        scores = [piece.score for piece in proto.pieces]
        model = models.Unigram(list(zip(names, scores, strict=True)), trained.unk_id, trained.byte_fallback)
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence(list(_normalizers(rules)))
    if own or cuts:  # symbols of its own are whole wherever they stand
        found.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, own), *cuts])), "isolated")
    found.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])
    )
    controls = [piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL]
    found.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    return found


def _check(proto: Any, pb2: Any) -> None:
    trained, unused = proto.trainer_spec, pb2.ModelProto.SentencePiece.UNUSED
    refused = {
        f"of type {pb2.TrainerSpec.ModelType.Name(trained.model_type)}; only BPE and UNIGRAM": (
            trained.model_type not in (pb2.TrainerSpec.BPE, pb2.TrainerSpec.UNIGRAM)
        ),
        "with spaces behind words (treat_whitespace_as_suffix)": trained.treat_whitespace_as_suffix,
        "that keeps spaces as they are (escape_whitespaces=False)": not proto.normalizer_spec.escape_whitespaces,
        "with pieces of type UNUSED": any(piece.type == unused for piece in proto.pieces),
    }
    for what, is_so in refused.items():
        if is_so:
            raise DataError(f"tokenizer.json has no word for a SentencePiece model {what}")


def _cut(proto: Any, kinds: Any) -> list[str]:
    """A pattern, without a width, of a place in the names of byte pieces that no other piece lies across."""
    texts = [piece.piece for piece in proto.pieces if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    taken = {text[place : place + 2] for text in texts for place in range(len(text) - 1)}
    names = [piece.piece for piece in proto.pieces if piece.type == kinds.BYTE]
    for place in range(1, len(_BYTE) if names else 0):
        if taken.isdisjoint(name[place - 1 : place + 1] for name in names):
            return [f"(?<={''.join(_BYTE[:place])})(?={''.join(_BYTE[place:])})"]
    return []


def _merges(proto: Any, kinds: set[int]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that are a piece, in the order of its score. SentencePiece's BPE knows no other order."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in kinds}
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for place in range(1, len(piece)):
            left, right = piece[:place], piece[place:]
            if left in scores and right in scores:
                yield left, right


def _normalizers(rules: Any) -> Iterator[normalizers.Normalizer]:
    """What is done to a text before it is cut."""
    if rules.precompiled_charsmap:
        yield normalizers.Precompiled(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(Regex("^ +| +$"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if rules.add_dummy_prefix:
        yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
