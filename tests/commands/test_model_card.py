import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_aquila.checkpoint.store import CheckpointReader
from megatron_aquila.commands.model_card import beginning, model_card
from megatron_aquila.observe.ledger import LEDGER_NAME
from tests.checkpoint.toy import SHAPE
from tests.commands.test_convert_tokenizer import checkpoint


@pytest.mark.parametrize(
    ("start", "published", "expected"),
    [
        ({"checkpoint": None, "weights": None}, None, "weights drawn at random"),
        ({"checkpoint": None, "weights": "/runs/base/step_0000007"}, None, "the weights of step_0000007 of base"),
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
    if published is None:
        assert beginning({"config": {}, **start}) == expected, "as earlier versions wrote it"


def test_what_an_earlier_ledger_does_not_say_is_left_out(tmp_path: Path) -> None:
    save = checkpoint(tmp_path / "run", None)
    start = {
        "event": "start",
        "step": 0,
        "run": "r1",
        "world": 1,
        "layout": {"tp": 1},
        "version": "0.1",
        "commit": None,
    }
    start |= {"checkpoint": None, "config": {"data.path": ["1e-1", "/data/zh", ".9", "/data/3"], "optim.lr": 1e-3}}
    (save / LEDGER_NAME).write_text(json.dumps(start | {"time": 0}) + "\n")
    card = model_card("toy", CheckpointReader(save / "step_0000007"), SHAPE, None, torch.float32, "not checked")
    assert "| data sets | zh, 3 |" in card
    assert "| began from | weights drawn at random |" in card
    for name in ("batch", "learning rate", "trained"):
        assert f"| {name} |" not in card
