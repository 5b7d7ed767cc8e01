"""Every family into a checkpoint, through Megatron's form, and out again; killed on the way, and taken up."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_aquila.checkpoint import conversion
from megatron_aquila.checkpoint.families import family_of_shape
from megatron_aquila.checkpoint.published import model_shape, open_weights
from megatron_aquila.checkpoint.tensorfile import FileRecord, file_sha256, write_tensors
from megatron_aquila.commands import convert
from megatron_aquila.errors import CheckpointError
from tests.checkpoint.plain_networks import (
    AQUILA,
    BAICHUAN,
    aquila_files,
    aquila_logits,
    baichuan_files,
    error,
    folder_of,
)

ROOT = Path(__file__).parents[2]
ALIBI = BAICHUAN | {"position_embedding": "alibi"}
SMALL = ("--shard-size", "0.004MB", "--seq-len", "16")
MEGATRON = ("--to-format", "megatron", "--tp", "2", "--pp", "2", "--vocab-multiple", "8", "--drop-score-clamp")


def run(source: Path, output: Path, *more: str) -> None:
    assert convert.main(["--from", str(source), "--to", str(output), *SMALL, *more]) == 0


def published(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def aquila(tmp_path: Path) -> Path:
    (tmp_path / "aquila").mkdir()
    return folder_of(tmp_path / "aquila", AQUILA, aquila_files(), "module")


@pytest.mark.parametrize(
    ("config", "make"), [(AQUILA, aquila_files), (BAICHUAN, baichuan_files), (ALIBI, baichuan_files)]
)
def test_published_weights_come_back_byte_for_byte(tmp_path: Path, config, make) -> None:
    files = make()
    (tmp_path / "in").mkdir()
    source = folder_of(tmp_path / "in", config, files)
    (source / "tokenizer_config.json").write_text("{}")
    run(source, tmp_path / "ours")
    certificate = json.loads((tmp_path / "ours/certificate.json").read_text())
    assert certificate["round_trip"] == "byte-equal"
    assert "logits not compared: in transformers' Llama" in certificate["logits"]
    family = family_of_shape(open_weights(tmp_path / "ours").shape())
    assert family.name == ("aquila" if config is AQUILA else "baichuan2"), "Llama's form would lose something"
    run(tmp_path / "ours", tmp_path / "out", "--no-tokenizer")
    again = published(tmp_path / "out")
    assert set(again) == set(files)
    assert all(torch.equal(again[name], files[name]) for name in files)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert not list((tmp_path / "out").rglob("progress.json"))
    assert "certificate.json" in (tmp_path / "out/SHA256SUMS").read_text()
    run(source, tmp_path / "copied", "--to-format", "hf", "--family", family.name)
    assert (tmp_path / "copied/tokenizer_config.json").is_file()


@pytest.mark.parametrize(("config", "make"), [(AQUILA, aquila_files), (BAICHUAN, baichuan_files)])
def test_the_order_of_norms_comes_back(tmp_path: Path, config, make) -> None:
    (tmp_path / "in").mkdir()
    source = folder_of(tmp_path / "in", config | {"norm_order": "aquila"}, make())
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "out", "--no-tokenizer")
    assert json.loads((tmp_path / "out/config.json").read_text())["norm_order"] == "aquila"
    assert model_shape(open_weights(tmp_path / "out")).norm_order == "aquila"


@pytest.mark.parametrize(
    ("config", "make", "said"),
    [
        (AQUILA, aquila_files, {"initializer_range": 0.08}),
        (BAICHUAN, baichuan_files, {"initializer_range": 0.08, "z_loss_weight": 2e-4}),
    ],
)
def test_numbers_of_training_come_back(tmp_path: Path, config, make, said) -> None:
    (tmp_path / "in").mkdir()
    source = folder_of(tmp_path / "in", config | said, make())
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "out", "--no-tokenizer")
    found = json.loads((tmp_path / "out/config.json").read_text())
    assert {name: found[name] for name in said} == said


def test_through_megatrons_form_the_spread_of_the_first_weights_comes_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    run(folder_of(tmp_path / "in", AQUILA | {"initializer_range": 0.08}, aquila_files()), tmp_path / "mg", *MEGATRON)
    run(tmp_path / "mg", tmp_path / "out", "--to-format", "hf", "--no-tokenizer", "--no-verify")
    assert json.loads((tmp_path / "out/config.json").read_text())["initializer_range"] == 0.08


def test_through_megatrons_form_and_half_split(aquila: Path, tmp_path: Path) -> None:
    expected = aquila_logits(torch.load(aquila / "pytorch_model.bin")["module"])
    run(aquila, tmp_path / "megatron", *MEGATRON)
    run(tmp_path / "megatron", tmp_path / "ours", "--position-embedding", "rope-interleaved")
    reader = open_weights(tmp_path / "ours")
    first = open_weights(aquila)
    assert all(torch.equal(reader.read(name), first.read(name)) for name in first.tensors)
    assert reader.shape_fields()["position_embedding"] == "rope-interleaved"
    assert reader.shape_fields()["norm_order"] == "llama"
    assert reader.shape_fields()["score_clamp"] is None
    told = json.loads((tmp_path / "megatron/certificate.json").read_text())["logits"]
    assert "the clamp of scores at 1024 was left out" in told
    run(aquila, tmp_path / "halves", "--position-embedding", "rope", "--dtype", "fp32")
    assert error(open_weights(tmp_path / "halves"), expected) < 1e-5


def test_a_unit_length_head_becomes_a_plain_one_for_llama(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the judge of the folder is transformers (extra hf)")
    (tmp_path / "in").mkdir()
    source = folder_of(tmp_path / "in", BAICHUAN, baichuan_files())
    run(source, tmp_path / "out", "--to-format", "hf", "--family", "llama")
    assert "fp32 logits agree" in json.loads((tmp_path / "out/certificate.json").read_text())["logits"]
    head = published(tmp_path / "out")["lm_head.weight"]
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))


def test_a_killed_conversion_is_taken_up(aquila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def killed(path: Path, *args, **kwargs):
        if len(written) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(path.name)
        return write_tensors(path, *args, **kwargs)

    monkeypatch.setattr(conversion, "write_tensors", killed)
    assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL]) == 130
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.tmp/progress.json").read_text())["done"]) == 3
    damaged = tmp_path / "out.tmp/step_0000000" / written[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again: list[str] = []

    def watched(path: Path, *args, **kwargs):
        again.append(path.name)
        return write_tensors(path, *args, **kwargs)

    monkeypatch.setattr(conversion, "write_tensors", watched)
    run(aquila, tmp_path / "out")
    assert written[0] not in again
    assert written[2] not in again
    assert written[1] in again, "a damaged file is written anew"
    run(aquila, tmp_path / "straight")
    for file in (tmp_path / "straight/step_0000000").iterdir():
        assert (tmp_path / "out/step_0000000" / file.name).read_bytes() == file.read_bytes()


KILLS_ITSELF = """
import os, signal, sys
from megatron_aquila.checkpoint import conversion
from megatron_aquila.commands import convert

