"""A checkpoint with a trained tokenizer becomes a folder that transformers loads, or no folder."""

import json
import shutil
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_aquila.checkpoint import conversion
from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import llama_tensors
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands import convert
from megatron_aquila.commands.convert_judge import Case, judge_in_transformers
from megatron_aquila.commands.convert_options import Convert
from megatron_aquila.config.cli import load_config
from megatron_aquila.config.settings import all_settings, value_of
from megatron_aquila.data.aquila_tokens import AQUILA_VOCAB_SIZE
from megatron_aquila.data.tokenizer import fingerprint, load_tokenizer
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer
from megatron_aquila.errors import CheckpointError
from megatron_aquila.observe.ledger import Ledger
from megatron_aquila.observe.writers import JsonLinesWriter
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.train.record import plain
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE as TOY

SHAPE = replace(TOY, vocab_size=280, padded_vocab_size=384)
SHAPES = llama_tensors(SHAPE)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["hello world, the world is here", "你好，世界，你好", "return the value of the hello world"] * 20
    save_tokenizer_files(train_tokenizer(texts, SHAPE.vocab_size), folder)
    return folder


def files(folder: Path) -> dict[str, str | None]:
    names = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}
    return {flag: str(folder / name) for flag, name in names.items()}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul(0.3).to(dtype) for name, shape in SHAPES.items()}


def save(root: Path, state: dict[str, Any], dtype: torch.dtype = torch.float32, step: int = 7) -> Path:
    chunks = [Chunk(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor) for name, tensor in weights(dtype).items()]
    return save_checkpoint(root, step, chunks, state, ParallelContext.single())


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_dir: Path) -> Path:
    saved = {"tokenizer_type": "AquilaTokenizer", **files(tokenizer_dir), "tokenizer_model": None}
    save(tmp_path / "run", {"shape": asdict(SHAPE), "tokenizer": saved})
    return tmp_path / "run"


def to_hf(checkpoint: Path, output: Path, *more: str) -> int:
    return convert.main(["--from", str(checkpoint), "--to", str(output), *more])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", None])
def test_a_folder_that_transformers_loads(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str | None
) -> None:
    transformers = pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    out = tmp_path / "out"
    assert to_hf(checkpoint, out, *([] if dtype is None else ["--dtype", dtype])) == 0
    printed = capsys.readouterr().out
    assert "token ids are equal, fp32 logits " in printed
    assert f"step_0000007 -> {out}" in printed
    config = transformers.AutoConfig.from_pretrained(out)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[dtype]
    assert config.dtype == expected
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor.to(expected)) for name, tensor in weights().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.model_max_length == SHAPE.seq_len
    assert tokenizer("[CLS]</s>")["input_ids"] == [SHAPE.vocab_size - 2, SHAPE.vocab_size - 1]
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (278, 279, 0)


