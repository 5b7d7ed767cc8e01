"""The loss in fp8 beside that in bf16: the same weights and samples, and an answer that can be no."""

import json

import numpy as np
import torch

from benchmarks import fp8
from benchmarks.common import Record
from megatron_aquila.config.derive import derive
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.plan.flops import num_params

TRY = ["--device", "cpu", "--tiny", "--steps", "4", "--window", "2", "--seq-len", "16", "--batch", "2"]


def test_two_trainings_are_compared_window_by_window(tmp_path):
    out = tmp_path / "x.json"
    assert fp8.main([*TRY, "--out", str(out)]) == 0
    tables = json.loads(out.read_text())["tables"]
    assert [row["last_step"] for row in tables["loss"]] == [2, 4]
    for row in tables["loss"]:
        assert abs(row["bf16"] - np.log(128)) < 1, "a vocabulary of 128, not learnt yet"
        assert row["fp8"] != row["bf16"], "8 bits are seen"
        assert abs(row["difference"]) < 0.02
    (row,) = tables["all steps"]
    assert (row["steps"], row["worst"]) == (4, max((row["difference"] for row in tables["loss"]), key=abs))


def test_a_loss_that_is_no_number_is_told():
    options = fp8.Options(steps=4, window=2, tiny=True, device="cpu")
    record = Record("fp8", settings=options, device=torch.device("cpu"), out=None)
    fp8.compare(record, {"bf16": [4.0, 4.0, 2.0, 2.0], "fp8": [4.0, 4.0, 2.0, float("nan")]}, options)
    tables = json.loads(json.dumps(record.as_json(), allow_nan=False))["tables"]
    assert [row["fp8"] for row in tables["loss"]] == [4.0, "nan"]
    assert tables["all steps"][0]["holds"] is False


def test_a_loss_too_far_away_does_not_hold():
    options = fp8.Options(steps=4, window=2, tiny=True, device="cpu")
    record = Record("fp8", settings=options, device=torch.device("cpu"), out=None)
    bf16 = [4.0, 4.0, 2.0, 2.0]
    fp8.compare(record, {"bf16": bf16, "fp8": [4.0, 4.01, 2.0, 2.0]}, options)
    fp8.compare(record, {"bf16": bf16, "fp8": [4.0, 4.0, 2.0, 1.95]}, options)
    assert [row["holds"] for row in record.tables["all steps"]] == [True, False]
    assert record.tables["all steps"][1]["worst"] < -fp8.GOAL


def test_the_language_can_be_learnt_and_is_a_function_of_its_seed():
    one, same, other = (fp8.Language.of(97, 50, 100, seed) for seed in (1, 1, 2))
    assert len(one) == 100
    assert (one[3].tokens == same[3].tokens).all()
    assert (one.rows != other.rows).any()
    assert one[3].tokens.shape == (51,)
    pairs = {pair for row in one.rows for pair in zip(row[:-1].tolist(), row[1:].tolist(), strict=True)}
    assert len(pairs) < 100 * 50 / 2, "few followers come again and again"


def test_a_data_set_can_be_trained_on(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_documents(np.arange(300, dtype=np.uint16) % 128, np.array([100, 200]))
    options = fp8.Options(data=tmp_path / "data", steps=4, seq_len=16, batch=2, device="cpu", tiny=True)
    source = fp8.samples(options)
    assert len(source) >= 5 * 2, "and one step more"
    assert source[0].tokens.shape == (17,)


def test_the_model_has_219_million_parameters():
    shape = derive(fp8.run_config("fp8", fp8.Options(device="cpu")), 1).shape
    assert round(num_params(shape), -6) == 219_000_000
