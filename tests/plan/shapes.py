"""Published shapes that the tests of this room share."""

from megatron_aquila.plan.shape import ModelShape, ffn_size, padded_vocab_size


def aquila(num_layers, hidden_size, num_heads, num_kv_heads, multiple, multiplier, vocab_multiple, seq_len):
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_size=ffn_size(hidden_size, multiple, multiplier),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=100008,
        padded_vocab_size=padded_vocab_size(100008, vocab_multiple),
        seq_len=seq_len,
    )


AQUILA_7B = aquila(32, 4096, 32, 32, 256, None, 128, 2048)
AQUILA_34B = aquila(60, 6144, 48, 8, 4096, 1.3, 256, 4096)
AQUILA_70B = aquila(80, 8192, 64, 8, 4096, 1.3, 512, 4096)
