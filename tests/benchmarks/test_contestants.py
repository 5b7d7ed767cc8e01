"""transformers' model is measured at its best: what torch.compile gets of it is looked at."""

import torch
from torch import fx

from benchmarks.contestants import llama
from benchmarks.shapes import model_config
from megatron_aquila.config.derive import derive

CPU = torch.device("cpu")


def test_the_compiled_model_attends_without_a_mask() -> None:
    shape = derive(model_config("tiny-grouped", "--seq-len", "16"), 1).shape
    model = llama(shape, torch.float32, CPU)
    calls: list[dict[str, object]] = []

    def backend(graph: fx.GraphModule, _inputs: list[torch.Tensor]) -> fx.GraphModule:
        calls.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    tokens_BS = torch.randint(shape.vocab_size, (2, 16))
    torch.compiler.reset()
    found = torch.compile(model, backend=backend)(input_ids=tokens_BS, labels=tokens_BS).loss
    model.set_attn_implementation("eager")  # with the mask that says what is causal
    torch.testing.assert_close(found, model(input_ids=tokens_BS, labels=tokens_BS).loss)
    assert len(calls) == shape.num_layers
    for call in calls:
        assert {"attn_mask": None, "is_causal": True, "enable_gqa": True}.items() <= call.items()