write, written = conversion.write_tensors, []

def killed(path, *rest):
    if len(written) == 3:
        path.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path.name)
    return write(path, *rest)

conversion.write_tensors = killed
convert.main(sys.argv[1:])
"""


def test_a_process_that_is_killed_leaves_what_the_next_goes_on_with(aquila: Path, tmp_path: Path, monkeypatch) -> None:
    """SIGKILL: nothing is tidied up, and the lock goes with the process."""
    command = ["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", KILLS_ITSELF, *command], env=os.environ | {"PYTHONPATH": paths}, timeout=300, check=False
    )
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(done := json.loads((tmp_path / "out.tmp/progress.json").read_text())["done"]) == 3
    again: list[str] = []

    def watched(path: Path, *args, **kwargs):
        again.append(path.name)
        return write_tensors(path, *args, **kwargs)

    monkeypatch.setattr(conversion, "write_tensors", watched)
    run(aquila, tmp_path / "out")
    assert {Path(name).name for name in done}.isdisjoint(again)
    run(aquila, tmp_path / "straight")
    assert (tmp_path / "out/SHA256SUMS").read_text() == (tmp_path / "straight/SHA256SUMS").read_text()


@pytest.mark.parametrize("form", [("--to-format", "checkpoint"), MEGATRON])
def test_the_bytes_do_not_depend_on_the_workers(aquila: Path, tmp_path: Path, form: tuple[str, ...]) -> None:
    for workers in ("1", "3"):
        run(aquila, tmp_path / workers, *form, "--workers", workers)
    assert (tmp_path / "1/SHA256SUMS").read_text() == (tmp_path / "3/SHA256SUMS").read_text()


def test_one_of_several_workers_fails(aquila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = conversion.finite

    def damaged(reader, dtype: torch.dtype, name: str) -> torch.Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise CheckpointError("a damaged file")
        return right(reader, dtype, name)

    monkeypatch.setattr(conversion, "finite", damaged)
    assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL, "--workers", "3"]) == 2
    assert "a damaged file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_settings_begin_anew(aquila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/progress.json").write_text(json.dumps({"plan": {"from": "elsewhere"}, "done": {}}))
    (tmp_path / "out.tmp/stray").write_text("")
    run(aquila, tmp_path / "out")
    assert not (tmp_path / "out/stray").exists()


def test_another_split_into_as_many_files_begins_anew(aquila: Path, tmp_path: Path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_text", killed)  # all files are written, nothing names them
        assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), "--shard-size", "0.016MB"]) == 130
    before = sorted(path.name for path in (tmp_path / "out.tmp/step_0000000").iterdir())
    size = ("--shard-size", "0.018MB")
    run(aquila, tmp_path / "out", *size)
    run(aquila, tmp_path / "straight", *size)
    for name in (after := [path.name for path in (tmp_path / "out/step_0000000").glob("rank_*")]):
        assert (tmp_path / "out/step_0000000" / name).read_bytes() == (
            tmp_path / "straight/step_0000000" / name
        ).read_bytes()
    assert sorted(after) == before, "the case that is meant: as many files"


def test_a_folder_that_no_conversion_has_left_is_not_emptied(aquila: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/thesis.tex").write_text("mine")
    assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out")]) == 2
    assert "what it holds is of none; move it elsewhere" in capsys.readouterr().err
    assert (tmp_path / "out.tmp/thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("killed_at", ["rename", "sync_folder"])
def test_killed_while_it_is_named(aquila: Path, tmp_path: Path, monkeypatch, capsys, killed_at: str) -> None:
    """Before the name it is taken up, with nothing written twice; after it, the folder is whole."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion.os if killed_at == "rename" else conversion, killed_at, killed)
        assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL]) == 130
    code = convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL])
    assert (code, (tmp_path / "out.tmp").exists()) == ((0, False) if killed_at == "rename" else (2, False))
    run(aquila, tmp_path / "straight")
    assert (tmp_path / "out/SHA256SUMS").read_text() == (tmp_path / "straight/SHA256SUMS").read_text()
    assert not (tmp_path / "out/progress.json").exists()


