"""The real thing: torchrun, the script, a signal in the middle, a resume on another layout."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_aquila.observe.ledger import read_ledger
from megatron_aquila.observe.lineage import check_ledger
from tests.train.runs import VOCAB_SIZE, write_corpus

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(folder: Path, *flags: str) -> list[str]:
    config = folder / "run.yaml"
    config.write_text(
        f"""
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_size: 48, vocab_size: {VOCAB_SIZE},
  vocab_multiple: 8, seq_len: 16}}
data: {{path: [{", ".join(map(repr, write_corpus(folder)))}], split: "90,10,0", cache_path: {folder / "cache"}}}
optim: {{lr: 1.0e-2, min_lr: 1.0e-3, lr_warmup_samples: 8}}
train: {{train_samples: 4000, micro_batch: 2, global_batch: 8, precision: fp32, device: cpu, eval_iters: 1}}
checkpoint: {{save: {folder / "run"}}}
"""
    )
    return [*TORCHRUN, "pretrain_aquila.py", "--config", str(config), *flags]


def rows(folder: Path) -> list[dict[str, float]]:
    parsed = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [row for row in parsed if "loss" in row]


@pytest.mark.end_to_end
def test_torchrun_stops_on_sigterm_and_resumes_on_another_layout(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    with (tmp_path / "out").open("w") as out:
        first = subprocess.Popen(
            command(tmp_path, "--tp", "2", "--sp"), cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out
        )
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 3):
            assert first.poll() is None, (tmp_path / "out").read_text()
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=60)
    assert "stopped at step" in (tmp_path / "out").read_text()
    stopped = int(rows(tmp_path)[-1]["step"])
    assert (tmp_path / "run" / "latest").read_text().strip() == f"step_{stopped:07d}"
    until = str(8 * (stopped + 2))
    flags = ("--pp", "2", "--load", str(tmp_path / "run"), "--exit-samples", until)
    second = subprocess.run(command(tmp_path, *flags), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, stopped + 3))
    assert "(flag --load)" in second.stdout


@pytest.mark.end_to_end
def test_a_refusal_under_torchrun_is_one_message_and_status_2_on_every_rank(tmp_path: Path) -> None:
    words = command(tmp_path, "--load", str(tmp_path / "nowhere"))
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("nowhere: there is no such folder") == 1, done.stderr
    assert "exitcode: 2" in done.stderr.replace("exitcode  : 2", "exitcode: 2"), done.stderr
    assert "terminate called" not in done.stderr


def elastic(folder: Path, name: str, kill_after: int) -> tuple[str, dict[int, float], dict[str, bytes]]:
    """A run of 8 steps that saves every third into ``folder/name``; rank 1 is killed once (0: never)."""
    words = command(folder, "--save", str(folder / name), "--save-interval", "3", "--resume", "--exit-samples", "64")
    script = words.index("pretrain_aquila.py")
    who = "rank" if kill_after else "nobody"
    words[script : script + 1] = ["tests/train/kill_once.py", str(kill_after), str(folder / "marker"), who]
    words[len(TORCHRUN) : len(TORCHRUN)] = ["--max-restarts", "2"]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parsed = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in parsed if "loss" in row}
    last = folder / name / "step_0000008"
    return done.stdout + done.stderr, losses, {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


@pytest.mark.end_to_end
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """torchrun's store still holds the dead processes' addresses: a rank that read them would never connect."""
    killed, losses, tensors = elastic(tmp_path, "killed", kill_after=5)
    assert "at step 3, 24 samples" in killed, "it went on from the last checkpoint"
    assert "is gone, stuck or late: noticed in" in killed, "the survivor says why it left"
    _, expected_losses, expected = elastic(tmp_path, "whole", kill_after=0)
    assert losses == expected_losses
    assert sorted(losses) == list(range(1, 9))
    assert tensors == expected
    assert len(tensors) == 2


def agent(folder: Path, port: int, who: str, *, hosts: bool) -> subprocess.Popen[bytes]:
    """One of one or two nodes, each of one process; ``hosts`` the rendezvous. It writes into ``folder/who.out``."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
    words += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    settings = f"is_host={int(hosts)},last_call_timeout=12,keep_alive_interval=2,keep_alive_max_attempt=5"
    words += ["--rdzv-id", "elastic", "--rdzv-conf", settings]
    words += ["tests/train/kill_once.py", "5", str(folder / "marker"), who]
    words += command(folder, "--precision", "fp64", "--save-interval", "3", "--exit-samples", "64")[len(TORCHRUN) + 1 :]
    words += ["--save", str(folder / "run"), "--elastic", "--resume"]
    with (folder / f"{who}.out").open("w") as out:
        return subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out)


@pytest.mark.end_to_end
def test_an_elastic_run_goes_on_with_the_node_that_is_left_and_the_same_batch(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    nodes = [agent(tmp_path, port, "nobody", hosts=True), agent(tmp_path, port, "node", hosts=False)]
    try:
        statuses = [node.wait(timeout=400) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    said = (tmp_path / "nobody.out").read_text()
    assert statuses == [0, -signal.SIGKILL], said
    events = read_ledger(tmp_path / "run")
    starts = [event for event in events if event["event"] == "start"]
    assert [(one["world"], one["layout"]["dp"], one["step"]) for one in starts][-2:] == [(2, 2, 0), (1, 1, 3)], said
    assert check_ledger(events).holds, check_ledger(events).problems
    assert check_ledger(events).consumed == ((0, 64),)
    by_step = {row["step"]: row for row in rows(tmp_path)}
    whole = command(tmp_path, "--precision", "fp64", "--save", str(tmp_path / "whole" / "run"), "--exit-samples", "64")
    done = subprocess.run(whole, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {row["step"]: row for row in rows(tmp_path / "whole")}
    assert sorted(by_step) == sorted(expected) == list(range(1, 9))
    for step, row in expected.items():
        exact = {"rel": 0, "abs": 0} if step <= 3 else {"rel": 1e-9}  # then sums are added in another order
        assert by_step[step]["loss"] == pytest.approx(row["loss"], **exact)
        assert by_step[step]["grad_norm"] == pytest.approx(row["grad_norm"], **exact)
        assert by_step[step]["batch_size"] == row["batch_size"] == 8
