"""What a run reads: phases without repetition, extension that moves nothing, limits that hold."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_aquila.data.blend import Library, Share, build_datasets
from megatron_aquila.data.cache import IndexCache
from megatron_aquila.data.course import Course, Leg, Phase, build_course, describe_course, legs_of
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.loader import BatchLoader
from megatron_aquila.errors import DataError
from megatron_aquila.plan.batches import ReplicaShare

SEQ_LEN = 4
NAMES = ("a", "b", "c")
TOKENS = {"a": 101, "b": 60, "c": 37}  # whole samples of an epoch: 25, 14, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sets whose tokens all differ, in documents of one to nine tokens."""
    folder, first = tmp_path_factory.mktemp("course"), 0
    for name, total in TOKENS.items():
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            left = total
            while left:
                length = min(left, 1 + left % 9)
                writer.add_sequence(np.arange(first, first + length))
                writer.end_document()
                first, left = first + length, left - length
    return folder


def course_of(folder: Path, phases: Sequence[tuple[int, str]], segments: Sequence[int], **settings: object) -> Course:
    cache = IndexCache(folder=folder / "cache")
    library = Library(seq_len=SEQ_LEN, seed=7, cache=cache)
    return build_course(library, phases_of(folder, phases), Share("train"), segments=segments, **settings)  # type: ignore[arg-type]


def phases_of(folder: Path, phases: Sequence[tuple[int, str]]) -> list[Phase]:
    def words(text: str) -> tuple[str, ...]:
        return tuple(str(folder / word) if word in NAMES else word for word in text.split())

    return [Phase(start=start, paths=words(text)) for start, text in phases]


def samples(course: Course) -> list[tuple[int, ...]]:
    return [tuple(course.source[i].tokens.tolist()) for i in range(len(course.source))]


BLENDS = st.sampled_from(["a", "1 a 1 b", "0.7 a 0.2 b 0.1 c", "3 c 1 b", "c", "0.5 b 0.5 a"])


