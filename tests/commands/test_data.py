"""``aquila data``: what its commands print, and how they fail."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands import data
from megatron_aquila.commands.data import main
from megatron_aquila.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_aquila.data.manifest import read_manifest, write_manifest
from megatron_aquila.data.tokenizer import load_tokenizer
from megatron_aquila.data.trace import trace_sample
from megatron_aquila.errors import CheckpointError, DataError
from megatron_aquila.observe.ledger import Ledger
from megatron_aquila.train.traced import trace_config, trace_run
from tests.train.runs import run, tiny_config


def write(prefix: Path, tokens: int) -> str:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.arange(tokens), np.array([tokens - 2, 2]))
    return str(prefix)


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 9), write(tmp_path / "b", 4)
    assert main(["verify", a, b, "--deep"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok     {a}: 2 documents, 2 sequences, 9 tokens of uint16",
        f"ok     {b}: 2 documents, 2 sequences, 4 tokens of uint16",
    ]
    dotted = write(tmp_path / "c.bin", 5)
    assert main(["verify", f"{a}.idx", f"{a}.bin", f"{a}.manifest.json", dotted, f"{dotted}.idx"]) == 0
    named = [line.split(":")[0].removeprefix("ok").strip() for line in capsys.readouterr().out.splitlines()]
    assert named == [a, a, a, dotted, dotted], "what a prefix has of dots stays"
    Path(f"{a}.bin").write_bytes(bytes(18))
    Path(f"{b}.manifest.json").unlink()
    assert main(["verify", a, b]) == 1
    failed, why, fine, unchecked = capsys.readouterr().out.splitlines()
    assert failed.startswith(f"FAILED {a}: 2 documents")
    assert f"{a}.bin: its SHA-256 is" in why
    assert fine.startswith(f"ok     {b}")
    assert unchecked.strip().startswith("no manifest:")


def test_verify_what_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [write(tmp_path / name, 9) for name in ("a", "b", "c", "d")]
    file = tmp_path / "run.yaml"
    told = {"path": [".5", sets[0], ".5", sets[1]], "valid_path": [sets[2]], "valid_sets": {"held": sets[3]}}
    file.write_text(json.dumps({"data": told}))
    assert main(["verify", "--config", str(file), "--deep"]) == 0
    found = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == [f"ok     {prefix}" for prefix in sets]
    Path(f"{sets[3]}.bin").write_bytes(bytes(18))
    assert main(["verify", "--config", str(file)]) == 1
    assert f"FAILED {sets[3]}: 2 documents" in capsys.readouterr().out
    assert main(["verify", sets[0], "--config", str(file)]) == 2
    assert "prefixes are named too; give one of the two" in capsys.readouterr().err
    file.write_text("{}")
    assert main(["verify", "--config", str(file)]) == 2
    assert "verify: no data set is named; give the prefixes" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["verify", "verify --deep", "inspect", "stats", "merge", "merge out", "index"])
def test_no_data_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words.split())
    except SystemExit as usage:  # tyro's own, where a word is missing
        status = usage.code  # type: ignore[assignment]
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err != ""


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = write(tmp_path / "a", 9), write(tmp_path / "b", 4), str(tmp_path / "out")
    assert main(["merge", out, a, b]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 4 documents, 13 tokens of uint16\n"
    assert IndexedDataset(out)[2].tolist() == [0, 1]
    assert main(["merge", out, a]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["merge", out, a, "--overwrite"]) == 0
    manifest = read_manifest(a)
    assert manifest is not None
    write_manifest(a, replace(manifest, origin=replace(manifest.origin, options={"shard": [0, 2]})))
    assert main(["merge", out, a, "--overwrite"]) == 2
    assert "1/2 is missing; make it first, or give --partial if it is meant" in capsys.readouterr().err
    assert main(["merge", out, a, "--overwrite", "--partial"]) == 0


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: aquila data verify")
    for wrong in ([], ["nothing"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith("usage: aquila data verify")


def settings(path: str, cache: Path) -> list[str]:
    sizes = "--seq-len 8 --global-batch 4 --train-samples 12 --vocab-size 100 --eval-interval 0 --split 1"
    return ["--data-path", path, "--data-cache-path", str(cache), *sizes.split()]


def test_index_and_trace_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = write(tmp_path / "a", 90), tmp_path / "cache"
    assert main(["index", *settings(path, cache)]) == 0
    assert "a (train): 2 sequences, 90 tokens, 2 epochs" in capsys.readouterr().out
    built = sorted(cache.iterdir())
    assert len(built) == 1
    assert main(["trace", *settings(path, cache), "--step", "3"]) == 0
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("step")] == [
        f"step 3, sample {sample}" for sample in range(8, 12)
    ]
    assert sorted(cache.iterdir()) == built, "the trace found what the index made"
    assert main(["trace", *settings(path, cache), "--sample", "0"]) == 0
    head, place, ids = capsys.readouterr().out.splitlines()[:3]
    assert head.startswith("step 1, sample 0: ")
    assert place.startswith(f"  {path}: document 0, tokens ")
    numbers = [int(word) for word in ids.split()]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert main(["trace", *settings(path, cache), "--document", "0"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "document 0: in 12 samples of 12"
    assert rows[5] == "  step 2, sample 5"


def test_texts_are_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--seq-len", "400", "--vocab-size", "900"]
    words = ["trace", *settings(write(tmp_path / "a", 900), tmp_path / "cache"), *sizes, "--sample", "0"]
    assert main(words) == 0
    assert " ... " in capsys.readouterr().out
    assert main([*words, "--full"]) == 0
    shown = capsys.readouterr().out
    ids = [line.split() for line in shown.splitlines() if not line.strip().startswith(("step", str(tmp_path)))]
    assert sum(map(len, ids)) == 401, "the label of the last token is shown too"
    assert " ... " not in shown


def test_an_index_that_lacks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cache = write(tmp_path / "a", 90), tmp_path / "cache"
    assert main(["index", *settings(path, cache)]) == 0
    next(cache.glob("*/shuffle_index.npy")).unlink()
    assert main(["trace", *settings(path, cache), "--step", "1"]) == 2
    assert "shuffle_index.npy'); delete the folder to build it again" in capsys.readouterr().err


def test_texts_are_shown(tmp_path: Path, aquila_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"vocab_file": "vocab.json", "merge_file": "merges.txt", "special_tokens_file": "special_tokens.txt"}
    files = {name: aquila_tokenizer_dir / file for name, file in names.items()}
    tokenizer = load_tokenizer("AquilaTokenizer", **files)  # type: ignore[arg-type]
    text = "The quick brown fox jumps over the lazy dog. 春眠不觉晓,处处闻啼鸟。"
    with IndexedDatasetWriter(tmp_path / "a", np.int32) as writer:
        writer.add_sequence(tokenizer.encode(text))
        writer.end_document()
    words = settings(str(tmp_path / "a"), tmp_path / "cache")
    flags = [word for name, file in files.items() for word in (f"--{name.replace('_', '-')}", str(file))]
    words[words.index("--vocab-size") + 1] = str(tokenizer.vocab_size)
    assert main(["trace", *words, *flags, "--sample", "0"]) == 0
    shown = capsys.readouterr().out.splitlines()[2].strip()
    assert len(shown) > 10
    assert shown in text


def test_a_long_list_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHOWN", 2)
    path = write(tmp_path / "a", 90)
    assert main(["trace", *settings(path, tmp_path / "cache"), "--document", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  and 10 more, the last in step 3, sample 11"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "trace: nothing is asked; give one of --step N, --sample I and --document D"),
        ("--step 1 --sample 2", "--step --sample: one question at a time"),
        ("--step 0", "--step 0: the run's index of 12 samples has no such step"),
        ("--step 4", "--step 4: the run's index of 12 samples has no such step"),
        (f"--step {10**15}", f"--step {10**15}: the run's index of 12 samples has no such step"),
        ("--sample 12", "sample 12: the run's index has 12"),
        ("--document 2", "a: document 2: it has 2"),
    ],
)
def test_questions_without_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    path = write(tmp_path / "a", 90)
    assert main(["trace", *settings(path, tmp_path / "cache"), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--step", "1"]) == 2
    assert "trace: no run is named; give --run FOLDER" in capsys.readouterr().err
    assert main(["trace", "--step", "1", "--run", str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert "nowhere: there is no such folder" in told
    assert "--resume" not in told, "trace has no such flag"


def test_settings_beside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("seed: 7\ntrain: {global_batch: 4}\n")
    words = ["--run", str(tmp_path), "--step", "1", "--num-layers", "3", "--config", str(tmp_path / "a.yaml")]
    assert main(["trace", *words]) == 2
    told = capsys.readouterr().err
    assert f"--num-layers, file {tmp_path}/a.yaml: the checkpoints of --run say what the run read" in told


def test_a_run_says_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its checkpoints alone: the samples that the settings give, in a ramp of batches and an extended run too."""
    config = tiny_config(tmp_path, rampup_batch=(2, 2, 12), micro_batch=1)
    run(config)
    longer = replace(config.checkpoint, resume=True, override_lr_schedule=True)
    run(replace(config, train=replace(config.train, train_samples=64), checkpoint=longer))
    traced = trace_run(tmp_path / "run")
    assert traced.tokenizer is None
    bounds = [traced.samples_of(step).start for step in range(1, 6)]
    assert bounds == [0, 2, 4, 8, 14]
    assert [traced.step_of(sample) for sample in (0, 1, 2, 6, 13, 14)] == [1, 1, 2, 3, 4, 5]
    first = trace_config(config)
    assert len(traced.source) > len(first.source)
    for sample in range(len(first.source)):
        assert (traced.source[sample].tokens == first.source[sample].tokens).all()
    capsys.readouterr()
    assert main(["trace", "--run", str(tmp_path / "run"), "--step", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("step 2, sample ") == 2
    assert f"{tmp_path}/threes: document " in shown
    piece, *_ = trace_sample(traced.source, 5)
    asked = ["--document", str(piece.document), "--prefix", Path(piece.prefix).name]
    assert main(["trace", "--run", str(tmp_path / "run"), *asked]) == 0
    assert "  step 3, sample 5" in capsys.readouterr().out.splitlines()


def test_samples_that_were_left_out_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, train_samples=32, skip_samples=("4-7", "9-9"))
    run(config)
    folder = str(tmp_path / "run")
    traced = trace_run(tmp_path / "run")
    assert traced.skipped == ((4, 8), (9, 10)) == trace_config(config).skipped
    capsys.readouterr()
    for step, left_out in ((1, [4, 5, 6, 7]), (2, [9])):
        assert main(["trace", "--run", folder, "--step", str(step)]) == 0
        heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
        marked = [line.split(" (left out, not trained on): ")[0] for line in heads if "left out" in line]
        assert marked == [f"step {step}, sample {sample}" for sample in left_out]
    assert main(["trace", "--run", folder, "--sample", "9"]) == 0
    assert capsys.readouterr().out.startswith("step 2, sample 9 (left out, not trained on): ")
    piece, *_ = trace_sample(traced.source, 9)
    asked = ["--document", str(piece.document), "--prefix", Path(piece.prefix).name]
    assert main(["trace", "--run", folder, *asked]) == 0
    assert "  step 2, sample 9 (left out, not trained on)" in capsys.readouterr().out.splitlines()


def test_samples_that_a_rewind_left_out_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger knows of them before the next checkpoint does."""
    run(tiny_config(tmp_path, train_samples=16))
    folder = tmp_path / "run"
    ledger = Ledger(folder / "ledger.jsonl")
    start = {"run": "a", "origin": "fresh", "checkpoint": None, "step": 0, "samples": 0, "skipped": []}
    ledger.write("start", **start)
    saved = {"parent": None, "step": 2, "samples": 16, "ranges": [[0, 16]], "skipped": []}
    ledger.write("checkpoint", name="step_0000002", **saved)
    assert trace_run(folder).skipped == ()
    gone_back = {"step": 3, "samples": 24, "checkpoint": "step_0000002", "ranges": [[16, 24]], "reason": "a spike"}
    ledger.write("rewind", skipped=[[16, 24]], **gone_back)
    ledger.close()
    assert trace_run(folder).skipped == ((16, 24),)


def test_another_global_batch_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step has read what it then read, and what is to come goes on from there."""
    config = tiny_config(tmp_path, global_batch=2, train_samples=20, exit_samples=6)
    run(config)
    later = replace(config.train, global_batch=4, exit_samples=14)
    settings = replace(config.checkpoint, load=tmp_path / "run", save=tmp_path / "later", override_lr_schedule=True)
    run(replace(config, train=later, checkpoint=settings))
    traced = trace_run(tmp_path / "later")
    steps = [range(2), range(2, 4), range(4, 6), range(6, 10), range(10, 14), range(14, 18), range(18, 22)]
    assert [traced.samples_of(step) for step in range(1, 8)] == steps
    assert [traced.step_of(sample) for sample in (0, 5, 6, 13, 14, 21)] == [1, 3, 4, 5, 6, 7]
    capsys.readouterr()
    for asked, told in ((["--step", "3"], "step 3, sample 4: "), (["--sample", "13"], "step 5, sample 13: ")):
        assert main(["trace", "--run", str(tmp_path / "later"), *asked]) == 0
        assert capsys.readouterr().out.startswith(told)


def test_batches_that_an_early_checkpoint_did_not_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, train_samples=32, exit_samples=16)
    run(config)
    state = dict(CheckpointReader(tmp_path / "run").state)
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, path: None)
    train = {name: value for name, value in state["train"].items() if name != "batches"}  # type: ignore[attr-defined]
    monkeypatch.setattr(CheckpointReader, "state", state | {"train": train}, raising=False)
    words = ["trace", "--run", str(tmp_path / "run")]
    capsys.readouterr()
    assert main([*words, "--step", "2"]) == 0
    assert capsys.readouterr().out.startswith("step 2, sample 8: "), "what the settings say fits where the run stands"
    monkeypatch.setattr(CheckpointReader, "state", state | {"train": train | {"step": 3}}, raising=False)
    assert main([*words, "--step", "2"]) == 2
    assert "--step 2: it is not known what the first 3 steps read: their batches" in capsys.readouterr().err
    assert main([*words, "--step", "4"]) == 0
    assert capsys.readouterr().out.startswith("step 4, sample 16: ")
    assert main([*words, "--sample", "3"]) == 0
    assert capsys.readouterr().out.startswith("step unknown, sample 3: ")


def test_a_run_whose_data_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    run(config)
    state = dict(CheckpointReader(tmp_path / "run").state)
    assert "reads" in state

    def saved(changes: dict[str, object]) -> None:
        monkeypatch.setattr(CheckpointReader, "state", state | changes, raising=False)
        monkeypatch.setattr(CheckpointReader, "__init__", lambda self, path: None)

    saved({"reads": None})
    with pytest.raises(CheckpointError, match="does not say what its run read; give --config"):
        trace_run(tmp_path / "run")
    saved({"data": state["data"] | {"seq_len": 17}})  # type: ignore[operator]
    write(tmp_path / "threes", 60)
    with pytest.raises(DataError, match="the data is not what the run read: data set 1: sequences 60 there, 2 here"):
        trace_run(tmp_path / "run")
