"""A reference compiled by torch.compile: one of the choices for what lies between two linears.

A whole block is not compiled, docs/decisions/010-compiled-kernels.md says why.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def compiled(reference: Callable[P, R]) -> Callable[P, R]:
    """``reference`` as one compiled graph a shape, made at its first call.

    A break of the graph is an error, and so are more shapes than torch's recompile limit: nothing runs uncompiled in
    silence. What is kept for backward is torch's choice.
    """

    @cache
    def whole() -> Callable[P, R]:
        graph: Callable[P, R] = torch.compile(reference, fullgraph=True, dynamic=False)
        return graph

    @wraps(reference)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return whole()(*args, **kwargs)

    return call