def test_the_tokenizer_can_be_named(checkpoint: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    save(checkpoint, {"shape": asdict(SHAPE)}, step=8)
    flags = ["--vocab-file", "vocab.json", "--merge-file", "merges.txt", "--special-tokens-file", "special_tokens.txt"]
    named = [flag if flag.startswith("-") else str(tokenizer_dir / flag) for flag in flags]
    assert to_hf(checkpoint, tmp_path / "three", "--no-verify", *named) == 0
    model = ["--tokenizer-model", str(tokenizer_dir / "tokenizer.json")]
    assert to_hf(checkpoint, tmp_path / "one", "--no-verify", *model) == 0
    one, three = (json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("one", "three"))
    assert one == three


def test_a_folder_that_differs_gets_no_name(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Path] = []

    def refuse(case: Case) -> str:
        assert case.ours.folder.name == "step_0000007"
        assert case.tokenizer is not None
        assert case.tokenizer.vocab_size == SHAPE.vocab_size
        assert case.published == case.theirs.folder
        assert (case.theirs.folder / "tokenizer.json").is_file()
        seen.append(case.theirs.folder)
        raise CheckpointError("they differ")

    options = Convert(source=checkpoint, output=tmp_path / "out")
    with pytest.raises(CheckpointError, match="they differ"):
        convert.convert(options, refuse)
    assert len(seen) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tmp", "run"]


def test_without_transformers_it_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_aquila.commands.convert_judge.find_spec", lambda name: None)
    assert to_hf(checkpoint, tmp_path / "out") == 2
    assert "pip install 'megatron_aquila[hf]', or give --no-verify" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert to_hf(checkpoint, tmp_path / "out2", "--no-verify") == 0
    assert "not verified: --no-verify" in capsys.readouterr().out


def test_another_tokenizer_than_the_runs_is_refused(
    checkpoint: Path, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_dir)
    saved = {"tokenizer_type": "AquilaTokenizer", **files(tokenizer_dir), "tokenizer_model": None}
    save(checkpoint, {"shape": asdict(SHAPE), "tokenizer": saved | {"fingerprint": fingerprint(ours)}}, step=8)
    assert to_hf(checkpoint, tmp_path / "same", "--no-verify") == 0
    save_tokenizer_files(
        train_tokenizer(["other words, others, and many more words of them"] * 9, 280), tmp_path / "other"
    )
    capsys.readouterr()
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify", "--tokenizer-model", str(tmp_path / "other")) == 2
    assert "not the tokenizer that the run was trained with" in capsys.readouterr().err
    # The files that the checkpoint names can be overwritten after it was saved.
    save(checkpoint, {"shape": asdict(SHAPE), "tokenizer": saved | {"fingerprint": "0" * 64}}, step=9)
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify") == 2
    assert "give --tokenizer-model, or --vocab-file" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("size", "asked"), [(AQUILA_VOCAB_SIZE, True), (SHAPE.vocab_size, False)])
def test_aquilas_size_means_aquilas_ids(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_dir: Path, size: int, asked: bool
) -> None:
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    seen: list[Path] = []
    monkeypatch.setattr("megatron_aquila.commands.convert_tokenizer.check_aquila_ids", seen.append)
    monkeypatch.setattr("megatron_aquila.verify.huggingface.compare_logits", lambda *_, **__: "fp32 logits equal")
    reader = CheckpointReader(checkpoint)
    case = Case(
        ours=reader,
        theirs=reader,
        shape=replace(SHAPE, vocab_size=size),
        dtype=torch.float32,
        tokenizer=load_tokenizer("HuggingFaceTokenizer", tokenizer_model=tokenizer_dir),
        published=tokenizer_dir,
    )
    assert judge_in_transformers(case) == "token ids are equal, fp32 logits equal"
    assert seen == ([tokenizer_dir] if asked else [])
    assert judge_in_transformers(replace(case, published=None)) == "fp32 logits equal"


