"""What a run reads and starts from: every problem, its words, and that sound settings pass."""

import math
from dataclasses import replace

import pytest

from megatron_aquila.config.cli import load_config
from megatron_aquila.config.presets import CONTINUATIONS, PRESETS
from megatron_aquila.config.schema import Phase
from megatron_aquila.config.sources import epoch_limits, training_blends, valid_sets
from megatron_aquila.data.blend import parse_blend, split_ranges
from megatron_aquila.errors import ConfigError, DataError


def flaws(text, **settings):
    try:
        load_config(text.split(), **settings)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "--data-path a",
        "--data-path 0.5 a 0.5 b",
        "--data-path a b c",
        "--split 1",
        "--split 98,2",
        "--split 0.9,0.1,0",
        "--load a",
        "--save a --resume",
        "--reset-position-ids --reset-attention-mask --eod-mask-loss --eod-token-id 7",
        "--eod-mask-loss --tokenizer-model t",
        "--save a --resume --init-from-hf b",
        "--load a --no-load-optim",
        "--load a --override-lr-schedule",
        "--save a --resume --override-opt-param-scheduler",
    ],
)
def test_sound_settings(text):
    assert flaws(text) == []


SUM = "name it once, with the sum of its weights"
PAIRS = "give weight prefix weight prefix ..., or prefixes alone"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--data-path 0.5 a 0.5", f"--data-path 0.5 a 0.5: weights and prefixes do not pair up; {PAIRS}"),
        ("--data-path 0 a 1 b", f"--data-path 0 a 1 b: the weight 0 is not a number above 0; {PAIRS}"),
        ("--data-path 1 a b c", f"--data-path 1 a b c: the weight b is not a number above 0; {PAIRS}"),
        (
            "--data-path a --valid-data-path 1 b c",
            f"--valid-data-path 1 b c: weights and prefixes do not pair up; {PAIRS}",
        ),
        (
            "--data-path a --valid-data-path b --split 9,1,0",
            "--split 9,1,0: with --valid-data-path given, no data is split; give one of them",
        ),
        ("--data-path 1 a 2 ./a", f"--data-path 1 a 2 ./a: a is named twice; {SUM}"),
        ("--train-data-path a --valid-data-path b b", f"--valid-data-path b b: b is named twice; {SUM}"),
        (
            "--data-path a --train-data-path b",
            "--data-path a: --train-data-path names the data too; give one of them",
        ),
        (
            "--train-data-path 1 a 1 b --test-data-path c b",
            "--test-data-path c b: b is trained on; name other data, or use --split without it",
        ),
        (
            "--data-path a --valid-data-path 2 ./a 1 b",
            "--valid-data-path 2 ./a 1 b: ./a is trained on; name other data, or use --split without it",
        ),
        (
            "--data-path a --valid-sets zh",
            "--valid-sets zh: zh is not NAME=PREFIX; use e.g. zh=data/zh_valid",
        ),
        (
            "--data-path a --valid-sets zh=b zh=c a=d",
            "--valid-sets zh=b zh=c a=d: a is the name of a data set, under which its loss is logged already; use "
            "another name",
        ),
        (
            "--data-path 1 a 1 b --valid-sets x=b",
            "--valid-sets x=b: b is trained on; name data that is not, or use --split",
        ),
        ("--data-path a --valid-sets x=b x=./b", "--valid-sets x=b x=./b: x names a data set twice; name it once"),
        ("--data-path a --valid-samples 9", "--valid-samples 9: no --valid-sets are named; leave it out"),
        (
            "--data-path a --max-epochs-per-source many",
            "--max-epochs-per-source many: many is no number above 0, nor one for a data set; use e.g. 4, or 4 "
            "data/wiki=2",
        ),
        (
            "--data-path 1 a 1 b --max-epochs-per-source 4 c=2",
            "--max-epochs-per-source 4 c=2: c is not trained on; use a, b",
        ),
        (
            "--data-path a --max-epochs-per-source 4 3",
            "--max-epochs-per-source 4 3: several numbers are for all data sets; give one",
        ),
        ("--data-path inf a 1 b", f"--data-path inf a 1 b: the weight inf is not a number above 0; {PAIRS}"),
        ("--split a,b", "--split a,b: is not one to three shares of train, valid and test; use e.g. 99,1,0"),
        ("--split 1,1,1,1", "--split 1,1,1,1: is not one to three shares of train, valid and test; use e.g. 99,1,0"),
        (
            "--split 0,1",
            "--split 0,1: leaves no documents to train on; give train, the first of the shares, more than 0",
        ),
        (
            "--resume --save a --load b",
            "--resume: --load b already says where to continue from; give one of them: --no-resume or --load none "
            "takes back the other",
        ),
        ("--resume", "--resume: it continues from the --save folder, and none is given; give --save FOLDER"),
        (
            "--no-load-optim --save a --resume",
            "--no-load-optim: it starts a new run from the weights that --load names, and none are named; give --load "
            "FOLDER with it, or leave it out",
        ),
        (
            "--override-opt-param-scheduler --init-from-hf a",
            "--override-opt-param-scheduler: no checkpoint is resumed that could differ; give --load FOLDER or "
            "--resume with it, or leave it out",
        ),
        (
            "--override-data",
            "--override-data: no checkpoint is resumed that could differ; give --load FOLDER or --resume with it, or "
            "leave it out",
        ),
    ],
)
def test_each_problem_is_found_and_worded(text, words):
    assert flaws(text) == [words]


