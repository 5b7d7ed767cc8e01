"""The tokenizer beside published weights is the model's, and what transformers makes of it is what ours does."""

import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import processors

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import SpecialIds, llama_config, llama_tensors
from megatron_aquila.checkpoint.published import open_weights
from megatron_aquila.commands import convert
from megatron_aquila.commands.convert_tokenizer import compare_ids, put_tokenizer
from megatron_aquila.data.tokenizer import Tokenizer, tokenizer_at
from megatron_aquila.data.tokenizer_extension import extend, save_tokenizer
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer
from megatron_aquila.errors import DataError
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.plan.shape import ModelShape
from tests.checkpoint.megatron_files import write_files
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE as TOY
from tests.data.sentencepieces import CHINESE, ENGLISH, sentencepieces

SHAPE = replace(
    TOY, vocab_size=300, padded_vocab_size=384, num_kv_heads=TOY.num_heads, hidden_size=TOY.num_heads * TOY.head_dim
)  # which Baichuan's files can hold, too
TEXTS = ("the sea", "海上的星星", "  two  spaces", "the stars</s>", "")
TEMPLATE = "{{ messages[0]['content'] }}"


def weights(shape: ModelShape = SHAPE) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=draw) * 0.3 for name, size in llama_tensors(shape).items()}


def checkpoint(root: Path, tokenizer_model: Path | None, **shape: Any) -> Path:
    saved = {} if tokenizer_model is None else {"tokenizer_model": str(tokenizer_model)}
    kind = {"tokenizer_type": "SentencePieceTokenizer"} | dict.fromkeys(
        ("vocab_file", "merge_file", "special_tokens_file", "tokenizer_model")
    )
    chunks = [Chunk(name, tuple(x.shape), (0,) * x.ndim, x) for name, x in weights().items()]
    state = {"shape": asdict(replace(SHAPE, **shape)), **({"tokenizer": kind | saved} if saved else {})}
    return save_checkpoint(root, 7, chunks, state, ParallelContext.single()).parent


def publish(folder: Path, **ids: Any) -> Path:
    """A publisher's Llama: weights and config.json."""
    folder.mkdir()
    special = SpecialIds(**{"bos": None, "eos": None, "pad": None, **ids})
    (folder / "config.json").write_text(json.dumps(llama_config(SHAPE, torch.float32, special)))
    save_file(weights(), folder / "model.safetensors")
    return folder


def run(source: Path, output: Path, *more: str) -> Path:
    assert convert.main(["--from", str(source), "--to", str(output), *more]) == 0
    return output


def told(folder: Path) -> str:
    return str(json.loads((folder / "certificate.json").read_text())["logits"])


