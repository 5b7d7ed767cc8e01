"""What the quickstart deletes: the outputs of an earlier one, never anything else."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart_run", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_new_folder_is_made_and_marked(quickstart, tmp_path):
    quickstart.prepare(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [quickstart.MARKER]


def test_an_earlier_run_is_replaced_and_downloads_are_kept(quickstart, tmp_path):
    quickstart.prepare(tmp_path)
    for name in (*quickstart.OUTPUTS, "downloads", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    quickstart.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {quickstart.MARKER, "downloads", "notes"}
    assert (tmp_path / "downloads" / "file").exists()


def test_a_folder_of_others_is_left_alone(quickstart, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "precious").touch()
    with pytest.raises(SystemExit, match="holds checkpoints, and not from a quickstart; give another --output-dir"):
        quickstart.prepare(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", "precious"]


def test_downloads_may_be_there_first(quickstart, tmp_path):
    (tmp_path / "downloads").mkdir()
    quickstart.prepare(tmp_path)
    assert (tmp_path / "downloads").exists()


def test_a_file_is_no_folder(quickstart, tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(SystemExit, match="is no folder"):
        quickstart.prepare(tmp_path / "x")
