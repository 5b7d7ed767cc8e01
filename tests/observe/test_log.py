import io

from rich.console import Console

from megatron_aquila.observe.log import Log, duration, step_line

ROW = {
    "step": 3,
    "consumed_samples": 250,
    "loss": 6.5,
    "mfu": 0.421,
    "mfu_full_attention": 0.45,
    "seconds_left": 3725.2,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    log = Log(stream=out)
    log.line("[bold]as it is[/bold]")
    log.section("Grid", {"tp": "2", "pipeline": "1f1b"})
    log.progress(1, 2, "left 0:01:00")
    log.close()
    assert out.getvalue() == "[bold]as it is[/bold]\nGrid\n  tp        2\n  pipeline  1f1b\n"


def test_a_terminal_gets_a_bar_below_the_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    log = Log(stream=out)
    log.progress(1, 4, "left 0:01:00")
    log.line("step 1")
    log.progress(2, 4, "left 0:00:30")
    log.close()
    shown = out.getvalue()
    assert "step 1" in shown
    assert "50.0 %" in shown
    assert "left 0:00:30" in shown
    assert Console(file=out).is_terminal


def test_a_rank_that_does_not_report_is_silent():
    for out in (io.StringIO(), Terminal()):
        log = Log(stream=out, enabled=False)
        log.line("x")
        log.section("y", {})
        log.progress(1, 2, "z")
        log.close()
        assert out.getvalue() == ""


def test_a_step_line_names_each_convention():
    assert step_line(ROW, 1000) == (
        "step 3 | samples 250/1,000 (25.0 %) | loss 6.5000 | MFU 42.1 % (causal) | "
        "45.0 % (counting full attention) | left 1:02:05"
    )


def test_a_cpu_line_never_says_mfu():
    line = step_line({"step": 1, "gemm_share": 0.314, "applied": 0}, 10)
    assert "31.4 % of this CPU's measured GEMM rate" in line
    assert "MFU" not in line
    assert "update skipped" in line


def test_named_validation_sets_are_shown_and_the_sources_of_a_blend_are_not():
    row = {"step": 3, "valid_loss": 2.5, "valid_loss/data/zh": 2.4, "valid_loss/{code}": 1.25, "valid_loss/zh": 2.75}
    line = step_line(row, 1000, valid_sets=("zh", "{code}"))
    assert line.endswith(" | validation loss 2.5000 | of zh 2.7500 | of {code} 1.2500")
    assert step_line(row, 1000).endswith(" | validation loss 2.5000")


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 59.6, 90061)] == ["0:00:00", "0:01:00", "1 day, 1:01:01"]


def test_the_loss_scale_is_shown_where_there_is_one():
    assert "loss scale 522,893 |" in step_line(ROW | {"loss_scale": 522893.0}, 1000)
    assert "loss scale" not in step_line(ROW | {"loss_scale": 1.0}, 1000)
