import pytest

from megatron_aquila.config.files import read_file
from megatron_aquila.config.settings import Given


def read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_file(path)


def test_sections_preset_and_run_settings(tmp_path):
    found = read(tmp_path, "preset: aquila2-7b\nseed: 7\nparallel: {tensor: 4}\ntrain:\n  rampup_batch: null\n")
    at = f"file {tmp_path}/run.yaml"
    assert found.preset == "aquila2-7b"
    assert found.given == {
        "seed": Given("7", f"{at}:2"),
        "parallel.tensor": Given("4", f"{at}:3"),
        "train.rampup_batch": Given(None, f"{at}:5"),
    }
    assert found.problems == []


def test_an_empty_file_says_nothing(tmp_path):
    found = read(tmp_path, "# nothing yet\n")
    assert (found.given, found.problems) == ({}, [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("parallel:\n  tensr: 4\n", "run.yaml:2 parallel.tensr: is no setting; did you mean parallel.tensor"),
        ("paralel: {tensor: 4}\n", "run.yaml:1 paralel: is no setting; did you mean parallel?"),
        ("seq_len: 4\n", "run.yaml:1 seq_len: is no setting; did you mean model.seq_len?"),
        ("parallel: {lr: 1}\n", "run.yaml:1 parallel.lr: is no setting; did you mean optim.lr?"),
        ("optim: {learning_rate: 1}\n", "optim.learning_rate: is no setting; did you mean optim.lr or optim.min_lr?"),
        ("parallel: {tensor_model_parallel_size: 1}\n", "is no setting; did you mean parallel.tensor"),
        ("observe: {qqqq: 1}\n", "run.yaml:1 observe.qqqq: is no setting; observe has observe.breadcrumbs, "),
        ("qqqq: 1\n", "run.yaml:1 qqqq: is no setting; a file has checkpoint, data, model, "),
        ("seed: 1\nseed: 2\n", "run.yaml:2 seed: is given twice; keep one of them"),
        ("model: {num_layers: 1}\nmodel: {seq_len: 2}\n", "run.yaml:2 model: is given twice"),
        ("parallel: 4\n", "run.yaml:1 parallel: parallel holds no settings by name; write e.g."),
        ("- 1\n", "run.yaml:1: the file holds no settings by name"),
        ("a: [1\n", "run.yaml: not valid YAML: while parsing a flow sequence"),
    ],
)
def test_problems_name_the_line(tmp_path, text, problem):
    [found] = read(tmp_path, text).problems
    assert problem in str(found)


def test_a_file_that_cannot_be_read(tmp_path):
    [problem] = read_file(tmp_path / "absent.yaml").problems
    assert "absent.yaml: No such file or directory; give a YAML file" in str(problem)
    (tmp_path / "latin").write_bytes(b"seed: \xff")
    [problem] = read_file(tmp_path / "latin").problems
    assert "not valid YAML" in problem.why
