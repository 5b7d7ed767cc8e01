"""What a command of several processes prints on one of a pool's."""

import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from unittest import mock

PROCESS_GROUP = "megatron_aquila.train.env.process_group"  # a pool has one


def said(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> str:
    """What ``main`` prints here; alone it needs no pool."""
    out = io.StringIO()
    with redirect_stdout(out), mock.patch(PROCESS_GROUP, return_value=nullcontext()):
        assert main(argv) == 0
    return out.getvalue()
