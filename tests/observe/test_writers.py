import io
import json
import math
import sys
import types

import pytest

from megatron_aquila.errors import DataError
from megatron_aquila.observe.log import Log
from megatron_aquila.observe.writers import JsonLinesWriter, TensorBoardWriter, open_writers, read_log


def append(path, *rows):
    writer = JsonLinesWriter(path)
    for row in rows:
        writer.write(row)
    writer.close()


def test_rows_reach_the_file_one_by_one(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    writer = JsonLinesWriter(path)
    for step in (1, 2):
        writer.write({"step": step, "loss": 1.5, "note": "首"})
        assert len(read_log(path)) == step  # a kill here would lose nothing
    writer.close()
    assert path.read_text() == '{"step": 1, "loss": 1.5, "note": "首"}\n{"step": 2, "loss": 1.5, "note": "首"}\n'


def test_values_that_json_lacks_survive(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "x": -math.inf})
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    (row,) = read_log(path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["x"]) == (math.inf, -math.inf)


def test_a_resume_appends_and_replaces_the_abandoned_branch(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, *({"step": step, "loss": 9.0} for step in (1, 2, 3, 4)))
    append(path, {"step": 3, "loss": 1.0})
    assert read_log(path) == [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 9.0}, {"step": 3, "loss": 1.0}]
    assert len(path.read_text().splitlines()) == 5  # the file itself forgets nothing


def test_validation_joins_the_row_of_its_step(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"step": 1, "loss": 2.0}, {"step": 1, "valid_loss": 3.0}, {"step": 2, "loss": 1.0})
    assert read_log(path) == [{"step": 1, "loss": 2.0, "valid_loss": 3.0}, {"step": 2, "loss": 1.0}]


def test_a_torn_last_line_is_skipped_and_then_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    append(path, {"step": 2})
    assert read_log(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: not a row"):
        read_log(path)


def test_tensorboard_holds_the_numbers_and_purges_on_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rows in ([(1, 9.0), (2, 8.0), (3, 7.0)], [(2, 5.0)]):
        writer = TensorBoardWriter(tmp_path)
        for step, loss in rows:
            writer.write({"step": step, "loss": loss, "note": "text is left out"})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 9.0), (2, 5.0)]


def test_a_tensorboard_without_rows_leaves_nothing(tmp_path):
    TensorBoardWriter(tmp_path / "events").close()
    assert not (tmp_path / "events").exists()


def test_the_settings_choose_the_writers(tmp_path):
    out = io.StringIO()
    writers = open_writers(Log(stream=out), total_samples=10, log_dir=tmp_path, tensorboard_dir=tmp_path / "tb")
    writers.write({"step": 1, "consumed_samples": 5, "loss": 2.0})
    writers.close()
    assert out.getvalue() == "step 1 | samples 5/10 (50.0 %) | loss 2.0000\n"
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == 2.0
    assert list((tmp_path / "tb").iterdir())


def test_a_missing_wandb_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = io.StringIO()
    open_writers(Log(stream=out), total_samples=10, wandb_project="aquila", wandb_dir=tmp_path).close()
    assert "wandb is not installed" in out.getvalue()
    assert len(out.getvalue().splitlines()) == 1


class FakeWandb(types.ModuleType):
    """Keeps what it is called with; ``fails``: its runs cannot begin."""

    class Error(Exception):
        pass

    def __init__(self, fails: str | None = None) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[object, ...]] = []
        self._fails = fails

    def init(self, **settings):
        self.calls.append(("init", settings))
        if self._fails is not None:
            raise self.Error(self._fails)
        return self

    def log(self, row, step):
        self.calls.append(("log", row, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize(("given", "mode"), [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_wandb_is_offline_unless_the_environment_says_otherwise(monkeypatch, tmp_path, given, mode):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if given is not None:
        monkeypatch.setenv("WANDB_MODE", given)
    folder = tmp_path / "wandb"
    settings = {"wandb_project": "aquila", "wandb_name": "first", "wandb_dir": folder}
    writers = open_writers(Log(stream=io.StringIO()), total_samples=1, **settings)
    writers.write({"step": 7, "loss": 1.0})
    writers.close()
    assert wandb.calls == [
        ("init", {"project": "aquila", "name": "first", "dir": str(folder), "mode": mode}),
        ("log", {"step": 7, "loss": 1.0}, 7),
        ("finish",),
    ]


def test_a_wandb_run_that_cannot_begin_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails="api_key not configured\nmore"))
    out = io.StringIO()
    open_writers(Log(stream=out), total_samples=10, wandb_project="aquila", wandb_dir=tmp_path).close()
    assert out.getvalue().startswith(
        "wandb: api_key not configured: no Weights & Biases run is written (WANDB_MODE=off"
    )
    assert len(out.getvalue().splitlines()) == 1
