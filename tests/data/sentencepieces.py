"""Small SentencePiece models, trained where a test needs one."""

from pathlib import Path

import pytest

ENGLISH = ["the sea and the stars of the night", "a sea of stars and the sand"] * 5
CHINESE = ["海上的星星和海上的月亮", "夜里的海上有星星"] * 5


def sentencepieces(folder: Path, texts: list[str], size: int, **settings: object) -> Path:
    """``folder``/``size``.model; by default byte-fallback BPE that changes no text, as Llama-2's."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="an extra (spm)")
    (folder / "texts").write_text("\n".join(texts * 20), encoding="utf-8")
    plain = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"),
        model_prefix=str(folder / "m"),
        vocab_size=size,
        minloglevel=3,
        **{"byte_fallback": True, **plain, **settings},
    )
    return (folder / "m.model").rename(folder / f"{size}.model")
