"""Few cases in which every two settings meet: a covering array, chosen greedily. Pure."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Case = Mapping[str, Any]  # axis -> value


def pairwise_cover(axes: Mapping[str, Sequence[Any]], is_allowed: Callable[[Case], bool]) -> list[Case]:
    """Allowed cases in which every two values of two axes that can meet do.

    Among equals it is the first of the grid, so that what stands first in an axis is preferred.
    """
    return cover(axes, [case for case in grid(axes) if is_allowed(case)])


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    """Every combination, the last axis fastest."""
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def cover(axes: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> list[Case]:
    """Few of ``cases`` that have every pair of values which any of them has.

    Each has, of all, the most pairs that none before it has: AETG (Cohen et al. 1997), with ``cases`` as candidates.
    """
    pairs_of = _pairs(axes, cases)
    missing = np.zeros(pairs_of.max(initial=-1) + 1, dtype=bool)
    missing[pairs_of] = True
    chosen: list[Case] = []
    while missing.any():
        best = int(missing[pairs_of].sum(axis=1).argmax())
        missing[pairs_of[best]] = False
        chosen.append(cases[best])
    return chosen


def _pairs(axes: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> Any:
    """A row a case: the numbers of its pairs of values, each two axes with numbers of their own."""
    values = [{value: index for index, value in enumerate(axis)} for axis in axes.values()]
    numbers = [[index[value] for index, value in zip(values, case.values(), strict=True)] for case in cases]
    picks = np.array(numbers, dtype=np.int64).reshape(len(cases), len(axes))
    columns, used = [], 0
    for first, second in itertools.combinations(range(len(axes)), 2):
        columns.append(used + picks[:, first] * len(values[second]) + picks[:, second])
        used += len(values[first]) * len(values[second])
    return np.stack(columns, axis=1)
