import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_aquila.checkpoint.agree import together
from megatron_aquila.config.derive import derive
from megatron_aquila.config.schema import DataConfig, ModelConfig, RunConfig
from megatron_aquila.data.indexed import IndexedDatasetWriter
from megatron_aquila.data.manifest import TokenizerFacts, read_manifest, remove_manifest, write_manifest
from megatron_aquila.data.progress import Report
from megatron_aquila.errors import CheckpointError, CommunicationError, ConfigError, DataError
from megatron_aquila.parallel.context import Group, ParallelContext
from megatron_aquila.train import corpus
from megatron_aquila.train.build import create_context
from megatron_aquila.train.corpus import document_rules, hash_data, identify
from megatron_aquila.train.traced import trace_run
from tests.train.runs import Recorder, run, split, tiny_config, write_corpus


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


def test_the_data_names_its_tokenizer_where_the_settings_do_not(tmp_path: Path) -> None:
    path = write_corpus(tmp_path)
    assert identify(RunConfig(data=DataConfig(path=path))).tokenizer is None
    say_tokenizer(tmp_path / "threes", "a" * 64)
    say_tokenizer(tmp_path / "fives", "a" * 64)
    assert identify(RunConfig(data=DataConfig(path=path))).tokenizer == "a" * 64
    say_tokenizer(tmp_path / "fives", "b" * 64)
    assert identify(RunConfig(data=DataConfig(path=path))).tokenizer is None


def test_validation_has_data_of_its_own(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16, eval_interval=1)
    for name in ("held", "out", "more"):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_documents(np.full(600, 7), np.full(6, 100))
    valid = tuple(str(tmp_path / name) for name in ("held", "out", "more"))
    recorder = run(replace(config, data=replace(config.data, split="99,1,0", valid_path=valid)))
    assert [step for step, _ in recorder.validations] == [1, 2]
    assert (trace_run(tmp_path / "run").source.describe()).count("(train): 60 sequences") == 2, (
        "all of the training data"
    )


def say_tokenizer(prefix: Path, fingerprint: str) -> None:
    manifest = read_manifest(prefix)
    assert manifest is not None
    tokenizer = TokenizerFacts(kind="AquilaTokenizer", vocab_size=61, fingerprint=fingerprint)
    write_manifest(prefix, replace(manifest, origin=replace(manifest.origin, tokenizer=tokenizer)))


def test_bad_validation_tokens_stop_the_run_too(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, eval_interval=1)
    with IndexedDatasetWriter(tmp_path / "late", np.uint16) as writer:
        for document in range(40):
            writer.add_sequence(np.full(40, 60 if document >= 36 else 1))
            writer.end_document()
    remove_manifest(tmp_path / "late")
    data = replace(config.data, path=(str(tmp_path / "late"),), split="90,10,0")
    small = replace(
        config, data=data, model=replace(config.model, vocab_size=50), train=replace(config.train, train_samples=16)
    )
    with pytest.raises(DataError, match="late: token 60 in sample"):
        run(small)


