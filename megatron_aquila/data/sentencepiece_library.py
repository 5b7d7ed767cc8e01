"""A SentencePiece model as tokenizer.json says it, for transformers and whatever else reads no .model file.

transformers makes a tokenizer of its own where a .model lies alone: it loses the space before a text, or joins it with
one that is there. Here a text is changed and cut as SentencePiece does it, and special tokens are recognised first.
"""

import re
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from megatron_aquila.data.sentencepiece_tokenizer import SentencePieceTokenizer, model_messages
from megatron_aquila.data.tokenizer import SPACE
from megatron_aquila.errors import DataError


def library_model(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The tokenizers library's object with the ids of ``tokenizer``.

    Raises:
        DataError: it is neither a BPE nor a unigram model, or protobuf is not installed.
    """
    pb2 = model_messages()
    proto, kinds = pb2.ModelProto(), pb2.ModelProto.SentencePiece
    proto.ParseFromString(tokenizer.proto)
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    own = sorted((piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED), key=len, reverse=True)
    if trained.model_type == pb2.TrainerSpec.BPE:
        model: models.Model = models.BPE(
            {piece.piece: number for number, piece in enumerate(proto.pieces)},
            list(_merges(proto, {kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED})),
            unk_token=proto.pieces[trained.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
            ignore_merges=own != [],
        )
    elif trained.model_type == pb2.TrainerSpec.UNIGRAM:
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(pieces, trained.unk_id, trained.byte_fallback)
    else:
        name = pb2.TrainerSpec.ModelType.Name(trained.model_type)
        raise DataError(f"tokenizer.json has no word for a SentencePiece model of type {name}; only BPE and UNIGRAM")
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence(list(_normalizers(rules)))
    if own:  # whole wherever they stand
        found.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, own))), "isolated")
    found.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else [])
    )
    controls = [piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL]
    found.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    return found


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
