"""Ends of documents mean what they mean in Megatron-LM, and each switch moves its own field only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.data.documents import DocumentRules
from tests.data.expected import assert_equals, build_case, load_case

EOD = 0  # of the tokenizer that the fixture was made with
ALL = DocumentRules(eod=EOD, reset_positions=True, reset_attention=True, mask_loss=True)
NONE = DocumentRules(eod=EOD, reset_positions=False, reset_attention=False, mask_loss=False)
TOKENS = np.array([[5, 0, 0, 6, 7, 0], [5, 6, 7, 8, 9, 1]])


def test_positions_and_masks_are_megatrons(megatron_fixtures: Path, tmp_path: Path) -> None:
    case = load_case(megatron_fixtures, "eod_masks")
    splits = build_case(megatron_fixtures, case, tmp_path)
    ends = 0
    for source, expected in zip((splits.train, splits.valid, splits.test), case["splits"], strict=True):
        assert source is not None
        assert_equals(source, expected)
        for number, sample in expected["samples"].items():
            tokens_BS = source[int(number)].tokens[None, :-1]
            assert ALL.positions(tokens_BS).tolist() == [sample["position_ids"]]
            assert ALL.loss_mask(tokens_BS).tolist() == [sample["loss_mask"]]
            ends += sample["loss_mask"].count(0.0)
    assert ends > 1, "no document ends in any sample that is written out"


def test_each_switch_alone() -> None:
    untouched = [np.tile(np.arange(6), (2, 1)).tolist(), np.ones((2, 6)).tolist(), None]

    def fields(rules: DocumentRules) -> list[object]:
        bounds = rules.bounds(TOKENS)
        return [
            rules.positions(TOKENS).tolist(),
            rules.loss_mask(TOKENS).tolist(),
            None if bounds is None else bounds.tolist(),
        ]

    positions = [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    loss_mask = [[1.0, 0.0, 0.0, 1.0, 1.0, 0.0], [1.0] * 6]
    assert fields(NONE) == untouched
    assert fields(replace(NONE, reset_positions=True)) == [positions, *untouched[1:]]
    assert fields(replace(NONE, mask_loss=True)) == [untouched[0], loss_mask, None]
    assert fields(replace(NONE, reset_attention=True)) == [*untouched[:2], [0, 2, 3, 6, 12]]
    assert fields(ALL) == [positions, loss_mask, [0, 2, 3, 6, 12]]


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_bounds_cut_every_sample_where_positions_begin(num_samples: int, length: int, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=num_samples * length, max_size=num_samples * length))
    tokens_BS = np.array(tokens).reshape(num_samples, length)
    bounds = ALL.bounds(tokens_BS)
    assert bounds is not None
    assert bounds.dtype == np.int32
    assert bounds[-1] == tokens_BS.size
    assert bounds[:-1].tolist() == np.flatnonzero(ALL.positions(tokens_BS) == 0).tolist()
    assert set(range(0, tokens_BS.size, length)) <= set(bounds.tolist()), "a document reaches into the next sample"
