"""A run that was stopped and resumed is the run that never was; on another layout it is the same model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_aquila.checkpoint.llama import SpecialIds
from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import CheckpointError
from megatron_aquila.train import build, corpus, resume, start
from megatron_aquila.verify.pool import WorkerPool
from tests.checkpoint.export import export_files
from tests.train.runs import Recorder, run, split, tiny_config

Pools = Callable[[int], WorkerPool]


def figures(recorder: Recorder) -> list[tuple[int, float, float]]:
    return [(report.step, report.loss, report.grad_norm) for report in recorder.reports]


def resumed(config: RunConfig, **checkpoint: object) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, **checkpoint))  # type: ignore[arg-type]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {name: reader.read(name) for name in reader.tensors}


@pytest.fixture(scope="module")
def whole(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Recorder]:
    """A run of six steps on tp 2 x pp 2 with sequence parallel, saved at every second step."""
    config = split(tiny_config(tmp_path_factory.mktemp("whole")), tp=2, pp=2, sequence=True)
    return config, pool(4).run(run, config)[0]


def test_resume_on_the_same_layout_is_bit_equal(whole: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path) -> None:
    config, before = whole
    assert config.checkpoint.save is not None
    again = resumed(config, load=config.checkpoint.save / "step_0000002", save=tmp_path)
    after = pool(4).run(run, again)[0]
    assert figures(after) == figures(before)[2:]
    assert after.validations == before.validations
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    old, new = CheckpointReader(config.checkpoint.save).state, CheckpointReader(tmp_path).state
    assert old == new


@pytest.mark.parametrize(("tp", "pp", "sequence"), [(1, 2, False), (2, 1, True), (1, 1, False)])
def test_resume_on_another_layout_joins_without_a_seam(
    tp: int, pp: int, sequence: bool, whole: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config, before = whole
    assert config.checkpoint.save is not None
    again = resumed(config, load=config.checkpoint.save / "step_0000004", save=tmp_path)
    after = pool(4).run(run, split(again, tp=tp, pp=pp, sequence=sequence))[0]
    for (step, loss, norm), (old_step, old_loss, old_norm) in zip(figures(after), figures(before)[4:], strict=True):
        # two AdamW steps in float64 amplify a rounding of 1e-16 by at most lr / eps = 1e6
        assert (step, loss, norm) == (old_step, pytest.approx(old_loss, rel=1e-10), pytest.approx(old_norm, rel=1e-10))


def test_a_loaded_checkpoint_saved_at_once_is_bit_equal(
    whole: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config, _ = whole
    assert config.checkpoint.save is not None
    finished = resumed(config, load=config.checkpoint.save, save=tmp_path)
    pool(2).run(save_loaded, split(finished, tp=2))
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def save_loaded(config: RunConfig) -> None:
    derived = derive(config, 2)
    ctx = build.create_context(config, derived, torch.device("cpu"))
    checkpoint = start.resolve_checkpoint(config.checkpoint, ctx.world)
    begin = start.find_start(config, derived, checkpoint, None)
    machine = build.build_machine(config, derived, ctx)
    resume.load_weights(machine, begin)
    resume.begin_save(machine, begin.state, None).finish()


def test_a_signal_to_one_rank_saves_on_all_and_nothing_is_lost(pool: Pools, tmp_path: Path) -> None:
    config = split(tiny_config(tmp_path), pp=2)
    config = resumed(config, save_interval=100)
    stopped = pool(2).run(run, config, 2)[0]
    assert [report.step for report in stopped.reports] == [1, 2], "agreed before the next step"
    assert "SIGTERM" in stopped.notes[-1]
    assert config.checkpoint.save is not None
    rest = pool(2).run(run, resumed(config, load=config.checkpoint.save))[0]
    assert [report.step for report in rest.reports] == [3, 4, 5, 6]
    never = pool(2).run(run, resumed(config, save=tmp_path / "never stopped"))[0]
    assert figures(stopped) + figures(rest) == figures(never)


def test_exit_samples_and_a_longer_run_append_a_segment(pool: Pools, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, exit_samples=16)
    first = run(config)
    assert "--exit-samples 16" in first.notes[-1]
    longer = tiny_config(tmp_path, train_samples=64)
    longer = resumed(longer, load=config.checkpoint.save, override_lr_schedule=True)
    second = run(longer)
    assert second.reports[-1].consumed_samples == 64
    assert [report.consumed_samples for report in second.reports] == [24, 32, 40, 48, 56, 64]
    assert config.checkpoint.save is not None
    assert CheckpointReader(config.checkpoint.save).state["train"]["index_segments"] == [48, 16]  # type: ignore[index,call-overload]


def test_what_would_change_silently_is_refused(whole: tuple[RunConfig, Recorder]) -> None:
    config, _ = whole
    again = split(resumed(config, load=config.checkpoint.save))
    with pytest.raises(CheckpointError, match=r"peak 0\.01 -> 0\.02.*--override-lr-schedule"):
        run(replace(again, optim=replace(again.optim, lr=2e-2)))
    with pytest.raises(CheckpointError, match="--seed 7"):
        run(replace(again, seed=7))
    with pytest.raises(CheckpointError, match="num_layers is 3 there, 4 in this run"):
        run(replace(again, model=replace(again.model, num_layers=4)))
    with pytest.raises(CheckpointError, match="--optimizer sgd"):
        run(replace(again, optim=replace(again.optim, optimizer="sgd")))
    with pytest.raises(CheckpointError, match="--precision fp32"):
        run(replace(again, train=replace(again.train, precision="fp32")))


def test_a_missing_checkpoint_is_an_error_never_random_weights(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        run(resumed(config, load=tmp_path / "nowhere"))


def test_weights_alone_start_a_new_run(whole: tuple[RunConfig, Recorder], tmp_path: Path) -> None:
    config, before = whole
    fresh = run(split(resumed(config, load=config.checkpoint.save, load_optim=False, save=tmp_path)))
    assert fresh.reports[0].step == 1
    assert fresh.reports[0].loss < before.reports[0].loss - 0.5, "the trained weights were not used"


def test_published_weights_start_a_run_and_what_does_not_fit_is_refused(
    whole: tuple[RunConfig, Recorder], pool: Pools, tmp_path: Path
) -> None:
    config, _ = whole
    assert config.checkpoint.save is not None
    reader = CheckpointReader(config.checkpoint.save)
    folder = tmp_path / "hf"
    ids = SpecialIds(bos=None, eos=1, pad=None)
    export_files(reader, folder, shape=reader.shape(), dtype=torch.float64, ids=ids, max_bytes=100_000)
    from_ours = resumed(config, load=config.checkpoint.save, load_optim=False, save=tmp_path / "ours")
    from_hf = resumed(config, init_from_hf=folder, save=tmp_path / "theirs")
    expected = pool(4).run(run, from_ours)[0]
    found = pool(4).run(run, from_hf)[0]
    assert figures(found) == figures(expected)
    other = replace(from_hf, model=replace(config.model, rope_base=5e5))
    other = resumed(other, save=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"--init-from-hf .*rope_base is 10000\.0 there, 500000\.0 in this run"):
        run(split(other))
    trained_on = resumed(config, load=config.checkpoint.save, load_optim=False, save=tmp_path / "stretched")
    stretched = replace(trained_on, model=replace(config.model, rope_scaling="linear", rope_factor=2.0))
    with pytest.raises(CheckpointError, match=r"rope_scaling is none there, linear .* or give --override-rope"):
        run(split(stretched))
    first = run(split(resumed(stretched, override_rope=True))).reports[0]
    plain = run(split(resumed(trained_on, save=tmp_path / "plain"))).reports[0]
    assert first.loss != plain.loss, "positions were not stretched"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "50,50,0"}, r"data set 1: splits .* give --override-data"),
        ({"path": ("0.3", "threes", "0.7", "fives")}, r"data set 1: weight 0\.7 there, 0\.3 here"),
        ({"path": ("0.7", "fives", "0.3", "threes")}, r"data set 1: .*index_sha256"),
        ({"path": ("threes",)}, "2 data sets there, 1 here"),
    ],
)
def test_other_data_is_refused(
    change: dict[str, object], message: str, whole: tuple[RunConfig, Recorder], tmp_path: Path
) -> None:
    config, _ = whole
    folder = Path(config.data.path[1]).parent
    if "path" in change:
        words = tuple(word if word[0].isdigit() else str(folder / word) for word in change["path"])  # type: ignore[attr-defined]
        change = {"path": words}
    again = split(resumed(config, load=config.checkpoint.save, save=tmp_path))
    other = replace(again, data=replace(config.data, **change))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        run(other)


def test_a_longer_sample_is_refused_and_data_can_be_overridden(
    whole: tuple[RunConfig, Recorder], tmp_path: Path
) -> None:
    config, _ = whole
    again = split(resumed(config, load=config.checkpoint.save, save=tmp_path))
    with pytest.raises(CheckpointError, match="--seq-len 16 there, 8 here"):
        run(replace(again, model=replace(config.model, seq_len=8)))
    other = replace(again, data=replace(config.data, split="80,20,0"))
    run(
        resumed(
            replace(other, train=replace(config.train, train_samples=56)), override_data=True, override_lr_schedule=True
        )
    )
    assert (tmp_path / "latest").exists()


def test_a_folder_that_holds_another_run_is_not_written_into(whole: tuple[RunConfig, Recorder], tmp_path: Path) -> None:
    config, _ = whole
    with pytest.raises(CheckpointError, match="already holds a run, at step_0000006; continue that with --resume"):
        run(split(config))
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(split(resumed(config, load=config.checkpoint.save, load_optim=False)))


def test_resume_continues_what_is_there_and_starts_where_nothing_is(tmp_path: Path) -> None:
    config = resumed(tiny_config(tmp_path, exit_samples=16), resume=True)
    first = run(config)
    assert first.reports[0].step == 1
    second = run(replace(config, train=replace(config.train, exit_samples=None)))
    assert second.reports[0].step == 3
    third = run(config)
    assert third.reports == []


def test_a_run_that_is_no_whole_number_of_batches_ends_with_a_whole_one_and_saves(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=50, rampup_batch=(4, 4, 20))
    recorder = run(config)
    assert [report.global_batch for report in recorder.reports] == [4, 4, 4, 4, 4, 8, 8, 8, 8]
    assert recorder.reports[-1].consumed_samples == 52
    assert config.checkpoint.save is not None
    state = CheckpointReader(config.checkpoint.save).state["train"]
    assert state["consumed_samples"] == 52  # type: ignore[index,call-overload]
    assert state["consumed_tokens"] == 52 * 16  # type: ignore[index,call-overload]


def test_learning_rate_is_that_of_the_samples_before_the_step(whole: tuple[RunConfig, Recorder]) -> None:
    config, recorder = whole
    schedule = build.lr_schedule(config)
    assert [report.lr for report in recorder.reports] == [schedule.at(8 * step) for step in range(6)]


def test_keep_leaves_the_newest(tmp_path: Path) -> None:
    config = resumed(tiny_config(tmp_path), keep=1)
    run(config)
    assert config.checkpoint.save is not None
    assert [path.name for path in sorted(config.checkpoint.save.glob("step_*"))] == ["step_0000006"]


def test_a_longer_run_reads_on_and_moves_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    before, after = (
        corpus.build_sources(config, segments=segments, build=True).train for segments in ((48,), (48, 48))
    )
    assert [after[i].tokens.tolist() for i in range(48)] == [before[i].tokens.tolist() for i in range(48)]
    assert len({tuple(after.spans(i)) for i in range(96)}) == 96, "less than an epoch: nothing comes twice"


def run_with_nan_filled_memory(config: RunConfig) -> Recorder:
    """Fresh memory holds NaN: whatever reads it before it was written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        return run(config)
    finally:
        torch.use_deterministic_algorithms(False)


