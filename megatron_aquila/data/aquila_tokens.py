"""What is known of Aquila's own tokenizer: its special tokens, its size, and ids of some texts."""

from typing import Final

PAD: Final = "<|endoftext|>"
BOS: Final = "[CLS]"
EOD: Final = "</s>"
AQUILA_SPECIAL_TOKENS: Final = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    BOS,
    EOD,
)
AQUILA_VOCAB_SIZE: Final = 100008  # of Aquila's own tokenizer; the eight special tokens are its last ids
AQUILA_GOLDEN_IDS: Final = {
    "这是一个测试": (15128, 5744),
    "Hello world": (22299, 3117),
    "There is something wrong, please query again": (4891, 397, 3337, 6689, 12, 8641, 13418, 1989),
    "请给出10个要到北京旅游的理由。": (1486, 19743, 865, 424, 50927, 2557, 3063, 32345, 278),
    "### Human: 你好\n": (8090, 16399, 26, 221, 34856, 199),
}  # what Aquila's own tokenizer makes of these texts