def test_tokens_outside_the_vocabulary_stop_the_run_with_data_set_and_sample(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    with pytest.raises(DataError, match=r"threes: its largest token is 60, .* outside the vocabulary of 40"):
        run(replace(config, model=replace(config.model, vocab_size=40)))
    for name in ("threes", "fives"):
        remove_manifest(tmp_path / name)
    with pytest.raises(DataError, match=r"(threes|fives): token \d+ in sample \d+ is outside the vocabulary of 40"):
        run(replace(config, model=replace(config.model, vocab_size=40)))


def test_bytes_are_hashed_before_the_first_step_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    config = replace(config, checkpoint=replace(config.checkpoint, save=None))
    asked = replace(config, data=replace(config.data, verify_data=True))
    assert len(run(asked).reports) == 2
    assert "2 of 2 data sets are what their manifests say" in capsys.readouterr().out
    file = tmp_path / "fives.bin"
    file.write_bytes(bytes(file.stat().st_size))
    recorder = Recorder()
    with pytest.raises(CheckpointError, match=r"fives.bin: its SHA-256 is .*: bytes were changed"):
        run(asked, recorder=recorder)
    assert recorder.reports == []
    assert len(run(config).reports) == 2, "sizes alone are looked at otherwise"


def hash_on_two(config: RunConfig, seconds: float) -> tuple[str, int]:
    """What a failure of rank 0 after ``seconds`` is on this rank, and how often the ranks spoke until then."""
    ctx = create_context(config, derive(config, 2), torch.device("cpu"))
    spoken = 0

    def fails(prefixes: Sequence[str], report: Report) -> str:
        time.sleep(seconds)
        raise DataError("a byte is another")

    def counted(action: Callable[[], object], group: Group) -> list[Any]:
        nonlocal spoken
        spoken += 1
        return together(action, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "HASHING_SECONDS", 0.01)
        patch.setattr(corpus, "verify_all", fails)
        patch.setattr(corpus, "together", counted)
        with pytest.raises(CheckpointError) as raised:
            hash_data(config, ctx)
    return str(raised.value), spoken


def test_ranks_hear_of_each_other_while_one_hashes(tmp_path: Path, pool: Any) -> None:
    one, two = pool(2).run(hash_on_two, split(tiny_config(tmp_path)), 0.3)
    assert one == two
    assert one[0] == "a byte is another (rank 0)"
    assert one[1] > 2


def test_hashing_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def endless(prefixes: Sequence[str], report: Report) -> str:
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                report("", 7, 9)
                time.sleep(0.01)
        except DataError as error:
            ended.append(str(error))
        return ""

    def lost(action: object, group: object) -> None:
        raise CommunicationError("a rank is gone")

    monkeypatch.setattr(corpus, "together", lost)
    monkeypatch.setattr(corpus, "verify_all", endless)
    with pytest.raises(CommunicationError, match="a rank is gone"):
        hash_data(tiny_config(tmp_path), ParallelContext.single())
    assert ended == ["given up after 7 of 9 bytes"]


def test_a_run_without_validation_documents_trains(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    recorder = run(replace(config, data=replace(config.data, split="100,0,0")))
    assert len(recorder.reports) == 2
    assert recorder.validations == []


EOD = 30  # the first samples of the corpus hold it


def test_documents_change_what_is_trained_and_how_much_attention_works(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train_samples=16)
    plain = run(replace(config, checkpoint=replace(config.checkpoint, save=None)))
    (first, *_) = plain.reports
    assert first.attention_share == 1
    assert first.num_tokens == first.computed_tokens
    apart = replace(config.data, reset_attention_mask=True, eod_mask_loss=True, eod_token_id=EOD)
    (masked, *_) = run(replace(config, data=apart)).reports
    assert 0 < masked.attention_share < 1
    assert masked.num_tokens < masked.computed_tokens == first.computed_tokens
    assert masked.loss != first.loss

    onward = replace(config.checkpoint, save=None, load=config.checkpoint.save)
    with pytest.raises(CheckpointError, match=r"rules for documents: .*'reset_attention': True.* there, none here"):
        run(replace(config, checkpoint=onward))


def test_rules_are_part_of_what_a_run_reads(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    plain = identify(config)
    assert plain.documents is None
    apart = identify(replace(config, data=replace(config.data, eod_mask_loss=True, eod_token_id=EOD)))
    assert apart.documents == {"eod": EOD, "reset_positions": False, "reset_attention": False, "mask_loss": True}
    before = {name: value for name, value in asdict(plain).items() if name != "documents"}
    assert plain.differences(before) == []
    assert len(apart.differences(before)) == 1


def test_the_end_of_a_document_is_the_tokenizers(aquila_tokenizer_dir: Path, tmp_path: Path) -> None:
    data = DataConfig(
        path=write_corpus(tmp_path),
        vocab_file=aquila_tokenizer_dir / "vocab.json",
        merge_file=aquila_tokenizer_dir / "merges.txt",
        special_tokens_file=aquila_tokenizer_dir / "special_tokens.txt",
        reset_attention_mask=True,
    )
    documents = identify(RunConfig(data=data)).documents
    assert documents is not None
    assert documents["eod"] == 100007
    with pytest.raises(ConfigError, match="--eod-token-id 7: the tokenizer's is 100007; leave it out"):
        identify(RunConfig(data=replace(data, eod_token_id=7)))
    with pytest.raises(ConfigError, match="the tokenizer names no token that ends a document"):
        document_rules(data, None)
