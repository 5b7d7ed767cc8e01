import pytest

from megatron_aquila.plan.shape import ffn_size, padded_vocab_size


@pytest.mark.parametrize(
    ("hidden", "multiple", "multiplier", "ffn"),
    [(4096, 256, None, 11008), (6144, 4096, 1.3, 24576), (8192, 4096, 1.3, 28672)],
)
def test_ffn_rule_gives_the_published_widths(hidden, multiple, multiplier, ffn):
    assert ffn_size(hidden, multiple, multiplier) == ffn


def test_the_ffn_multiplier_zero_is_not_unset():
    assert ffn_size(4096, 256, 0.0) == 0


@pytest.mark.parametrize(("multiple", "padded"), [(128, 100096), (256, 100096), (512, 100352), (1, 100008)])
def test_vocab_padding(multiple, padded):
    assert padded_vocab_size(100008, multiple) == padded
