"""Megatron-Core's data set beside ours, where the package (``pip install megatron-core``) is installed."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megatron_aquila.data.documents import DocumentRules

IS_INSTALLED = (
    importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
)


def gpt_dataset(
    prefix: Path, *, seq_len: int, seed: int, cache: Path, rules: DocumentRules | None, eod: int
) -> Sequence[object]:
    """One epoch of the whole data set as its ``GPTDataset``; dense attention masks are not made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Transformer Engine and Apex are not there
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    vocabulary = {"vocab_size": eod + 1, "eod": eod, "eos": eod, "pad": eod - 1}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([str(prefix)], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=SimpleNamespace(**vocabulary, special_tokens_dict={}, unique_identifiers={}),
        reset_position_ids=rules is not None and rules.reset_positions,
        reset_attention_mask=False,
        eod_mask_loss=rules is not None and rules.mask_loss,
        create_attention_mask=False,
    )
    data = IndexedDataset(str(prefix))
    found: Sequence[object] = GPTDataset(
        data, str(prefix), np.arange(len(data), dtype=np.int32), None, Split.train, config
    )
    return found
