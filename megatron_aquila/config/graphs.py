"""What a recorded step demands of the other settings."""

from collections.abc import Iterator

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.errors import Problem


def check_cuda_graph(config: RunConfig, _world: int | None) -> Iterator[Problem]:
    """A recorded step runs the same kernels on the same memory each time, and asks the host for nothing."""
    if not config.train.cuda_graph:
        return
    parallel, train, leave = config.parallel, config.train, "or leave --cuda-graph out"
    if train.device == "cpu":
        yield Problem("--cuda-graph", "", "the CPU launches no kernels", "leave it out, or use --device cuda")
    if parallel.pipeline > 1:
        yield Problem("--pp", parallel.pipeline, "messages between stages are not recorded", f"use 1, {leave}")
    if train.distributed_backend == "gloo":
        why = "what goes through the host's memory is not recorded"
        yield Problem("--distributed-backend", "gloo", why, f"use nccl, {leave}")
    if parallel.zero > 1:
        why = "the memory of sharded gradients and weights comes and goes within a recorded step"
        yield Problem("--zero", parallel.zero, why, f"use 1, {leave}")
    if config.optim.offload_optimizer > 0:
        why = "the host waits for each step's gradients, which a recorded one does not tell it of"
        yield Problem("--offload-optimizer", config.optim.offload_optimizer, why, f"use 0, {leave}")
    if train.offload_activations > 0:
        why = "copies to the host and back are not recorded"
        yield Problem("--offload-activations", train.offload_activations, why, f"use 0, {leave}")
    if config.data.reset_attention_mask:
        why = "attention is launched by documents' lengths, which differ from step to step"
        yield Problem("--reset-attention-mask", "", why, f"leave it out, {leave}")
    if config.model.position_embedding == "alibi":
        why = "each layer copies its slopes from memory of the host that is given back"
        yield Problem("--position-embedding", "alibi", why, f"use rope, {leave}")
