"""The order of samples is Megatron-LM's under any dp, depends on nothing but the position, and survives a resume."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.documents import DocumentRules
from megatron_aquila.data.loader import BatchLoader, MicroBatch
from megatron_aquila.data.samples import Sample
from megatron_aquila.errors import DataError
from megatron_aquila.plan.batches import BatchPlan, ReplicaShare
from tests.data.expected import build_case, load_case


class Counting:
    """Sample i is i, i + 1, ...; its source is i modulo 2."""

    def __init__(self, length: int, *, offset: int = 0, names: tuple[str, ...] = ("a", "b")) -> None:
        self.length, self.offset, self.names = length, offset, names
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        self.reads.append(index)
        return Sample(np.arange(4, dtype=np.int64) + index + self.offset, index % 2)

    def describe(self) -> str:
        return f"{self.length} from {self.offset}"


def as_read(batch: MicroBatch, number: int) -> MicroBatch:
    return batch


def loader(source: Counting, *, micro_batch: int = 1, **settings: object) -> BatchLoader[Any]:
    share = ReplicaShare(size=micro_batch, round_size=micro_batch)
    given = {"share": share, "vocab_size": 1000, "prepare": as_read} | settings
    return BatchLoader(source, **given)  # type: ignore[arg-type]


def numbers(batches: list[MicroBatch]) -> list[list[int]]:
    return [batch.tokens_BS[:, 0].tolist() for batch in batches]


def test_a_microbatch() -> None:
    (batch,) = loader(Counting(10), micro_batch=2).fetch(3, 2)
    assert batch.tokens_BS.tolist() == [[3, 4, 5], [4, 5, 6]]
    assert batch.labels_BS.tolist() == [[4, 5, 6], [5, 6, 7]]
    assert batch.positions_BS.tolist() == [[0, 1, 2]] * 2
    assert batch.loss_mask_BS.tolist() == [[1.0] * 3] * 2
    assert batch.source_B.tolist() == [1, 0]
    assert batch.document_bounds is None
    dtypes = [getattr(batch, name).dtype for name in MicroBatch.__dataclass_fields__ if name != "document_bounds"]
    assert dtypes == [np.int64, np.int64, np.float32, np.int64, np.int64]


def test_documents_reach_the_microbatch() -> None:
    rules = DocumentRules(eod=4, reset_positions=True, reset_attention=True, mask_loss=True)
    (batch,) = loader(Counting(10), micro_batch=2, documents=rules).fetch(3, 2)
    assert batch.tokens_BS.tolist() == [[3, 4, 5], [4, 5, 6]]
    assert batch.positions_BS.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert batch.document_bounds is not None
    assert batch.document_bounds.tolist() == [0, 2, 3, 4, 6]


def fetch_all(source: Counting, sizes: tuple[int, ...], consumed: int, batch: int) -> list[list[MicroBatch]]:
    """What each replica reads of a global batch, ``sizes`` samples at once."""
    plan = BatchPlan(global_batch=batch, micro_batches=sizes)
    return [loader(source, share=plan.share_of(rank)).fetch(consumed, batch) for rank in range(len(sizes))]


@given(dp=st.integers(1, 4), micro=st.integers(1, 3), count=st.integers(1, 3), consumed=st.integers(0, 9))
def test_ranks_share_a_batch_in_megatrons_order(dp: int, micro: int, count: int, consumed: int) -> None:
    size = dp * micro * count
    source = Counting(consumed + size)
    ranks = fetch_all(source, (micro,) * dp, consumed, size)
    for rank, batches in enumerate(ranks):
        expected = [[consumed + j * micro * dp + rank * micro + k for k in range(micro)] for j in range(count)]
        assert numbers(batches) == expected
    assert sorted(n for batches in ranks for batch in numbers(batches) for n in batch) == list(
        range(consumed, consumed + size)
    )


def test_a_replica_that_takes_more_leaves_the_order_as_it_is() -> None:
    first, second, third = (numbers(batches) for batches in fetch_all(Counting(20), (2, 3, 1), 4, 12))
    assert first == [[4, 5], [10, 11]]
    assert second == [[6, 7, 8], [12, 13, 14]]
    assert third == [[9], [15]]


def test_reading_ahead_changes_nothing() -> None:
    def ramp(consumed: int) -> int:
        return 2 if consumed < 6 else 4

    steps = [(0, 2), (2, 2), (4, 2), (6, 4), (10, 4)]
    plain = [numbers(loader(Counting(15)).fetch(*step)) for step in steps]
    source = Counting(15)
    ahead = loader(source, batch_at=ramp, prefetch=2)
    assert [numbers(ahead.fetch(*step)) for step in steps] == plain
    ahead.close()
    assert source.reads == list(range(14)), "each sample once, none beyond the last whole step"


def test_the_reading_thread_makes_a_step_s_microbatches_ready() -> None:
    made: list[tuple[str, int]] = []

    def prepare(batch: MicroBatch, number: int) -> str:
        made.append((threading.current_thread().name, number))
        return f"{batch.tokens_BS[0, 0]} is number {number}"

    ahead = loader(Counting(20), batch_at=lambda _: 2, prefetch=1, prepare=prepare)
    assert ahead.fetch(0, 2) == ["0 is number 0", "1 is number 1"]
    assert ahead.fetch(2, 2) == ["2 is number 0", "3 is number 1"]
    ahead.close()
    assert all(name.startswith("data") for name, _ in made[2:]), "the step itself would have to wait for it"
    assert [number for _, number in made[2:4]] == [0, 1]


def test_a_jump_is_read_afresh() -> None:
    ahead = loader(Counting(20), batch_at=lambda _: 2, prefetch=2)
    assert numbers(ahead.fetch(0, 2)) == [[0], [1]]
    assert numbers(ahead.fetch(10, 4)) == [[10], [11], [12], [13]]
    assert numbers(ahead.fetch(14, 2)) == [[14], [15]]
    ahead.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_ids_outside_the_vocabulary(prefetch: int) -> None:
    broken = loader(Counting(20), vocab_size=9, batch_at=lambda _: 2, prefetch=prefetch, micro_batch=2)
    for consumed in (0, 2, 4):
        broken.fetch(consumed, 2)
    with pytest.raises(DataError, match=r"a: token 9 in sample 6 is outside the vocabulary of 9"):
        broken.fetch(6, 2)
    broken.close()
    with pytest.raises(DataError, match=r"b: token -3 in sample 1 is outside"):
        loader(Counting(20, offset=-4)).fetch(1, 1)


def test_what_fills_a_sample_up_is_not_learnt() -> None:
    class Short(Counting):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), padding=index % 3)

    (batch,) = loader(Short(9), micro_batch=3).fetch(3, 3)
    assert batch.loss_mask_BS.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_the_end_of_the_data() -> None:
    with pytest.raises(
        DataError, match=r"a, b: samples 4 to 6 wanted, but the run's data has 5; raise --train-samples"
    ):
        loader(Counting(5)).fetch(4, 2)


def test_a_last_batch_is_filled_up_with_samples_that_do_not_count() -> None:
    source = Counting(5)
    batches = loader(source, micro_batch=2, num_counted=3).fetch(0, 8)
    assert numbers(batches) == [[0, 1], [2, 3], [4, 4], [4, 4]]
    assert [batch.loss_mask_BS.sum(1).tolist() for batch in batches] == [[3, 3], [3, 0], [0, 0], [0, 0]]


def test_real_samples_through_the_loader(megatron_fixtures: Path, tmp_path: Path) -> None:
    source = build_case(megatron_fixtures, load_case(megatron_fixtures, "blend_weighted"), tmp_path).train
    assert source is not None
    first, second = loader(source, share=ReplicaShare(size=2, first=2, round_size=4), vocab_size=160_000).fetch(8, 8)
    assert first.tokens_BS.tolist() == [source[10].tokens[:-1].tolist(), source[11].tokens[:-1].tolist()]
    assert second.labels_BS.tolist() == [source[14].tokens[1:].tolist(), source[15].tokens[1:].tolist()]
    assert second.source_B.tolist() == [source[14].source, source[15].source]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_samples_that_are_left_out_are_not_read_and_the_others_stay_where_they_are(prefetch: int) -> None:
    source = Counting(40)
    reader = loader(source, micro_batch=2, batch_at=lambda _: 4, prefetch=prefetch)
    reader.fetch(0, 4)
    reader.leave_out([(5, 7), (8, 12)], seq_len=3)
    first, second = reader.fetch(4, 4)
    assert [first.tokens_BS.tolist(), second.tokens_BS.tolist()] == [[[4, 5, 6], [0] * 3], [[0] * 3, [7, 8, 9]]]
    assert [first.loss_mask_BS.tolist(), second.loss_mask_BS.tolist()] == [[[1] * 3, [0] * 3], [[0] * 3, [1] * 3]]
    assert all(batch.loss_mask_BS.sum() == 0 for batch in reader.fetch(8, 4))
    assert numbers(reader.fetch(12, 4)) == [[12, 13], [14, 15]]
    reader.close()
    if prefetch == 0:  # else some had been read before it was known
        assert source.reads == [0, 1, 2, 3, 4, 7, 12, 13, 14, 15]
