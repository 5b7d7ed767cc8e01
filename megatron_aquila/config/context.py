"""What splitting samples over ranks demands: of their length, and of the heads."""

import math
from collections.abc import Iterator

from megatron_aquila.config.derive import model_shape
from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem
from megatron_aquila.plan.sequence import num_pieces


def check_sequence(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Samples divide into the pieces of the context ranks, and each rank's tokens over tp under sequence parallel."""
    seq_len, layout = config.model.seq_len, config.parallel
    cp, tp = layout.context, layout.tensor if layout.sequence else 1
    pieces = num_pieces(cp, layout.context_method)
    unit = math.lcm(pieces, cp * tp)
    if seq_len % unit == 0:
        return
    whys, ways_out = [], []
    if cp > 1:
        whys.append(f"{layout.context_method} attention over cp {cp} splits it into {pieces} pieces")
    if seq_len % (cp * tp) and tp > 1:
        whys.append(f"sequence parallelism splits {'it' if cp == 1 else 'what a rank holds'} over tp {tp}")
        ways_out = ["--no-sp"] if seq_len % pieces == 0 else []
    below = seq_len // unit * unit
    near = [str(length) for length in (below, below + unit) if length > 0]
    yield Problem("--seq-len", seq_len, " and ".join(whys), f"use {', or '.join([' or '.join(near), *ways_out])}")


def check_context_heads(config: RunConfig, world: int | None) -> Iterator[Problem]:
    """Ulysses deals each tensor rank's query heads to its context ranks; key/value heads are copied where too few."""
    layout, shape = config.parallel, model_shape(config.model)
    if layout.context_method == "ulysses":
        yield from head_problems(shape.num_heads, tp=layout.tensor, cp=layout.context, world=world)


def head_problems(num_heads: int, *, tp: int, cp: int, world: int | None) -> Iterator[Problem]:
    """Why Ulysses cannot deal the heads of a tensor rank to ``cp`` ranks; where tp does not divide them that is told
    elsewhere.
    """
    heads, rest = divmod(num_heads, tp)
    if rest == 0 and heads % cp:
        possible = heads if world is None else math.gcd(heads, world // tp)
        most = max(size for size in range(1, cp) if possible % size == 0)
        why = f"ulysses splits the {heads} query heads of a tensor rank, which {cp} does not divide"
        yield Problem("--cp", cp, why, f"use {most}, or --cp-method ring, which splits no heads")
