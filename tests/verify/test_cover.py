import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.verify.cover import Case, pairwise_cover

AXES = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 3).map(range), min_size=2)


def pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


@given(
    axes=AXES, forbidden=st.sets(st.tuples(st.sampled_from("abcde"), st.integers(0, 2)), max_size=3), odd=st.booleans()
)
def test_every_allowed_pair_is_met_and_every_case_is_allowed(axes: Any, forbidden: Any, odd: bool) -> None:
    def is_allowed(case: Case) -> bool:
        return not (len(forbidden & set(case.items())) > 1 or (odd and sum(case.values()) % 3 == 2))

    cases = pairwise_cover(axes, is_allowed)
    allowed = [
        case for values in itertools.product(*axes.values()) if is_allowed(case := dict(zip(axes, values, strict=True)))
    ]
    assert all(case in allowed for case in cases)
    assert set().union(*map(pairs, cases)) == set().union(*map(pairs, allowed))
    assert len(cases) <= len(allowed)
    assert cases == pairwise_cover(axes, is_allowed), "another sample each time"


def test_it_is_few() -> None:
    """Ten axes of two values: the orthogonal array has 12 rows of 1,024."""
    assert len(pairwise_cover(dict.fromkeys("abcdefghij", (0, 1)), lambda case: True)) <= 12


def test_nothing_allowed_needs_no_case() -> None:
    assert pairwise_cover({"a": (0, 1), "b": (0, 1)}, lambda case: False) == []
