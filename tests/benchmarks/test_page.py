"""The page of benchmarks: current, made of the results alone, and plain about what was not measured."""

import json

import pytest

from benchmarks.common import RESULTS
from benchmarks.page import ABOUT, NOT_MEASURED, NOT_SO, PAGE, TABLES, main, page, results
from benchmarks.shares import with_ceilings, with_ratios

RESULT = {
    "benchmark": "step",
    "date": "2000-01-02T03:04:05+00:00",
    "machine": {"cpu": "C", "cores": 4, "threads": 2, "memory_gib": 8.0, "gpu": "G", "gpu_memory_gib": 79.6},
    "versions": {"torch": "9.9"},
    "commit": {"hash": "abc", "is_dirty": True},
    "settings": {"out": "x", "tiny": False, "models": ["7b", "34b-8"]},
    "load": {"before": 0.5, "after": 1.5},
    "tables": {},
}
SHAPE = {"model": "7b", "seq_len": 2048, "micro_batch": 4, "recompute": "none"}
STEPS = [
    {**SHAPE, "name": "megatron_aquila", "seconds": 0.5, "calls": 20, "tokens_per_second": 300.0, "mfu": 0.625},
    {**SHAPE, "name": "transformers, compiled", "seconds": 0.75, "calls": 20, "tokens_per_second": 200.0},
    {**SHAPE, "name": "transformers", "tokens_per_second": 100.0, "seconds": 1.5, "calls": 20},
    {**SHAPE, "seq_len": 4096, "name": "megatron_aquila", "error": "CUDA out of memory", "planned_gib": 130.0},
]


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(results(RESULTS)), "run python -m benchmarks.page"


def test_without_results_every_benchmark_is_not_measured_yet():
    text = page([])
    assert text.count(NOT_MEASURED) == len(ABOUT)
    assert ABOUT.keys() == TABLES.keys()


def test_a_result_says_where_it_comes_from_and_how_ours_compares():
    text = page([RESULT | {"tables": {"step": STEPS}}])
    assert text.count(NOT_MEASURED) == len(ABOUT) - 1
    assert "- G, 79.6 GiB, C, 4 cores, 2 threads, 8.0 GiB; load 0.5 before, 1.5 after" in text
    assert "- commit abc with changes, 2000-01-02T03:04:05+00:00" in text
    assert "- tiny False, models 7b 34b-8" in text
    assert "| 7b | 2,048 | 4 | none | megatron_aquila | 500.0 | 20 | 300 | 62.5 | – | 1.50 | – |" in text
    assert "| CUDA out of memory |" in text


def test_only_ours_has_a_ratio_and_only_where_both_ran():
    ratios = [row.get("ratio") for row in with_ratios(STEPS)]
    assert ratios == [1.5, None, None, None]
    assert with_ratios(STEPS[:1]) == STEPS[:1]


CEILINGS = RESULT | {
    "benchmark": "ceilings",
    "tables": {
        "copy": [{"tbytes_per_second": 4.0}],
        "gemm": [{"model": "7b", "tflops": 600.0}, {"model": "7b", "tflops": 750.0}, {"model": "34b", "tflops": 800.0}],
        "attention": [
            {"model": "7b", "seq_len": 4096, "direction": "forward", "tflops": 500.0},
            {"model": "7b", "seq_len": 2048, "direction": "forward", "tflops": 450.0},
            {"model": "7b", "seq_len": 4096, "error": "no such backend"},
        ],
    },
}


def test_rates_are_shares_of_the_ceilings_of_the_same_gpu():
    rows = [
        {"model": "7b", "op": "rms_norm", "direction": "forward", "rate": 3.0, "unit": "TB/s"},
        {"model": "7b", "op": "attention", "direction": "forward", "rate": 400.0, "unit": "TFLOP/s"},
        {"model": "7b", "op": "attention", "direction": "backward", "rate": 400.0, "unit": "TFLOP/s"},
        {"model": "34b", "op": "loss", "direction": "both", "rate": 600.0, "unit": "TFLOP/s"},
        {"model": "34b", "op": "loss", "error": "out of memory"},
    ]
    kernels = RESULT | {"benchmark": "kernels", "settings": {"seq_len": 4096}, "tables": {"kernels": rows}}
    shares = [row.get("ceiling_share") for row in with_ceilings(kernels, [CEILINGS])["tables"]["kernels"]]
    assert shares == [0.75, 0.8, None, 0.75, None]
    steps = RESULT | {"tables": {"step": [STEPS[0] | {"model": "7b-8", "tflops": 450.0}, STEPS[3]]}}
    assert [row.get("ceiling_share") for row in with_ceilings(steps, [CEILINGS])["tables"]["step"]] == [0.6, None]
    assert "| of the best matmul, % |" in page([CEILINGS, steps])
    elsewhere = CEILINGS | {"machine": {"gpu": "H"}}
    assert with_ceilings(steps, [elsewhere]) == with_ceilings(steps, []) == steps
    no_gpu = steps | {"machine": {}}
    assert with_ceilings(no_gpu, [CEILINGS | {"machine": {}}]) == no_gpu


def test_a_table_that_was_measured_in_another_way_is_not_shown():
    row = {"reader": "megatron_aquila", "rules": "plain", "samples_per_second": 6387.0}
    old = RESULT | {"benchmark": "loader", "tables": {"reading": [row]}}
    assert NOT_SO in page([old])
    assert "6,387" not in page([old])
    new = RESULT | {"benchmark": "loader", "tables": {"reading": [row | {"ratio": None}]}}
    assert NOT_SO not in page([new])
    assert "6,387" in page([new])


def test_results_of_tiny_shapes_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    assert results(tmp_path) == [RESULT]
    (tmp_path / "b.json").write_text(json.dumps(RESULT | {"settings": {"tiny": True}}))
    with pytest.raises(AssertionError, match="tiny shapes are no figures"):
        results(tmp_path)


def test_the_command_writes_the_page(monkeypatch, tmp_path, capsys):
    import benchmarks.page as command

    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert main([]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
    assert "page.md is written" in capsys.readouterr().out


def test_the_command_has_help_and_no_options(capsys):
    for words, status in ((["--help"], 0), (["docs/benchmarks.md"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == status
    told = capsys.readouterr()
    assert "Write docs/benchmarks.md" in told.out
    assert "unrecognized arguments" in told.err
