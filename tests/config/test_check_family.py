from dataclasses import replace

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from tests.families import TWO_RANGE


@pytest.mark.parametrize(
    ("model", "parallel", "data", "problem"),
    [
        ({"position_embedding": "alibi"}, {"context": 2}, {}, "--position-embedding alibi: scores are not changed"),
        ({"score_clamp": 9.0}, {"context": 2}, {}, "--score-clamp 9.0: scores are not changed"),
        ({"position_embedding": "alibi"}, {}, {"reset_position_ids": True}, "--reset-position-ids True: ALiBi counts"),
        (
            {"position_embedding": "alibi", "rope_scaling": "linear", "rope_factor": 2.0},
            {},
            {},
            "--rope-scaling linear: with --position-embedding alibi nothing is turned",
        ),
        (TWO_RANGE, {"context": 2}, {}, "--rope-scaling two-range: near and far pairs are not told apart"),
        ({**TWO_RANGE, "score_clamp": 9.0}, {}, {}, "--score-clamp 9.0: attention by blocks does not clamp"),
        (TWO_RANGE, {}, {"reset_position_ids": True}, "--reset-position-ids True: --rope-scaling two-range counts"),
    ],
)
def test_what_scores_that_change_do_not_go_with(model, parallel, data, problem) -> None:
    config = RunConfig(model=ModelConfig(**model), parallel=ParallelConfig(**parallel), data=DataConfig(**data))
    assert any(str(found).startswith(problem) for found in check(config, None))


def test_what_they_go_with() -> None:
    config = RunConfig(model=ModelConfig(position_embedding="alibi"))
    both = replace(config, data=DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_token_id=2))
    for one in (config, both):
        assert not [found for found in check(one, None) if "position" in str(found)]