def test_a_killed_conversion_does_not_go_on_with_another_tokenizer(tmp_path: Path) -> None:
    """The files at the same path have changed: half of the output would be of each."""
    first, same, other = ({"from": "x", "dtype": "y", "tokenizer": name} for name in ("a" * 64, "a" * 64, "b" * 64))
    (tmp_path / "shard").write_bytes(b"whole")
    record = FileRecord(5, file_sha256(tmp_path / "shard"))
    conversion.write_json(tmp_path / "progress.json", {"plan": first, "done": {"shard": [5, record.sha256]}})
    assert conversion.finished_files(tmp_path, same) == {"shard": record}
    with pytest.raises(CheckpointError, match=r"another tokenizer \(fingerprint a{12}, not b{12}\)"):
        conversion.finished_files(tmp_path, other)
    assert (tmp_path / "shard").is_file()
    assert conversion.finished_files(tmp_path, other | {"dtype": "z"}) == {}, "asked for with a flag: begun anew"
    assert not (tmp_path / "shard").exists()


def test_the_plan_says_what_is_read_and_how_it_is_cut(aquila: Path, tmp_path: Path) -> None:
    run(aquila, tmp_path / "a", *MEGATRON)
    run(aquila, tmp_path / "b", *MEGATRON, "--vocab-multiple", "32")
    a, b = (json.loads((tmp_path / name / "certificate.json").read_text()) for name in "ab")
    assert a["to"] != b["to"]
    assert (a["content"], a["tokenizer"]) == (b["content"], None)
    content = conversion.content_of(open_weights(aquila))
    (aquila / "out.tmp").mkdir()
    for name in ("out.tmp/model.safetensors", "README.md"):
        (aquila / name).write_text("no weights of the source")
    assert conversion.content_of(open_weights(aquila)) == content == a["content"]
    torch.save(aquila_files(), aquila / "pytorch_model.bin")
    assert conversion.content_of(open_weights(aquila)) != content


