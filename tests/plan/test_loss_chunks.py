from hypothesis import given
from hypothesis import strategies as st

from megatron_aquila.plan.loss_chunks import LOGITS_BYTES, WIDE_ELEMENTS, loss_chunk_tokens, wide_rows


def test_the_7b_and_the_34b_in_bf16() -> None:
    columns = 100096
    assert loss_chunk_tokens(2048, row_bytes=2 * columns) == 2048
    assert loss_chunk_tokens(8192, row_bytes=2 * columns) == 4096
    assert loss_chunk_tokens(4096, row_bytes=2 * columns // 4) == 4096


@given(tokens=st.integers(1, 10**6), row_bytes=st.integers(1, 2**20))
def test_chunks_are_even_and_no_larger_than_they_may_be(tokens: int, row_bytes: int) -> None:
    chunk = loss_chunk_tokens(tokens, row_bytes=row_bytes)
    fewest = -(-tokens * row_bytes // LOGITS_BYTES)
    assert 1 <= chunk <= tokens
    assert (chunk - 1) * fewest < tokens <= chunk * fewest, "as few chunks as can be, and none a token longer"
    assert (chunk - 1) * row_bytes < LOGITS_BYTES


def test_as_the_user_wants_it() -> None:
    assert loss_chunk_tokens(100, row_bytes=1, wanted=7) == 7
    assert loss_chunk_tokens(100, row_bytes=1, wanted=700) == 100


def test_at_least_one_row_is_wide() -> None:
    assert wide_rows(100096) == WIDE_ELEMENTS // 100096 == 167
    assert wide_rows(2 * WIDE_ELEMENTS) == 1
