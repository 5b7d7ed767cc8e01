import pytest

from tests.pipeline.closed_forms import bubble_share, bubble_time


@pytest.mark.parametrize(
    ("schedule", "chunks", "percent"),
    [("gpipe", 1, 8.57), ("1f1b", 1, 8.57), ("1f1b", 5, 1.84), ("zb-h1", 1, 3.03), ("zb-v", 2, 0.0)],
)
def test_known_bubbles_of_four_stages_and_32_microbatches(schedule, chunks, percent):
    bubble = bubble_time(schedule, num_ranks=4, forward=1, backward=1, weight=1, chunks=chunks)
    assert 100 * bubble_share(bubble, num_microbatches=32, stage=3) == pytest.approx(percent, abs=0.005)


def test_one_stage_has_no_bubble():
    assert bubble_time("1f1b", num_ranks=1, forward=1, backward=2, weight=1) == 0
