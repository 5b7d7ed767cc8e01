import resource

import pytest

from megatron_aquila.data.open_files import allow_open_files
from megatron_aquila.errors import DataError


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process that may open 1024 files, and up to 4096."""
    found = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(found))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: found.__setitem__(slice(0, 2), wanted))
    return found


def test_few_data_sets_need_nothing(limits: list[int]) -> None:
    allow_open_files(0, num_indices=0)
    assert limits == [1024, 4096]
    allow_open_files(8, num_indices=16)
    assert limits == [4 * (8 * 2 + 16 * 3 + 256), 4096]


def test_hundreds_raise_the_limit(limits: list[int]) -> None:
    allow_open_files(300, num_indices=600)
    assert limits == [4096, 4096]


def test_more_than_the_system_allows_is_refused(limits: list[int]) -> None:
    with pytest.raises(DataError, match=r"1000 data sets .* may open 4096; raise .* ulimit -Hn 8256, or merge"):
        allow_open_files(1000, num_indices=2000)
    assert limits == [1024, 4096]
