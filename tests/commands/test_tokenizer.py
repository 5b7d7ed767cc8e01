"""``aquila tokenizer train``: files, the table, and its exit status."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_aquila.commands import tokenizer


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in {"a": ["aa aa", "aa"], "b": ["é"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inputs = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    out = tmp_path / "out"
    assert tokenizer.main(["train", "--input", *inputs, "--vocab-size", "266", "--output", str(out)]) == 0
    assert "aa" in json.loads((out / "vocab.json").read_text(encoding="utf-8"))
    size, head, first, second = capsys.readouterr().out.splitlines()
    assert size == f"266 tokens, in {out}"
    assert head.split() == ["file", "documents", "tokens/document", "bytes/token"]
    assert first.split() == ["a.jsonl", "2", "2.0", "1.75"]
    assert second.split() == ["b.jsonl", "1", "2.0", "1.00"]


def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text('{"body": "a"}\n')
    arguments = ["train", "--input", str(tmp_path / "in.jsonl"), "--vocab-size", "266", "--output", str(tmp_path / "o")]
    assert tokenizer.main(arguments) == 2
    assert "in.jsonl:1: no key 'text'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def corpus(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def trained(folder: Path, name: str, texts: str, size: int) -> str:
    inputs = corpus(folder / f"{name}.jsonl", *[texts] * 4)
    out = str(folder / name)
    assert tokenizer.main(["train", "--input", inputs, "--vocab-size", str(size), "--output", out]) == 0
    return out


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib (extra quickstart)")
    small, large = trained(tmp_path, "small", "aa aa", 266), trained(tmp_path, "large", "ab ab 海上 ab", 273)
    inputs = [corpus(tmp_path / "zh.jsonl", "海上", "海"), corpus(tmp_path / "en.jsonl", "ab ab")]
    capsys.readouterr()
    command = ["compare", small, f"big={large}", "--input", *inputs]
    assert tokenizer.main([*command, "--format", "markdown"]) == 0
    head, rule, first, second = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")][1:5] == [
        "tokenizer", "vocabulary", "tokens/document zh", "tokens/document en"
    ]  # fmt: skip
    assert rule.startswith("| --- | ---:")
    assert [cell.strip() for cell in first.split("|")][1:9] == [
        "small", "266", "4.5", "5.0", "1.00", "1.00", "0.00%", "100.00%"
    ]  # fmt: skip
    assert second.startswith("| big | 273 |")
    for ending in ("png", "svg"):
        picture = tmp_path / f"bars.{ending}"
        assert tokenizer.main([*command, "--plot", str(picture), "--limit", "1"]) == 0
        assert picture.stat().st_size > 1000
    out = capsys.readouterr().out
    assert "exact" in out
    assert f"drawn: {tmp_path / 'bars.svg'}" in out
    assert tokenizer.main([*command, "--plot", str(tmp_path / "x.gif")]) == 2
    assert "pictures are .png or .svg" in capsys.readouterr().err
    assert tokenizer.main(["compare", small, small, "--input", *inputs]) == 2
    assert "another tokenizer is named small too; give NAME=PATH" in capsys.readouterr().err
    assert tokenizer.main(["compare", small, "--input", corpus(tmp_path / "none.jsonl")]) == 2
    assert "none: it has no texts to compare tokenizers on" in capsys.readouterr().err


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_aquila.data.tokenizer_comparison import compare, draw_comparison
    from megatron_aquila.data.tokenizer_training import train_tokenizer
    from megatron_aquila.errors import DataError

    found = compare({"one": train_tokenizer(["aa aa"] * 4, 266)}, {"en": ["aa"]})
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"needs the matplotlib package: pip install 'megatron_aquila\[plots\]'"):
        draw_comparison(found, tmp_path / "x.png")


@pytest.mark.parametrize("name", ["a", "the English one extended by the Chinese one"])
def test_names_stay_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    from megatron_aquila.data.tokenizer_comparison import Comparison, Usage, draw_comparison

    drawn, save = [], figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        drawn.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(figure, "savefig", savefig)
    usage = Usage(documents=1, tokens=9, num_bytes=9, unknown=0, covered=1.0, exact=1.0)
    names = [f"{name} {number}" for number in range(5)]
    texts = dict.fromkeys(("zh", "en", "code"), usage)
    draw_comparison(
        Comparison(vocab_sizes=dict.fromkeys(names, 100_008), usage=dict.fromkeys(names, texts)), tmp_path / "x.png"
    )
    (picture,) = drawn
    (legend,) = picture.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= picture.bbox.x1


def test_the_pages_picture_has_the_names_of_its_table() -> None:
    docs = Path(__file__).parents[2] / "docs"
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \|", (docs / "tokenizers.md").read_text(), re.MULTILINE)
    drawn = (docs / "tokenizers.svg").read_text()
    assert len(rows) == 5
    assert [name for name, size in rows if f"<!-- {name} ({size}) -->" not in drawn] == []


def test_extend_and_resize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    from dataclasses import asdict, replace

    from megatron_aquila.checkpoint.huggingface import HuggingFaceReader
    from megatron_aquila.checkpoint.layout import Chunk
    from megatron_aquila.checkpoint.llama import llama_tensors
    from megatron_aquila.commands import convert
    from megatron_aquila.data.tokenizer import tokenizer_at
    from megatron_aquila.parallel.context import ParallelContext
    from tests.checkpoint.numbers import save_checkpoint
    from tests.checkpoint.toy import SHAPE

    base, added = trained(tmp_path, "base", "aa aa", 266), trained(tmp_path, "added", "海上 海上", 269)
    capsys.readouterr()
    both = str(tmp_path / "both")
    assert tokenizer.main(["extend", base, "--add", added, "--output", both]) == 0
    new = tokenizer_at(Path(both)).vocab_size
    assert f"266 + {new - 266} = {new} in {both}" in capsys.readouterr().out
    shape = replace(SHAPE, vocab_size=266, padded_vocab_size=266)
    chunks = [Chunk(name, size, (0,) * len(size), torch.randn(size)) for name, size in llama_tensors(shape).items()]
    save_checkpoint(tmp_path / "run", 1, chunks, {"shape": asdict(shape)}, ParallelContext.single())
    larger_dir = tmp_path / "larger"
    command = ["--from", str(tmp_path / "run"), "--to", str(larger_dir), "--resize-vocab", both, "--no-verify"]
    assert convert.main([*command, "--tokenizer-model", both]) == 2
    assert "the model has 266 tokens, the tokenizer" in capsys.readouterr().err
    assert convert.main([*command, "--tokenizer-model", base]) == 0
    larger = HuggingFaceReader(larger_dir)
    assert larger.config["vocab_size"] == new
    old_rows, rows = chunks[0].tensor, larger.read("model.embed_tokens.weight")
    assert torch.equal(rows[:266], old_rows)
    ids = tokenizer_at(Path(base)).encode_bytes(tokenizer_at(Path(both)).token_bytes(new - 1))
    assert torch.equal(rows[-1], old_rows[ids].mean(0))
    assert tokenizer_at(larger_dir).vocab_size == new
    bare = ["--to", str(tmp_path / "bare"), "--no-tokenizer", "--tokenizer-model", base]
    assert convert.main([*command, *bare]) == 0
    assert not [path.name for path in (tmp_path / "bare").iterdir() if "token" in path.name]
    assert HuggingFaceReader(tmp_path / "bare").config["vocab_size"] == new
    small = trained(tmp_path, "small", "aa aa", 265)
    command[3] = str(tmp_path / "smaller")
    assert convert.main([*command, "--tokenizer-model", small]) == 2
    assert "the model has 266 tokens, its tokenizer 265" in capsys.readouterr().err
