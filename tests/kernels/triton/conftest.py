"""Where a GPU is, all tests of this folder need it: they compile there what is interpreted on a CPU."""

import pytest
import torch


def pytest_itemcollected(item: pytest.Item) -> None:
    if torch.cuda.is_available():
        item.add_marker("gpu")