def test_what_is_read_back_otherwise_gets_no_name(
    aquila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = conversion.digest
    seen: list[int] = []

    def wrong(tensor: torch.Tensor) -> str:
        seen.append(1)
        return right(tensor + 1) if len(seen) == 6 else right(tensor)

    monkeypatch.setattr(conversion, "digest", wrong)
    assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *SMALL]) == 2
    assert "was read back other than it was written" in capsys.readouterr().err
    assert (tmp_path / "out.tmp").is_dir()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--shard-size", "5"), "--shard-size 5: it is no size"),
        (("--workers", "0"), "--workers 0: at least one thread writes"),
        (("--to-format", "hf", "--family", "baichuan2"), "--family baichuan2: its files cannot hold this model"),
        (("--to-format", "megatron", "--tp", "4", "--drop-score-clamp"), "num_kv_heads 6 by 4"),
        (("--to-format", "megatron"), "does not clamp scores; --drop-score-clamp leaves it out"),
        (("--to-format", "hf", "--family", "llama"), "scores are not clamped; --drop-score-clamp leaves it out"),
        (("--norm-order", "aquila"), "--norm-order aquila"),
        (("--vocab-size", "30"), "says 29; leave it out"),
        (("--tp", "2"), "--tp 2: Megatron's files have it, and none are written; give --to-format megatron"),
        (("--to-format", "hf", "--pp", "2", "--chunks", "2"), "--pp 2: Megatron's files have it, and none"),
        (("--megatron-names", "core"), "--megatron-names core: "),
        (("--vocab-multiple", "8"), "--vocab-multiple 8: "),
        (("--dtype", "fp16"), "not finite in torch.float16"),
    ],
)
def test_what_cannot_be_written_is_refused(aquila: Path, tmp_path: Path, more, why, capsys) -> None:
    files = aquila_files()
    files["norm.weight"][0] = 1e30
    torch.save(files, aquila / "pytorch_model.bin")
    assert convert.main(["--from", str(aquila), "--to", str(tmp_path / "out"), *more]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_megatrons_form_holds_neither_alibi_nor_a_unit_length_head(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    source = folder_of(tmp_path / "in", ALIBI, baichuan_files())
    assert convert.main(["--from", str(source), "--to", str(tmp_path / "out"), "--to-format", "megatron"]) == 2
    assert "rotary positions and a plain head" in capsys.readouterr().err
