"""What is claimed of a layout: a row an axis that it uses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_aquila.verify.compare import Bits
from megatron_aquila.verify.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """``layout`` computes what the plain reference does; or, with ``twin``, bit for bit what that layout does."""

    axis: str
    layout: Layout
    twin: Layout | None = None
    bits: Bits = "everything"


def claims(requested: Layout) -> list[Claim]:
    """Each axis of ``requested`` alone, what may not change a bit, and all together; none of them twice."""
    found: list[Claim] = []
    for claim in _claims(requested):
        if not any((one.layout, one.twin) == (claim.layout, claim.twin) for one in found):
            found.append(claim)
    return found


def _claims(requested: Layout) -> Iterator[Claim]:
    one, asked = Layout(), requested.options
    tp, pp, dp = Layout(tp=requested.tp), Layout(pp=requested.pp), Layout(dp=requested.dp)
    yield Claim(axis="world of one", layout=one)
    yield Claim(axis="tp", layout=tp)
    yield Claim(axis="tp + sp", layout=replace(tp, sequence="tp" in asked))
    scheduled = replace(pp, schedule=requested.schedule, chunks=requested.chunks)
    for axis, layout, is_asked in (("pp", pp, "pp" in asked), ("schedule", scheduled, scheduled != pp)):
        if is_asked:
            yield Claim(axis=axis, layout=layout)
            yield Claim(axis=axis, layout=layout, twin=one, bits="gradients")
    yield Claim(axis="dp (ZeRO-1)", layout=dp)
    if "cp" in asked:
        yield Claim(axis=f"cp ({requested.cp_method})", layout=Layout(cp=requested.cp, cp_method=requested.cp_method))
    yield Claim(axis="ZeRO", layout=replace(dp, zero=requested.zero))
    if "zero_group" in asked:
        cut = replace(dp, cp=requested.cp, cp_method=requested.cp_method, zero=requested.zero)
        cut = replace(cut, zero_group=requested.zero_group)
        fixed = replace(cut, deterministic=True)
        yield Claim(axis="ZeRO in groups", layout=cut)
        yield Claim(axis="ZeRO in groups", layout=fixed, twin=replace(fixed, zero_group=None), bits="gradients")
    yield Claim(axis="micro-batch size", layout=Layout(micro_batch=requested.micro_batch))
    if requested.uneven:
        yield Claim(axis="uneven replicas", layout=replace(dp, micro_batch=requested.micro_batch, uneven=True))
    yield Claim(axis="fused main grads", layout=Layout(fused=requested.fused))
    for option in ("recompute", "overlap", "offload", "offload_activations"):
        if option in asked:
            yield Claim(axis=option.replace("_", " "), layout=requested, twin=requested.without(option))
    if "small_buckets" in asked:
        fixed = replace(dp, deterministic=True)
        small = replace(fixed, small_buckets=True)
        yield Claim(axis="bucket sizes", layout=small, twin=fixed, bits="gradients")
    yield Claim(axis="all together", layout=requested)
