"""A run whose blend changes on the way: resumed anywhere it is the same run, and what is past cannot be changed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.config.schema import DataConfig, Phase, RunConfig
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.errors import CheckpointError, DataError
from megatron_aquila.train.corpus import build_sources, identify
from megatron_aquila.train.traced import trace_config, trace_run
from tests.train.runs import Recorder, run, split, tiny_config


def figures(recorder: Recorder) -> list[tuple[int, float, float]]:
    return [(report.step, report.loss, report.grad_norm) for report in recorder.reports]


def phased(folder: Path, **train: object) -> RunConfig:
    """Six steps: two of the blend, from sample 13 on fives, from sample 29 on both."""
    config = tiny_config(folder, **train)
    threes, fives = str(folder / "threes"), str(folder / "fives")
    phases = (
        Phase(from_samples=13, path=(fives,)),
        Phase(from_samples=29, path=("0.5", threes, "0.5", fives)),
    )
    return replace(config, data=replace(config.data, phases=phases))


def from_step(config: RunConfig, step: int, folder: Path, **data: object) -> RunConfig:
    assert config.checkpoint.save is not None
    checkpoint = replace(config.checkpoint, load=config.checkpoint.save / f"step_{step:07}", save=folder)
    return replace(config, checkpoint=checkpoint, data=replace(config.data, **data))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Recorder]:
    config = phased(tmp_path_factory.mktemp("whole"))
    return config, run(config)


@pytest.mark.parametrize("step", [2, 4])
def test_resume_in_any_phase_is_exact(whole: tuple[RunConfig, Recorder], tmp_path: Path, step: int) -> None:
    config, before = whole
    assert figures(run(from_step(config, step, tmp_path))) == figures(before)[step:]


def test_sources_of_a_step_are_those_of_its_phase(whole: tuple[RunConfig, Recorder]) -> None:
    config, before = whole
    folder = Path(config.data.path[1]).parent
    assert config.checkpoint.save is not None
    assert set(before.reports[2].source_loss) == {str(folder / "fives")}, "samples 16 to 24"
    assert len(before.reports[4].source_loss) == 2
    traced, planned = trace_run(config.checkpoint.save), trace_config(config)
    assert len(traced.source) == len(planned.source) == 48
    assert {traced.source[i].source for i in range(13, 29)} == {1}
    assert [traced.source[i].tokens.tolist() for i in range(48)] == [
        planned.source[i].tokens.tolist() for i in range(48)
    ]


def test_a_phase_to_come_may_change_if_that_is_meant(whole: tuple[RunConfig, Recorder], tmp_path: Path) -> None:
    config, before = whole
    threes = str(Path(config.data.path[1]).parent / "threes")
    phases = (config.data.phases[0], Phase(from_samples=32, path=(threes,)))
    again = from_step(config, 2, tmp_path, phases=phases)
    with pytest.raises(CheckpointError, match=r"phase 2 from sample 29 there, sample 32 here\).*give --override-data"):
        run(again)
    meant = replace(again, checkpoint=replace(again.checkpoint, override_data=True))
    after = run(meant)
    assert figures(after)[:1] == figures(before)[2:3]
    assert set(after.reports[-1].source_loss) == {threes}


def test_an_identity_knows_its_phases(whole: tuple[RunConfig, Recorder]) -> None:
    config, _ = whole
    here = identify(config)
    assert [phase["start"] for phase in here.phases] == [13, 29]
    saved = {"sets": here.sets, "seq_len": 16, "tokenizer": None, "documents": None, "phases": here.phases[:1]}
    assert here.differences(saved) == ["phase 2 from nowhere there, sample 29 here"]
    other = [here.phases[0], {**here.phases[1], "sets": [{**here.sets[0], "weight": 0.25}, here.phases[1]["sets"][1]]}]
    assert here.differences({**saved, "phases": other}) == ["phase 2, data set 1: weight 0.25 there, 0.5 here"]
    assert here.differences({**saved, "phases": here.phases}) == []


def test_too_many_epochs_are_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    limited = replace(config, data=replace(config.data, max_epochs_per_source=("0.1",)))
    with pytest.raises(DataError, match=r"--max-epochs-per-source: .*threes: 34 samples of its .* more than 0.1; "):
        build_sources(limited, segments=(48,), build=True)


def write(folder: Path, name: str, stride: int, documents: int) -> str:
    with IndexedDatasetWriter(folder / name, np.uint16) as writer:
        writer.add_documents((stride * np.arange(documents * 20)) % 61, np.full(documents, 20))
    return str(folder / name)


def test_named_sets_are_validated_by_themselves(tmp_path: Path) -> None:
    """Each sample once, the same on every layout, beside the held-out split or without one."""
    config = tiny_config(tmp_path, train_samples=16, eval_interval=1)
    sets = (f"sevens={write(tmp_path, 'sevens', 7, 9)}", f"nines={write(tmp_path, 'nines', 9, 40)}")
    config = replace(config, data=replace(config.data, valid_sets=sets, valid_samples=21))
    found = build_sources(config, segments=(16,), build=True)
    assert {name: len(source) for name, source in found.named.items()} == {"sevens": 11, "nines": 49}
    first = run(config).means[0]
    assert set(first.by_source) == {*found.train.names, "sevens", "nines"}
    plain = run(replace(without_save(config), data=replace(config.data, valid_sets=(), valid_samples=None))).means[0]
    assert plain.loss == first.loss
    small = replace(without_save(config), train=replace(config.train, micro_batch=4))
    other = run(small).means[0]
    for name in ("sevens", "nines"):
        assert other.by_source[name] == pytest.approx(first.by_source[name], rel=1e-12)
    alone = run(replace(without_save(config), data=replace(config.data, split="1"))).means[0]
    assert alone.loss == pytest.approx((alone.by_source["sevens"] + alone.by_source["nines"]) / 2)
    assert set(alone.by_source) == {"sevens", "nines"}


def test_the_last_sample_of_validation_data_may_be_kept(tmp_path: Path) -> None:
    """As a sample of its own, of which what is there counts, on every layout alike."""
    config = tiny_config(tmp_path, train_samples=16, eval_interval=1)
    sets = (f"sevens={write(tmp_path, 'sevens', 7, 9)}",)
    data = replace(config.data, valid_sets=sets, valid_samples=21, drop_last_partial_validation_sequence=False)
    config = replace(without_save(config), data=data)
    source = build_sources(config, segments=(16,), build=True).named["sevens"]
    assert [len(source), sum(source[number].padding for number in range(12))] == [12, 13]
    means = run(config).means[0]
    other = run(replace(config, train=replace(config.train, micro_batch=4))).means[0]
    assert other.by_source["sevens"] == pytest.approx(means.by_source["sevens"], rel=1e-12)
    whole = replace(data, drop_last_partial_validation_sequence=True)
    assert run(replace(config, data=whole)).means[0].by_source["sevens"] != means.by_source["sevens"]


def without_save(config: RunConfig) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, save=None))


def test_each_split_has_data_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16, eval_interval=1)
    held = write(tmp_path, "held", 7, 9)
    data = DataConfig(train_path=config.data.path, valid_path=(held,), cache_path=tmp_path / "cache")
    recorder = run(replace(config, data=data))
    assert list(recorder.means[0].by_source) == [held]
    assert [part["splits"] for part in identify(replace(config, data=data)).sets] == [
        {"train": [0, 60], "valid": None, "test": None}
    ] * 2


def test_dp_does_not_change_what_is_read_nor_what_is_validated(tmp_path: Path, pool: object) -> None:
    config = phased(tmp_path)
    sets = (f"sevens={write(tmp_path, 'sevens', 7, 9)}",)
    config = replace(without_save(config), data=replace(config.data, valid_sets=sets))
    one = run(config)
    two = pool(2).run(run, split(config))[0]  # type: ignore[operator]
    for a, b in zip(one.reports, two.reports, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-10)
    assert two.means[-1].by_source == pytest.approx(one.means[-1].by_source, rel=1e-9)
