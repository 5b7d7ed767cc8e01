"""With and without orjson: the same values, the same bytes, the same refusals."""

from typing import Any

import pytest

from megatron_aquila.data import fast_json


@pytest.mark.parametrize("library", ["orjson", "json"])
def test_both_read_and_write_alike(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "json":
        monkeypatch.setattr(fast_json, "orjson", None)
    value: dict[str, Any] = {"Ġ": 1, "列": [None, 2.5, 'a"\n']}
    assert fast_json.loads(fast_json.dumps(value)) == value
    assert "列".encode() in fast_json.dumps(value)
    assert fast_json.fast_loads(b'{"a": 1}') == (None if library == "json" else {"a": 1})
    assert fast_json.fast_loads(b'{"a": NaN}') is None
    assert str(fast_json.loads('{"a": NaN}')["a"]) == "nan"
    with pytest.raises(ValueError, match="Expecting"):
        fast_json.loads(b"{")
