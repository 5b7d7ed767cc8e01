from dataclasses import replace

import pytest

from megatron_aquila.config.check import check
from megatron_aquila.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from tests.families import TWO_RANGE


@pytest.mark.parametrize(
    ("model", "data", "problem"),
    [
        ({"position_embedding": "alibi"}, {"reset_position_ids": True}, "--reset-position-ids True: ALiBi counts"),
        (
            {"position_embedding": "alibi", "rope_scaling": "linear", "rope_factor": 2.0},
            {},
            "--rope-scaling linear: with --position-embedding alibi nothing is turned",
        ),
        (TWO_RANGE, {"reset_position_ids": True}, "--reset-position-ids True: --rope-scaling two-range counts"),
    ],
)
def test_what_scores_that_change_do_not_go_with(model, data, problem) -> None:
    config = RunConfig(model=ModelConfig(**model), data=DataConfig(**data))
    assert any(str(found).startswith(problem) for found in check(config, None))


def test_what_they_go_with() -> None:
    config = RunConfig(model=ModelConfig(position_embedding="alibi"))
    both = replace(config, data=DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_token_id=2))
    for one in (config, both):
        assert not [found for found in check(one, None) if "position" in str(found)]


@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("model", [{"position_embedding": "alibi"}, {**TWO_RANGE, "score_clamp": 9.0}])
def test_samples_may_be_split_whatever_is_done_to_scores(model, method) -> None:
    parallel = ParallelConfig(context=2, context_method=method)
    config = RunConfig(model=ModelConfig(**model), parallel=parallel)
    flags = {problem.flag for problem in check(config, None)}
    assert not flags & {"--cp", "--position-embedding", "--score-clamp", "--rope-scaling"}
