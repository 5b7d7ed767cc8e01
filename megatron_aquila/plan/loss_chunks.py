"""How many tokens' logits exist at once."""

from megatron_aquila.plan.shape import ModelShape

LOGITS_BYTES = 2**30
WIDE_ELEMENTS = 2**24  # logits that are widened for the softmax at a time, 64 MiB in float32
UNIT_ROW_ELEMENTS = 2**24  # of a head that are widened at a time, where its rows are used at length 1


def loss_chunk_tokens(num_tokens: int, *, row_bytes: int, wanted: int | None = None) -> int:
    """Tokens of a chunk of ``num_tokens``: as ``wanted``, else even chunks of no more than ``LOGITS_BYTES``.

    ``row_bytes`` are those of one token's logits on this rank. A chunk adds its part of the weight's gradient to a sum
    in fp32, which reads and writes 8 bytes a weight beside the 6 FLOPs a weight and token of the chunk: at 700 TFLOP/s
    and 4 TB/s that is 6 % of the head's time at 4,096 tokens, and 24 % at 1,024. So chunks are large. The 7B's 8,192
    tokens make two.
    """
    if wanted is not None:
        return min(wanted, num_tokens)
    num_chunks = -(-num_tokens * row_bytes // LOGITS_BYTES)
    return -(-num_tokens // num_chunks)


def wide_rows(row_elements: int) -> int:
    """Tokens whose softmax is wide at a time, of ``row_elements`` logits each.

    Triton's kernels widen none: where they run, less memory is needed than is planned, for the 7B 96 MiB at most.
    """
    return max(1, WIDE_ELEMENTS // row_elements)


def loss_moment(
    shape: ModelShape,
    *,
    tokens: int,
    columns: int,
    item: int,
    wide: int,
    chunk_tokens: int | None,
    sequence_parallel: bool,
) -> int:
    """Bytes of the loss's widest moment, of ``tokens`` with ``columns`` logits each on this rank.

    With the logits kept (``chunk_tokens`` 0): a softmax and its narrow copy. Else a chunk's logits, of some of them a
    wide copy and the exponentials, or x's gradient of the chunk; that of all tokens, and under sequence parallel x
    gathered. Where the head's rows are used at length 1, these beside it, and without kept logits in float32 or wider
    their gradient.
    """
    rows = columns * shape.hidden_size * item * shape.norm_head
    if chunk_tokens == 0:
        return max(rows, tokens * columns * (wide + item))
    grad = columns * shape.hidden_size * wide * shape.norm_head
    row_bytes, hidden = item * columns, item * shape.hidden_size
    chunk = loss_chunk_tokens(tokens, row_bytes=row_bytes, wanted=chunk_tokens)
    widened = min(chunk, wide_rows(columns)) * columns * wide * (1 + (wide > item))
    moment = max(chunk * row_bytes + max(widened, chunk * hidden), unit_rows_moment(shape, columns=columns, wide=wide))
    return rows + grad + moment + tokens * hidden * (1 + sequence_parallel)


def unit_rows_moment(shape: ModelShape, *, columns: int, wide: int) -> int:
    """Bytes while the gradient of rows at length 1 is made that of the rows: three wide pieces of them."""
    return 3 * min(UNIT_ROW_ELEMENTS, columns * shape.hidden_size) * wide * shape.norm_head