@settings(max_examples=20, deadline=None)
@given(
    blends=st.lists(BLENDS, min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    more=st.integers(1, 30),
    other=BLENDS,
)
def test_what_was_seen_never_moves(folder: Path, blends: list[str], lengths: list[int], more: int, other: str) -> None:
    """Extending a run, once or twice, and changing or adding a phase to come, leave every earlier sample."""
    starts = np.cumsum([0, *lengths]).tolist()
    phases, total = list(zip(starts, blends, strict=False)), starts[len(blends)]
    segments = [lengths[0], total - lengths[0]] if total > lengths[0] else [lengths[0]]
    seen = samples(course_of(folder, phases, segments))
    assert len(seen) == total
    longer = samples(course_of(folder, phases, [*segments, more]))
    assert longer[:total] == seen
    assert samples(course_of(folder, phases, [*segments, 1, more - 1] if more > 1 else [*segments, 1])) == longer
    changed = course_of(folder, [*phases[:-1], (phases[-1][0] + 1, other)] if len(phases) > 1 else phases, segments)
    assert samples(changed)[: phases[-1][0]] == seen[: phases[-1][0]]
    added = samples(course_of(folder, [*phases, (total, other)], [*segments, more]))
    assert added[:total] == seen
    assert len(added) == total + more


@settings(max_examples=25, deadline=None)
@given(blends=st.lists(BLENDS, min_size=2, max_size=3), lengths=st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_a_source_goes_on_where_it_stood(folder: Path, blends: list[str], lengths: list[int]) -> None:
    """Within an epoch of a source no token is read twice as an input, whatever the blends."""
    starts = np.cumsum([0, *lengths]).tolist()
    total = starts[len(blends)]
    phases = list(zip(starts, blends, strict=False))
    course = course_of(folder, phases, [lengths[0], total - lengths[0]])
    taken = course.source.taken(total)
    inputs = np.array([sample[:-1] for sample in samples(course)])
    for name, count, dataset in zip(course.source.names, taken.tolist(), course.source.datasets, strict=True):
        own = inputs[np.isin(inputs[:, 0], dataset.tokens)]
        assert own.shape == (count, SEQ_LEN)
        _, times = np.unique(own, return_counts=True)
        epochs = -(-count // ((TOKENS[Path(name).name] - 1) // SEQ_LEN))
        assert count == 0 or times.max() <= epochs
    mutant = samples(course_of(folder, phases[:1], [lengths[0], total - lengths[0]]))
    assert mutant[: lengths[0]] == samples(course)[: lengths[0]]


def test_phases_would_repeat_if_each_began_anew(folder: Path) -> None:
    """The law above can fail: two runs one after the other share samples."""
    first = set(samples(course_of(folder, [(0, "a")], [15])))
    assert first & set(samples(course_of(folder, [(0, "1 a 1 b")], [18])))


def test_the_first_index_is_megatrons(folder: Path) -> None:
    paths = phases_of(folder, [(0, "0.7 a 0.3 b")])[0].paths
    settings = {"split": "1", "seq_len": SEQ_LEN, "seed": 7, "cache_path": folder / "cache"}
    expected = build_datasets(paths, sizes=(60, 0, 0), **settings).train  # type: ignore[arg-type]
    assert expected is not None
    course = course_of(folder, [(0, "0.7 a 0.3 b"), (40, "c")], [60])
    assert samples(course)[:40] == [tuple(expected[i].tokens.tolist()) for i in range(40)]
    assert {course.source[i].source for i in range(40, 60)} == {2}


@settings(max_examples=10, deadline=None)
@given(dp=st.integers(1, 4), micro=st.integers(1, 3), count=st.integers(1, 3), prefetch=st.integers(0, 2))
def test_the_order_does_not_depend_on_the_batches(folder: Path, dp: int, micro: int, count: int, prefetch: int) -> None:
    course = course_of(folder, [(0, "1 a 1 b"), (17, "2 c 1 a")], [17, 31])
    batch, read = dp * micro * count, []
    loaders = [
        BatchLoader(
            course.source,
            share=ReplicaShare(size=micro, first=rank * micro, round_size=dp * micro),
            vocab_size=1000,
            prepare=lambda batch, _: batch,
            batch_at=lambda _: batch,
            prefetch=prefetch,
        )
        for rank in range(dp)
    ]
    for start in range(0, 48 - batch + 1, batch):
        ranks = [loader.fetch(start, batch) for loader in loaders]
        read += [batches[number].tokens_BS for number in range(count) for batches in ranks]
    for loader in loaders:
        loader.close()
    order = [tuple(row) for tokens in read for row in tokens.tolist()]
    assert order == [sample[:-1] for sample in samples(course)][: len(order)]


def test_legs() -> None:
    phases = [Phase(start=0, paths=("a",)), Phase(start=10, paths=("b",)), Phase(start=90, paths=("c",))]
    assert legs_of(phases, [10, 40]) == [Leg(start=0, stop=10, paths=("a",)), Leg(start=10, stop=50, paths=("b",))]
    assert legs_of(phases[:1], [10, 40]) == [Leg(start=0, stop=10, paths=("a",)), Leg(start=10, stop=50, paths=("a",))]
    assert [(leg.start, leg.stop) for leg in legs_of(phases, [4, 100])] == [(0, 4), (4, 10), (10, 90), (90, 104)]
    with pytest.raises(AssertionError, match="starts at sample 10"):
        legs_of(phases[1:], [20])


def test_a_blend_without_weights_reads_everything_once(folder: Path) -> None:
    everything = course_of(folder, [(0, "a b c")], [48])
    assert len(set(samples(everything))) == 48
    assert everything.source.taken(48).tolist() == [25, 14, 9]
    halves = course_of(folder, [(0, "a b c")], [20, 28])
    assert set(samples(halves)) == set(samples(everything))
    rest = course_of(folder, [(0, "1 a 1 c"), (6, "a b c")], [6, 42])
    assert set(samples(rest)) == set(samples(everything))
    way_out = "give weights, with which data sets are read again, or --train-samples 48"
    for phases, segments in (([(0, "a b c")], [49]), ([(0, "a b c")], [20, 29]), ([(0, "c"), (6, "a b c")], [6, 43])):
        with pytest.raises(DataError, match=way_out):
            course_of(folder, phases, segments)


def test_epochs_are_told_and_limited(folder: Path) -> None:
    phases = [(0, "0.5 a 0.5 b"), (40, "c")]
    course = course_of(folder, phases, [40, 10])
    readings = {Path(prefix).name: reading for prefix, reading in course.readings.items()}
    assert [round(readings[name].epochs, 3) for name in NAMES] == [round(n * 4 / TOKENS[name], 3) for name, n in
        zip(NAMES, (20, 20, 10), strict=True)]  # fmt: skip
    text = describe_course(course, phases_of(folder, phases))
    assert text.startswith(f"from sample 40 on: {folder}/c\nthe run of 50 samples reads\n")
    assert f"     1.33 epochs of {folder}/b: 20 samples of its 60 tokens" in text
    limits = {str(folder / name): 1.05 for name in NAMES}
    with pytest.raises(DataError) as caught:
        course_of(folder, phases, [40, 10], limits=limits)
    words = str(caught.value)
    assert words.startswith(f"--max-epochs-per-source: {folder}/b: 20 samples of its 60 tokens are 1.33 epochs, more ")
    assert "15 samples would do" in words
    assert f"{folder}/c: 10 samples" in words
    assert f"{folder}/a" not in words
    assert words.endswith(": lower its weight or --train-samples, or allow more")
    assert samples(course_of(folder, phases, [40, 10], limits=dict.fromkeys(limits, 1.34))) == samples(course)


def test_three_hundred_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is opened once; every index of the run is there, and reading touches no other."""
    prefixes = [str(tmp_path / f"set{number:03}") for number in range(300)]
    for number, prefix in enumerate(prefixes):
        with IndexedDatasetWriter(prefix, np.uint16) as writer:
            writer.add_documents(np.arange(64) + number, np.full(8, 8))
    opened: list[str] = []
    from megatron_aquila.data import blend

    original = blend.IndexedDataset
    monkeypatch.setattr(blend, "IndexedDataset", lambda prefix: opened.append(prefix) or original(prefix))
    library = Library(seq_len=SEQ_LEN, seed=7, cache=IndexCache(folder=tmp_path / "cache"))
    weighted = tuple(word for number, prefix in enumerate(prefixes) for word in (str(1 + number % 3), prefix))
    phases = [Phase(start=0, paths=tuple(prefixes)), Phase(start=2000, paths=weighted)]
    course = build_course(library, phases, Share("train", (0.0, 0.75)), segments=(2000, 700))
    assert sorted(opened) == prefixes
    assert len(course.source.names) == 300
    counts = course.source.taken(2000)
    assert (counts.min(), counts.max()) == (6, 7)
    digest = hashlib.sha256(np.concatenate([course.source[i].tokens for i in range(0, 2700, 90)]).tobytes())
    again = build_course(library, phases, Share("train", (0.0, 0.75)), segments=(2000, 700))
    assert sorted(opened) == prefixes
    same = hashlib.sha256(np.concatenate([again.source[i].tokens for i in range(0, 2700, 90)]).tobytes())
    assert digest.digest() == same.digest()