def test_bf16_with_masters_resumes_bit_equal_even_on_dirty_memory(pool: Pools, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config = split(replace(config, train=replace(config.train, precision="bf16")), tp=2)
    never = pool(2).run(run_with_nan_filled_memory, config)[0]
    assert all(report.applied for report in never.reports)
    assert config.checkpoint.save is not None
    again = resumed(config, load=config.checkpoint.save / "step_0000002", save=tmp_path / "again")
    after = pool(2).run(run_with_nan_filled_memory, again)[0]
    assert figures(after) == figures(never)[2:]
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path / "again")
    assert {name for name in expected if name.startswith("optimizer.master.")}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # other moments of the same masters: weights alone, in a wider type, come from the masters
    wider = resumed(replace(config, train=replace(config.train, precision="fp32")), load_optim=False)
    wider = resumed(wider, load=config.checkpoint.save, save=tmp_path / "wider")
    pool(2).run(
        run,
        replace(wider, train=replace(wider.train, exit_samples=8), optim=replace(config.optim, lr=1e-9, min_lr=1e-9)),
    )
    name = "model.norm.weight"
    kept = tensors(tmp_path / "wider")[name]
    assert torch.allclose(kept, expected[f"optimizer.master.{name}"], rtol=0, atol=1e-7)


def test_fp16_resumes_bit_equal_in_the_middle_of_finding_its_scale(pool: Pools, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=96)
    config = replace(config, train=replace(config.train, precision="fp16"))
    optim = replace(config.optim, initial_loss_scale=2.0**23, loss_scale_window=3)
    config = split(replace(config, optim=optim), tp=2)
    never = pool(2).run(run, config)[0]
    applied = [report.applied for report in never.reports]
    assert not all(applied[:3]), [report.loss_scale for report in never.reports]
    assert any(applied[3:])
    assert config.checkpoint.save is not None
    again = resumed(config, load=config.checkpoint.save / "step_0000002", save=tmp_path / "again")
    after = pool(2).run(run, again)[0]
    assert repr(figures(after)) == repr(figures(never)[2:])  # as words, in which nan equals nan
    assert [report.loss_scale for report in after.reports] == [report.loss_scale for report in never.reports][2:]
    expected, found = tensors(config.checkpoint.save), tensors(tmp_path / "again")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
