from pathlib import Path

import numpy as np
import pytest

from megatron_aquila.data.samples import Sample
from megatron_aquila.errors import CheckpointError
from megatron_aquila.train import upcoming
from megatron_aquila.train.state import Upcoming


class Source(list):  # type: ignore[type-arg]
    """Samples that are there."""


def source(*, change: int | None = None) -> Source:
    samples = [np.arange(5, dtype=np.int64) + number for number in range(300)]
    if change is not None:
        samples[change][2] += 1
    return Source(Sample(tokens, 0) for tokens in samples)


def test_a_changed_token_is_found_where_it_comes_next_and_both_digests_are_named() -> None:
    saved = upcoming.upcoming(source(), 100)  # type: ignore[arg-type]
    assert (saved.start, saved.stop) == (100, 228)
    assert saved.digest in upcoming.check_upcoming(saved, source(), override=False)  # type: ignore[arg-type]
    assert "as in the checkpoint" in upcoming.check_upcoming(saved, source(change=99), override=False)  # type: ignore[arg-type]
    other = source(change=227)
    found = upcoming.upcoming(other, 100).digest  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"100-227: digest {saved.digest} in .*, {found} here.*--override-data"):
        upcoming.check_upcoming(saved, other, override=False)  # type: ignore[arg-type]
    assert found in upcoming.check_upcoming(saved, other, override=True)  # type: ignore[arg-type]


def test_the_end_of_the_data_has_a_digest_too() -> None:
    saved = upcoming.upcoming(source(), 290)  # type: ignore[arg-type]
    assert (saved.start, saved.stop) == (290, 300)
    with pytest.raises(CheckpointError, match="290-299"):
        upcoming.check_upcoming(saved, Source(source()[:295]), override=False)
    end = upcoming.upcoming(source(), 300)  # type: ignore[arg-type]
    assert end == Upcoming(300, 300, end.digest)
    assert "no sample" in upcoming.check_upcoming(end, Source(), override=False)


def test_order_counts(tmp_path: Path) -> None:
    turned = source()
    turned[3], turned[4] = turned[4], turned[3]
    assert upcoming.digest(turned, 0, 8) != upcoming.digest(source(), 0, 8)  # type: ignore[arg-type]