@pytest.mark.parametrize("path", ["a", "0.5 a 0.5 b", "a b", "0.5 a 0.5", "0 a 1 b", "1 a b c", "a 1 b 2", "nan a"])
def test_paths_are_refused_as_when_they_are_read(path):
    assert bool(flaws(f"--data-path {path}")) is raises(parse_blend, path.split())


@pytest.mark.parametrize("split", ["1", "99,1,0", "1,1,1,1", "a", "1,", "-1,2", "nan", "0,0", f"{math.inf}"])
def test_splits_are_refused_as_when_they_are_read(split):
    assert bool(flaws(f"--split={split}")) is raises(split_ranges, split)


def raises(function, argument):
    try:
        function(argument)
    except DataError:
        return True
    return False


def test_training_needs_data_and_showing_does_not():
    assert load_config([]).missing[0].flag == "--data-path"
    [words] = flaws("", to_train=True)
    assert words.startswith("--data-path: no tokens to train on are named; give the prefix of a .bin/.idx pair")
    assert load_config(["--data-path", "a"], to_train=True).missing == ()


@pytest.mark.parametrize("start", ["--init-from-hf a", "--load a", "--save b --resume --init-from-hf a"])
def test_a_continuation_needs_the_weights_it_continues(start):
    given = "--data-path a --preset aquila2-7b-continue"
    way_out = "give --init-from-hf FOLDER or --load FOLDER, or use --preset aquila2-7b"
    for without in ("", " --save b --resume"):
        [words] = flaws(given + without, to_train=True)
        assert words.startswith("--preset aquila2-7b-continue: it continues published weights, and none are named")
        assert words.endswith(way_out)
    assert flaws(f"{given} {start}", to_train=True) == []
    assert flaws("--data-path a --preset aquila2-7b", to_train=True) == []


def test_continuations_are_presets():
    assert set(CONTINUATIONS) | set(CONTINUATIONS.values()) <= set(PRESETS)


def test_they_come_with_all_other_problems():
    found = flaws("--tp 3 --split x --no-load-optim --mup", to_train=True)
    assert [line.split(":")[0].split()[0] for line in found] == [
        "--mup",
        "--tp",
        "--split",
        "--no-load-optim",
        "--data-path",
    ]


def test_where_documents_end_must_be_known():
    (flaw,) = flaws("--reset-position-ids --eod-mask-loss")
    assert flaw.startswith("--reset-position-ids --eod-mask-loss: nothing says which token ends a document; ")
    assert "--eod-token-id" in flaw
    (flaw,) = flaws("--eod-token-id 64 --vocab-size 64")
    assert flaw.startswith("--eod-token-id 64: it is outside the vocabulary of 64; ")


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (["200 b", "100 c"], "they do not start one after the other; order them by their samples"),
        (["900 b"], "the run of 500 samples ends before sample 900; start it earlier, or raise --train-samples"),
        (["100"], 'a phase names no data; give each as "SAMPLES weight prefix ..."'),
        (["100 1 b c"], "weights and prefixes do not pair up; give weight prefix weight prefix ..., or prefixes alone"),
        (["soon b"], "is not a list, each a phase SAMPLES BLEND; later blends, "),
        (["0 b"], "is not a list, each a phase SAMPLES BLEND; later blends, "),
    ],
)
def test_phases_that_make_no_sense(phases, words):
    with pytest.raises(ConfigError) as caught:
        load_config(["--data-path", "a", "--train-samples", "500", "--phases", *phases])
    (problem,) = caught.value.problems
    assert problem.flag == "--phases"
    assert f"{problem.why}; {problem.way_out}".startswith(words) or words in str(problem)


def test_phases_and_named_sets_in_words_and_in_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data:\n  path: 0.5 a 0.5 b\n  phases:\n  - {from_samples: 100, path: [c]}\n"
        "  - from_samples: 300\n    path: 0.9 c 0.1 a\n  valid_sets: {zh: d, code: [e, f]}\n"
    )
    by_file = load_config(["--config", f"{tmp_path}/run.yaml"]).config.data
    words = ["--data-path", "0.5", "a", "0.5", "b", "--phases", "100 c", "300 0.9 c 0.1 a"]
    by_flag = load_config([*words, "--valid-sets", "zh=d", "code=e", "code=f"]).config.data
    assert by_file == by_flag
    assert by_flag.phases[1] == Phase(from_samples=300, path=("0.9", "c", "0.1", "a"))
    assert training_blends(by_flag)[1:] == [(100, ("c",)), (300, ("0.9", "c", "0.1", "a"))]
    assert valid_sets(by_flag) == {"zh": ["d"], "code": ["e", "f"]}
    (tmp_path / "typo.yaml").write_text("data: {path: a, phases: [{from_sample: 100, path: b}]}")
    with pytest.raises(ConfigError, match=r"typo.yaml:1: data.phases"):
        load_config(["--config", f"{tmp_path}/typo.yaml"])


def test_limits_of_epochs():
    data = load_config(["--data-path", "1", "a", "1", "b", "--max-epochs-per-source", "4", "b=1.5"]).config.data
    assert epoch_limits(data) == {"a": 4, "b": 1.5}
    assert epoch_limits(replace(data, max_epochs_per_source=("b=2",))) == {"b": 2}
