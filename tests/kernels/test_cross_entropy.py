import torch

from megatron_aquila.kernels.cross_entropy import cross_entropy


def test_equals_torch_and_leaves_padding_out() -> None:
    logits, labels = torch.randn(5, 2, 16, dtype=torch.float64), torch.randint(13, (5, 2))
    ours = cross_entropy(logits, labels, vocab_size=13)
    theirs = torch.nn.functional.cross_entropy(logits[..., :13].flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(ours.flatten(), theirs, rtol=0, atol=1e-14)
    assert (cross_entropy(logits, labels, vocab_size=16) - ours).abs().min() > 1e-3, "padding in the softmax must show"


def test_computes_in_float32_or_wider() -> None:
    logits, labels = torch.randn(5, 2, 16), torch.randint(13, (5, 2))
    assert cross_entropy(logits.bfloat16(), labels, vocab_size=13).dtype is torch.float32
    assert cross_entropy(logits.double(), labels, vocab_size=13).dtype is torch.float64