def auto(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return replace(tokenizer, allow_special_tokens=True).encode_batch(TEXTS)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepieces(tmp_path_factory.mktemp("spm"), [*ENGLISH, *CHINESE], 300)


@pytest.mark.parametrize(("more", "family"), [({}, "llama"), ({"norm_head": True}, "baichuan")])
def test_transformers_reads_a_sentencepiece_release(tmp_path: Path, pieces: Path, more: dict, family: str) -> None:
    ours = tokenizer_at(pieces)
    out = run(checkpoint(tmp_path / "run", pieces, **more), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["model_type"] == family
    assert "token ids are equal" in told(out)
    assert auto(out)(list(TEXTS))["input_ids"] == ids_of(ours)
    assert (out / "tokenizer.model").read_bytes() == pieces.read_bytes()


def test_an_extended_llama_has_the_ids_of_its_tokenizer(tmp_path: Path, pieces: Path) -> None:
    llama = publish(tmp_path / "llama")
    shutil.copy(pieces, llama / "tokenizer.model")
    extended = extend(
        tokenizer_at(llama), tokenizer_at(sentencepieces(tmp_path, ["夜里的月亮和夜里的海", "hello there"], 299))
    )
    save_tokenizer(extended, tmp_path / "ext")
    assert auto(tmp_path / "ext")(list(TEXTS))["input_ids"] == ids_of(extended)
    out = run(llama, tmp_path / "zh", "--resize-vocab", str(tmp_path / "ext"), "--to-format", "hf")
    assert "token ids are equal, fp32 logits agree" in told(out)
    assert auto(out)(list(TEXTS))["input_ids"] == ids_of(extended)
    assert extended.vocab_size > SHAPE.vocab_size


def test_without_transformers_ids_are_not_claimed(tmp_path: Path, pieces: Path, monkeypatch) -> None:
    monkeypatch.setattr("megatron_aquila.commands.convert_tokenizer.find_spec", lambda name: None)
    out = run(checkpoint(tmp_path / "run", pieces, norm_head=True), tmp_path / "out")
    assert told(out).startswith("token ids not compared: transformers is not installed; logits not compared")


def publishers_tokenizer(folder: Path, pieces: Path) -> None:
    """As Llama-2's: the model, tokenizer.json that puts <s> before a text, settings, and a template."""
    ours = tokenizer_at(pieces)
    shutil.copy(pieces, folder / "tokenizer.model")
    save_tokenizer(ours, folder)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").unlink()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>", "pad_token": "<unk>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "added_tokens.json").write_text("{}")


def test_a_publishers_tokenizer_comes_back(tmp_path: Path, pieces: Path) -> None:
    """By way of a checkpoint of ours, of Megatron's files, and at once."""
    llama = publish(tmp_path / "l2", bos=1)
    publishers_tokenizer(llama, pieces)
    expected = auto(llama)(list(TEXTS))["input_ids"]
    assert expected == [[1, *ids] for ids in ids_of(tokenizer_at(pieces))]
    run(llama, tmp_path / "ours", "--no-verify")
    run(llama, tmp_path / "megatron", "--no-verify", "--to-format", "megatron")
    for source, name in ((tmp_path / "ours", "a"), (tmp_path / "megatron", "b"), (llama, "c")):
        back = run(source, tmp_path / name, "--to-format", "hf")
        assert "token ids are equal, the tokenizer's files the publisher's, fp32 logits agree" in told(back)
        found = auto(back)
        assert found(list(TEXTS))["input_ids"] == expected
        assert (found.chat_template, found.pad_token) == (TEMPLATE, "<unk>")
        for file in ("tokenizer.json", "tokenizer.model", "added_tokens.json"):
            assert (back / file).read_bytes() == (llama / file).read_bytes(), file
    other = sentencepieces(tmp_path, ENGLISH, 298)
    shutil.copy(other, tmp_path / "ours/tokenizer.model")
    shutil.copytree(tmp_path / "ours", tmp_path / "changed")
    new = run(tmp_path / "changed", tmp_path / "new", "--tokenizer-model", str(pieces))
    assert auto(new)(list(TEXTS))["input_ids"] == ids_of(tokenizer_at(pieces)), "what lies beside is another"
    assert not (new / "chat_template.jinja").exists()


def test_a_publishers_tokenizer_that_is_read_otherwise_is_told_of(tmp_path: Path, pieces: Path) -> None:
    """As of old releases, with the model alone: transformers loses the space before a text."""
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    llama = publish(tmp_path / "llama")
    shutil.copy(pieces, llama / "tokenizer.model")
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    out = run(llama, tmp_path / "out", "--to-format", "hf")
    assert "the publisher's, and read otherwise here" in told(out)
    assert "through transformers the ids of '  indented' is" in told(out)
    assert "the publisher's, and read otherwise here" in (out / "README.md").read_text()


def test_a_cut_copy_is_written_anew_and_a_failed_one_is_told_of(tmp_path: Path, pieces: Path, monkeypatch) -> None:
    llama, folder = publish(tmp_path / "llama", bos=1), tmp_path / "out.tmp"
    publishers_tokenizer(llama, pieces)
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer.json.tmp").write_text("{")
    reader = open_weights(llama)
    put_tokenizer(None, reader, folder, max_length=48)
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"
    }  # fmt: skip
    assert (folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()

    def full(source: Path, path: Path) -> None:
        path.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DataError, match=r"out.tmp/added_tokens.json: .* cannot be copied there: No space left"):
        put_tokenizer(None, reader, folder, max_length=48)
    assert (folder / "added_tokens.json").read_text() == "{}"


def test_a_folder_that_transformers_loads_no_more_is_an_error(tmp_path: Path, pieces: Path) -> None:
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    llama, ours = publish(tmp_path / "llama", bos=1), tokenizer_at(pieces)
    publishers_tokenizer(llama, pieces)
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="transformers cannot load the tokenizer"):
        compare_ids(ours, broken, SHAPE.vocab_size, source=llama)
    assert "and read otherwise here" in compare_ids(ours, broken, SHAPE.vocab_size, source=broken)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tokenizer_files(train_tokenizer([*ENGLISH, *CHINESE] * 20, 290), folder)
    return folder


def test_megatrons_files_get_a_tokenizer(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one step, with flags or one beside; without either there is no release."""
    source, ours = write_files(tmp_path / "mgn", weights(), SHAPE, rows=384), tokenizer_at(trained)
    assert convert.main(["--from", str(source), "--to", str(tmp_path / "none"), "--to-format", "hf"]) == 2
    assert "it names no tokenizer, and none lies beside it; give --tokenizer-model" in capsys.readouterr().err
    names = {"--vocab-file": "vocab.json", "--merge-file": "merges.txt", "--special-tokens-file": "special_tokens.txt"}
    flags = [word for flag, name in names.items() for word in (flag, str(trained / name))]
    named = run(source, tmp_path / "named", "--to-format", "hf", *flags)
    for name in names.values():
        shutil.copy(trained / name, source)
    beside = run(source, tmp_path / "beside", "--to-format", "hf")
    for out in (named, beside):
        assert "token ids are equal, fp32 logits agree" in told(out)
        assert auto(out)("the sea</s>")["input_ids"] == replace(ours, allow_special_tokens=True).encode("the sea</s>")
        for file in ("config.json", "generation_config.json"):
            found = json.loads((out / file).read_text())
            assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (ours.bos, ours.eod, 0)
        assert "## Tokenizer" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("none*"))


def test_published_weights_get_the_ids_that_they_do_not_say(tmp_path: Path, trained: Path) -> None:
    llama, ours = publish(tmp_path / "llama"), tokenizer_at(trained)
    save_tokenizer(ours, llama)
    out = run(llama, tmp_path / "out", "--to-format", "hf")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == ours.eod
    assert "token ids are equal, fp32 logits agree" in told(out)
    (llama / "tokenizer.json").write_text("of a library that is not known here")
    out = run(llama, tmp_path / "unread", "--to-format", "hf")
    assert (out / "tokenizer.json").read_text() == "of a library that is not known here"
    assert "token ids" not in told(out)
    plain = run(publish(tmp_path / "plain"), tmp_path / "alone", "--to-format", "hf", "--no-verify")
    assert not list(plain.glob("tokenizer*"))


@pytest.mark.parametrize("more", [(), ("--to-format", "megatron"), ("--to-format", "hf", "--no-tokenizer")])
@pytest.mark.parametrize("flag", ["--vocab-file", "--tokenizer-model"])
def test_a_tokenizer_that_is_not_opened_is_refused(tmp_path: Path, capsys, more: tuple[str, ...], flag: str) -> None:
    llama = publish(tmp_path / "llama")
    assert convert.main(["--from", str(llama), "--to", str(tmp_path / "out"), flag, "/gone/vocab.json", *more]) == 2
    assert f"{flag} /gone/vocab.json: no tokenizer is opened" in capsys.readouterr().err
