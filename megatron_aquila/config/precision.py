"""What the types of weights, gradients and optimizer states demand of each other, of the device and of the loss."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_precision(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Proofs in float64 are for the CPU."""
    if config.train.precision == "fp64" and config.train.device == "cuda":
        why = "fp64 is for proofs on the CPU; attention on CUDA has no fp64"
        yield Problem("--precision", "fp64", why, "use bf16 or fp32, or --device cpu")


def check_grad_reduce(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Gradients do not travel in fewer bits than the weights have."""
    precision = config.train.precision
    if config.parallel.grad_reduce == "bf16" and precision in ("fp32", "fp64"):
        why = f"it would round the gradients of {precision} weights to 8 bits"
        yield Problem("--grad-reduce", "bf16", why, "use fp32, or --precision bf16")


def check_optimizer_storage(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Narrow states are for bf16 weights under AdamW, and moments must be able to shrink in them."""
    optim, precision = config.optim, config.train.precision
    asked = {"--moments-dtype": optim.moments_dtype, "--master-weights": optim.master_weights}
    for flag, value in asked.items():
        if value == "fp32":
            continue
        if optim.optimizer != "adamw":
            yield Problem(
                flag, value, f"{optim.optimizer} is for proofs and keeps nothing narrow", "use --optimizer adamw"
            )
        if precision not in ("bf16", "fp8"):
            why = f"{precision} has no use for it: only bf16 weights are as narrow"
            yield Problem(flag, value, why, "use fp32, or --precision bf16")
    for flag, beta in (("--beta1", optim.beta1), ("--beta2", optim.beta2)):
        if optim.moments_dtype == "bf16" and 1 - beta < 2**-8:
            why = f"with {flag} {beta} a moment could not shrink: a step's {1 - beta:.2g} of it is rounded away"
            yield Problem("--moments-dtype", "bf16", why, f"use fp32, or {flag} 0.99 or less")


def check_loss_scale(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """Only fp16 has one, and it begins above its least."""
    optim, precision = config.optim, config.train.precision
    if precision != "fp16":
        if optim.loss_scale is not None:
            yield Problem("--loss-scale", optim.loss_scale, f"{precision} needs no loss scale", "leave it out")
    elif optim.initial_loss_scale < optim.min_loss_scale:
        why = f"is below min_loss_scale {optim.min_loss_scale}"
        yield Problem("--initial-loss-scale", optim.initial_loss_scale, why, f"use {optim.min_loss_scale} or more")
