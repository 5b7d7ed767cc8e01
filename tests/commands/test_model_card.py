from typing import Any

import pytest

from megatron_aquila.commands.model_card import beginning


@pytest.mark.parametrize(
    ("start", "published", "expected"),
    [
        ({"checkpoint": None, "weights": None}, None, "weights drawn at random"),
        ({"checkpoint": None, "weights": "/runs/base/step_0000007"}, None, "the weights of step_0000007"),
        ({"checkpoint": None, "weights": None}, "/models/llama-zh", "the published weights llama-zh"),
        (
            {"checkpoint": {"name": "step_0000007", "path": "/runs/base/step_0000007"}, "weights": None},
            None,
            "step_0000007 of base, with its optimizer",
        ),
    ],
)
def test_where_a_run_began(start: dict[str, Any], published: str | None, expected: str) -> None:
    assert beginning({"config": {"checkpoint.init_from_hf": published}, **start}) == expected
