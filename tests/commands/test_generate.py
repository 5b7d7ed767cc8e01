"""``aquila generate`` through its door: a Hugging Face folder and a checkpoint, chat, and what it refuses."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.layout import Chunk
from megatron_aquila.checkpoint.llama import SpecialIds, llama_tensors
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands import generate
from megatron_aquila.data.tokenizer_training import save_tokenizer_files, train_tokenizer
from megatron_aquila.parallel.context import ParallelContext
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.export import export_files
from tests.checkpoint.numbers import save_checkpoint
from tests.checkpoint.toy import SHAPE as TOY
from tests.commands.said import said

SHAPE = replace(TOY, vocab_size=280, padded_vocab_size=384, seq_len=400)
FILES = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights as our checkpoint and as a Hugging Face folder, with their tokenizer."""
    root = tmp_path_factory.mktemp("using")
    tokenizer = train_tokenizer(["the sea and the stars 海上的星星"] * 4, 280)
    save_tokenizer_files(tokenizer, root / "tokenizer")
    generator = torch.Generator().manual_seed(1)
    chunks = [
        Chunk(name, size, (0,) * len(size), torch.randn(size, generator=generator) * 0.5)
        for name, size in llama_tensors(SHAPE).items()
    ]
    files = {name: str(root / "tokenizer" / file) for name, file in FILES.items()} | {"tokenizer_model": None}
    state = {"shape": asdict(SHAPE), "tokenizer": {"tokenizer_type": "AquilaTokenizer", **files}}
    save_checkpoint(root / "ours", 3, chunks, state, ParallelContext.single())
    export_files(
        CheckpointReader(root / "ours"),
        root / "theirs",
        shape=SHAPE,
        dtype=torch.float32,
        ids=SpecialIds(bos=None, eos=None, pad=None),
        finish=lambda folder: save_tokenizer_files(tokenizer, folder),
    )
    return {"ours": root / "ours", "theirs": root / "theirs"}


