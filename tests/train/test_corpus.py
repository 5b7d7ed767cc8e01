from dataclasses import replace
from pathlib import Path

import pytest

from megatron_aquila.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_aquila.errors import ConfigError, DataError
from megatron_aquila.train.corpus import identify
from tests.train.runs import run, tiny_config, write_corpus


def test_a_tokenizer_of_another_vocabulary_is_refused_with_the_right_size(
    aquila_tokenizer_dir: Path, tmp_path: Path
) -> None:
    data = DataConfig(
        path=write_corpus(tmp_path),
        vocab_file=aquila_tokenizer_dir / "vocab.json",
        merge_file=aquila_tokenizer_dir / "merges.txt",
        special_tokens_file=aquila_tokenizer_dir / "special_tokens.txt",
    )
    assert identify(RunConfig(data=data)).tokenizer is not None
    with pytest.raises(ConfigError, match="use --vocab-size 100008"):
        identify(RunConfig(data=data, model=ModelConfig(vocab_size=32000)))


def test_tokens_outside_the_vocabulary_stop_the_run_with_data_set_and_sample(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(DataError, match=r"(threes|fives): token \d+ in sample \d+ is outside the vocabulary of 40"):
        run(replace(config, model=replace(config.model, vocab_size=40)))


def test_a_run_without_validation_documents_trains(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    recorder = run(replace(config, data=replace(config.data, split="100,0,0")))
    assert len(recorder.reports) == 2
    assert recorder.validations == []