def test_aquilas_own_tokenizer(
    checkpoint: Path, tmp_path: Path, aquila_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    shape = replace(SHAPE, vocab_size=AQUILA_VOCAB_SIZE, padded_vocab_size=100096)
    chunks = [Chunk(name, size, (0,) * len(size), torch.ones(size)) for name, size in llama_tensors(shape).items()]
    state = {"shape": asdict(shape), "tokenizer": {"tokenizer_type": "AquilaTokenizer", "tokenizer_model": None}}
    state["tokenizer"] |= files(aquila_tokenizer_dir)
    save_checkpoint(checkpoint, 8, chunks, state, ParallelContext.single())
    assert to_hf(checkpoint, tmp_path / "own") == 0
    assert "token ids are equal" in capsys.readouterr().out
    vocab = json.loads((aquila_tokenizer_dir / "vocab.json").read_text(encoding="utf-8"))
    vocab["Hello"], vocab["ĠHello"] = vocab["ĠHello"], vocab["Hello"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    names = [tmp_path / "vocab.json", aquila_tokenizer_dir / "merges.txt", aquila_tokenizer_dir / "special_tokens.txt"]
    flags = zip(("--vocab-file", "--merge-file", "--special-tokens-file"), map(str, names), strict=True)
    assert to_hf(checkpoint, tmp_path / "out", *(word for pair in flags for word in pair)) == 2
    assert "'Hello world' has the ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_input_is_an_error_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(reason: str, checkpoint: Path = checkpoint, *more: str) -> None:
        assert to_hf(checkpoint, tmp_path / "out", *more) == 2
        assert reason in capsys.readouterr().err
        assert not list(tmp_path.glob("out*"))

    refused("there is no such folder", tmp_path / "nowhere")
    refused("--merge-file", checkpoint, "--vocab-file", str(tokenizer_dir / "vocab.json"))
    refused("gone.json is not there; give --tokenizer-model", checkpoint, "--tokenizer-model", "gone.json")
    save(checkpoint, {"shape": asdict(SHAPE)}, step=8)
    refused("it names no tokenizer, and none lies beside it; give --tokenizer-model")
    save(checkpoint, {"shape": asdict(replace(SHAPE, vocab_size=279))}, step=9)
    model = ["--tokenizer-model", str(tokenizer_dir / "tokenizer.json")]
    refused("the model has 279 tokens, the tokenizer 280; name the tokenizer", checkpoint, *model)
    save(checkpoint, {}, step=10)
    refused("its state holds no model shape")


def test_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["inspect", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj.weight" in printed
    assert "280 x 12" in printed
    count = sum(tensor.numel() for tensor in weights().values())
    assert "step 7, saved 20" in printed
    assert f": {count:,} parameters" in printed
    assert '"vocab_size": 280' in printed
    assert convert.main(["inspect", str(checkpoint / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_has_a_way_out(checkpoint: Path, tmp_path: Path) -> None:
    save(checkpoint, {"shape": asdict(SHAPE)}, step=8)
    assert to_hf(checkpoint, tmp_path / "out", "--no-tokenizer", "--no-verify") == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] is None


def test_there_and_back_needs_no_flags(checkpoint: Path, tmp_path: Path) -> None:
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify") == 0
    assert to_hf(tmp_path / "out", tmp_path / "ours", "--no-verify") == 0
    assert (tmp_path / "ours/tokenizer.json").is_file()
    megatron = ("--to-format", "megatron", "--no-verify")
    assert to_hf(tmp_path / "out", tmp_path / "megatron", *megatron) == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "from_megatron", "--no-verify") == 0
    assert (tmp_path / "from_megatron/tokenizer.json").is_file(), "they lie beside its iterations"
    assert to_hf(tmp_path / "ours", tmp_path / "again", "--no-verify") == 0
    for name in ("tokenizer.json", "config.json", "generation_config.json", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert "| converted from | out |" in (tmp_path / "again/README.md").read_text()


def test_a_llama_stays_a_llama_and_keeps_what_it_says(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Published, ours, published again, and ours once more: norms, several end tokens, settings of generation."""
    transformers = pytest.importorskip("transformers", reason="it writes the first files (extra hf)")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None}
    config = transformers.LlamaConfig(
        vocab_size=280, max_position_embeddings=48, tie_word_embeddings=False, **sizes, **ids
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(tmp_path / "meta")
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, tmp_path / "meta")
    assert to_hf(tmp_path / "meta", tmp_path / "ours", "--no-verify") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "again", "--no-verify") == 0
    assert to_hf(tmp_path / "again", tmp_path / "back", "--no-verify") == 0
    first, second = (CheckpointReader(tmp_path / name).shape() for name in ("ours", "back"))
    assert (first.norm_order, first.seq_len) == ("llama", 48)
    assert second == first
    for folder in ("meta", "again"):
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert (generation["eos_token_id"], generation["temperature"]) == ([2, 7], 0.5)
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == [2, 7]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 7]
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 7]
    assert to_hf(tmp_path / "meta", tmp_path / "aquila", "--no-verify", "--norm-order", "aquila") == 0
    assert CheckpointReader(tmp_path / "aquila").shape().norm_order == "aquila"
    assert to_hf(tmp_path / "aquila", tmp_path / "its", "--no-verify", "--no-tokenizer") == 0
    assert json.loads((tmp_path / "its/config.json").read_text())["norm_order"] == "aquila"


def test_the_card_says_what_the_run_says(checkpoint: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    one = {"weight": 0.5, "tokens": 1234, "index_sha256": "ab" * 32}
    train = {"applied_steps": 8, "consumed_samples": 72, "consumed_tokens": 576, "skipped_samples": [[8, 16]]}
    save(checkpoint, {"shape": asdict(SHAPE), "train": train, "data": {"sets": [one]}, "precision": "bf16"}, step=9)
    start = {"step": 0, "run": "abc", "world": 4, "layout": {"tp": 2, "dp": 2}, "version": "1.0", "commit": "c0ffee"}
    sizes = ("--num-layers", "1", "--hidden-size", "16", "--num-attention-heads", "2", "--seq-length", "48")
    paths = ("--data-path", "0.5", "/data/zh_web", "0.5", "/data/code", "--init-from-hf", "/models/llama-zh")
    rates = ("--lr", "3e-4", "--min-lr", "3e-5", "--lr-warmup-samples", "2000", "--global-batch-size", "1024")
    config = load_config([*sizes, *paths, *rates, "--train-only", "embeddings"], prog="test").config
    start |= {"config": {name: plain(value_of(config, name)) for name in all_settings()}}
    start |= {"checkpoint": None, "weights": None}
    with closing(Ledger(checkpoint / "ledger.jsonl")) as ledger:
        ledger.write("start", **start)
        ledger.write("start", **start | {"step": 10, "run": "later", "version": "2.0"})
    with closing(JsonLinesWriter(checkpoint / "log.jsonl")) as log:
        log.write({"step": 8, "loss": 2.5, "valid_loss": 2.75})
        log.write({"step": 9, "loss": 2.25})
        log.write({"step": 10, "loss": 1.0})
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify", "--tokenizer-model", str(tokenizer_dir)) == 0
    card = (tmp_path / "out/README.md").read_text()
    rows = (
        "| steps | 9, of which 8 updated the weights |", "| samples | 72, of which 8 were left out |",
        "| tokens | 576 |",
        "| data set 1 | 1,234 tokens, weight 0.5, index abababababab |", "| run | abc, 1 start |",
        "| began from | the published weights llama-zh |", "| trained | embeddings alone; all other weights are",
        "| batch | 1,024 samples of 48 tokens |",
        "| learning rate | 0.0003, cosine to 3e-05, after a warm-up of 2,000 samples |",
        "| training loss | 2.2500 nats a token, at step 9 |", "| validation loss | 2.7500 nats a token, at step 8 |",
       
        "| data sets | zh_web, code |", "| layouts | 4 ranks: tp 2 dp 2 |", "| versions | 1.0 (c0ffee) |",
        "| special ids | begin 278, end 279, padding 0 |", "not verified: --no-verify",
    )  # fmt: skip
    assert [row for row in rows if row not in card] == []
    assert "/data" not in card
    assert "/models" not in card
    assert "README.md" in (tmp_path / "out/SHA256SUMS").read_text()


@pytest.mark.parametrize(
    ("flag", "value", "found"),
    [
        ("--position-embedding", "rope-interleaved", "rope"), ("--seq-len", "4096", str(SHAPE.seq_len)),
        ("--norm-order", "llama", "aquila"), ("--vocab-size", "279", "280"),
    ],
)  # fmt: skip
def test_our_checkpoint_says_so_itself(checkpoint: Path, tmp_path: Path, capsys, flag, value, found) -> None:
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify", flag, value) == 2
    error = capsys.readouterr().err
    assert f"{flag} {value}: " in error
    assert f"says {found}; leave it out" in error
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify", flag, found) == 0, "the same is no contradiction"


def test_a_family_is_for_published_files(checkpoint: Path, tmp_path: Path, capsys) -> None:
    for form in ("checkpoint", "megatron"):
        assert to_hf(checkpoint, tmp_path / "out", "--to-format", form, "--family", "llama") == 2
        assert "--family llama: published files have one, which are neither" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_two_do_not_convert_into_one_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with conversion.alone(tmp_path / "out"):
        assert to_hf(checkpoint, tmp_path / "out", "--no-verify") == 2
    assert "another process is converting into it" in capsys.readouterr().err
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify") == 0
    assert to_hf(checkpoint, tmp_path / "out", "--no-verify") == 2
    assert "it exists already" in capsys.readouterr().err
