"""Megatron-LM's own files are small enough to live beside these tests: a plain clone checks conformance."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def megatron_fixtures() -> Path:
    return Path(os.environ.get("AQUILA_TEST_FIXTURES", Path(__file__).parent / "megatron"))