def test_both_forms_say_the_same(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--temperature", "0", "--max-new-tokens", "9", "--json", "--prompt", "the sea", "海", "--ignore-eod"]
    said = []
    for folder in folders.values():
        assert generate.main(["--load", str(folder), *greedy]) == 0
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1]
    assert [found["prompt"] for found in said[0]] == ["the sea", "海"]
    assert all(len(found["tokens"]) == 9 and not found["is_ended"] for found in said[0])
    assert generate.main(["--load", str(folders["ours"]), *greedy, "--batch", "1"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == said[0]
    stop = said[0][0]["tokens"][2]
    assert generate.main(["--load", str(folders["ours"]), *greedy, "--stop-ids", str(stop)]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["is_ended"]
    assert first["tokens"][-1] == stop


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_ranks_that_share_prompts(folders: dict[str, Path], pool: Callable[[int], WorkerPool], method: str) -> None:
    settings = ["--precision", "fp64", "--max-new-tokens", "9", "--json", "--prompt", "the sea and the stars", "海"]
    argv = ["--load", str(folders["ours"]), *settings]
    alone = said(generate.main, argv)
    assert pool(2).run(said, generate.main, [*argv, "--cp", "2", "--cp-method", method]) == [alone, ""]
    assert said(generate.main, [*argv, "--seed", "1"]) != alone, "tokens are drawn"


def test_one_prompt_is_shown_as_it_grows_and_several_when_they_are_done(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--load", str(folders["theirs"]), "--seed", "5", "--max-new-tokens", "6", "--top-k", "40"]
    assert generate.main([*load, "--prompt", "the sea"]) == 0
    alone = capsys.readouterr().out
    assert generate.main([*load, "--prompt", "the sea", "stars"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"the sea >>> {alone[len('the sea') : -1]!r}"
    assert second.startswith("stars >>> ")


@pytest.mark.parametrize("template", ["aquila-v1", "aquila-legacy"])
def test_a_conversation(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nand then?\n"))
    settings = ["--chat", template, "--max-new-tokens", "4", "--temperature", "0", "--stop-words", "\n"]
    assert generate.main(["--load", str(folders["ours"]), *settings]) == 0
    answers = capsys.readouterr().out.split("\n")
    assert len(answers) == 3
    assert generate.main(["--load", str(folders["ours"]), *settings, "--json", "--prompt", "hi"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == answers[0]


def test_a_conversation_that_outgrows_the_model_goes_on(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last answers are those of a conversation of the last turns alone; what cannot be answered changes nothing."""
    settings = ["--load", str(folders["ours"]), "--chat", "aquila-v1", "--temperature", "0", "--max-new-tokens", "4"]

    def talk(*questions: str, seq_len: int) -> tuple[list[str], list[str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{question}\n" for question in questions)))
        assert generate.main([*settings, "--seq-len", str(seq_len), "--stop-words", "\n"]) == 0
        said = capsys.readouterr()
        return said.out.splitlines(), said.err.splitlines()

    questions = ["the sea", "the stars", "海", "the", "and"]
    whole, nothing = talk(*questions, seq_len=400)
    assert nothing == []
    short, told = talk(*questions[:2], "the sea " * 60, *questions[2:], seq_len=48)
    assert len(short) == len(whole) == 5
    assert short[:2] == whole[:2]
    assert told[0].startswith("note: not answered: with its template the question has ")
    assert told[0].endswith(" tokens; ask a shorter one; a sequence has 48 tokens at most, see --seq-len")
    assert told[1].startswith("note: the first 1 of ")
    assert "turns are left out from here on; a sequence has 48 tokens at most, see --seq-len" in told[1]


def test_a_model_of_short_sequences_is_asked_for_longer_ones(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a folder with linear scaling has it, whose config.json says the length before the stretch."""
    shutil.copytree(folders["theirs"], tmp_path / "short")
    path = tmp_path / "short" / "config.json"
    linear = {"rope_type": "linear", "type": "linear", "factor": 8.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8, "rope_scaling": linear}))
    prompt = ["--prompt", "the sea and the stars " * 3, "--temperature", "0", "--max-new-tokens", "4", "--json"]
    assert generate.main(["--load", str(tmp_path / "short"), *prompt]) == 2
    told = capsys.readouterr().err
    assert "a sequence has 8 at most, its answer too: give a shorter prompt, or a larger --seq-len" in told
    assert generate.main(["--load", str(tmp_path / "short"), *prompt, "--seq-len", "64"]) == 0
    longer = capsys.readouterr().out
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    assert generate.main(["--load", str(tmp_path / "short"), *prompt]) == 0
    assert capsys.readouterr().out == longer
    assert generate.main(["--load", str(folders["ours"]), *prompt, "--seq-len", "800", "--rope-scaling", "linear"]) == 0
    assert generate.main(["--load", str(folders["ours"]), *prompt, "--seq-len", "1"]) == 2
    assert "--seq-len 1: prompt and answer need 2" in capsys.readouterr().err


def test_what_is_refused(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*argv: str) -> str:
        assert generate.main(["--load", *argv]) == 2
        return capsys.readouterr().err

    ours = str(folders["ours"])
    assert "there is nothing to continue" in refused(ours)
    told = refused(ours, "--prompt", "a", "--temperature", "-1", "--top-p", "0", "--stop-words", "", "--top-k", "-1")
    assert [flag for flag in ("--temperature", "--top-p", "--stop-words", "--top-k") if flag in told] == [
        "--temperature", "--top-p", "--stop-words", "--top-k"
    ]  # fmt: skip
    assert "--tp x --cp x --pp 1 x 2 x 1: there are 1 processes, not 2" in refused(ours, "--prompt", "a", "--cp", "2")
    layout = refused(ours, "--prompt", "a", "--tp", "3", "--pp", "9")
    for why in ("num_heads 4 is not divisible", "has 2 layers", "there are 1 processes, not 27"):
        assert why in layout
    assert "there is no such folder" in refused(str(tmp_path / "nowhere"), "--prompt", "a")
    assert "prompt 1 is empty" in refused(ours, "--prompt", "")
    assert "gone.json is not there; give --tokenizer-model" in refused(
        ours, "--prompt", "a", "--tokenizer-model", "gone.json"
    )
    train = train_tokenizer(["many other words that are longer than those " * 3, "abcdefg hijklmnop"], 300)
    save_tokenizer_files(train, tmp_path / "larger")
    assert "the model has 280 tokens, the tokenizer 300" in refused(
        ours, "--prompt", "a", "--tokenizer-model", str(tmp_path / "larger")
    )
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / "bare" / name).write_bytes((folders["theirs"] / name).read_bytes())
    for path in folders["theirs"].glob("*.safetensors"):
        (tmp_path / "bare" / path.name).symlink_to(path)
    bare = str(tmp_path / "bare")
    assert "it names no tokenizer, and none lies beside it; give --tokenizer-model" in refused(bare, "--prompt", "a")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "tie_word_embeddings is True" in refused(bare, "--prompt", "a")


def test_any_of_the_publishers_end_tokens_ends(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = ["--temperature", "0", "--max-new-tokens", "6", "--json", "--prompt", "the sea"]

    def tokens(*more: str) -> list[int]:
        assert generate.main(["--load", str(tmp_path / "copy"), *greedy, *more]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return found

    shutil.copytree(folders["theirs"], tmp_path / "copy")
    free = tokens("--ignore-eod")
    path = tmp_path / "copy/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [278, free[2]]}))
    stop = free.index(free[2])
    assert tokens() in (free[:stop], free[: stop + 1])
    assert tokens("--ignore-eod") == free


def test_a_tokenizer_that_was_changed_since(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = CheckpointReader(folders["ours"])
    chunks = [Chunk(name, size, (0,) * len(size), reader.read(name)) for name, size in llama_tensors(SHAPE).items()]
    named = {**reader.state["tokenizer"], "fingerprint": "0" * 64}
    save_checkpoint(tmp_path / "run", 1, chunks, {"shape": asdict(SHAPE), "tokenizer": named}, ParallelContext.single())
    assert generate.main(["--load", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "not the tokenizer that the run was trained with" in capsys.readouterr().err
