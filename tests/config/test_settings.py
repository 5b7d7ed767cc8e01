import subprocess
import sys
from pathlib import Path

import pytest

from megatron_aquila.config.schema import RunConfig
from megatron_aquila.config.settings import all_settings, flag_names, spell, value_of


def test_every_flag_belongs_to_one_setting():
    flags = [flag for setting in all_settings().values() for flag in setting.flags]
    assert len(flags) == len(set(flags))
    assert {flag_names()[flag] for flag in flags} == set(all_settings())
    assert flag_names()["--no-load-optim"] == "checkpoint.load_optim"


def test_defaults_are_those_of_the_schema():
    for name, setting in all_settings().items():
        assert value_of(RunConfig(), name) == setting.default
        assert setting.help
        assert setting.example
        assert setting.metavar


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("parallel.tensor", "a whole number of at least 1"),
        ("parallel.data", "a whole number of at least 1"),
        ("parallel.zero", "a whole number from 1 to 3"),
        ("optim.lr", "a finite number above 0"),
        ("optim.beta1", "a number of at least 0 and below 1"),
        ("optim.offload_optimizer", "a number from 0 to 1"),
        ("optim.lr_decay", "one of cosine, linear, constant, wsd"),
        ("parallel.stage_layers", "a list, each a whole number of at least 0"),
        ("train.rampup_batch", "3 values, each a whole number of at least 1"),
        ("parallel.sequence", "true or false"),
        ("checkpoint.save", "a path"),
        ("data.split", "text"),
    ],
)
def test_what_is_wanted_in_words(name, wanted):
    assert all_settings()[name].wanted == wanted


def test_values_are_spelled_as_on_the_command_line():
    assert [spell(value) for value in (None, True, (32, 32, 100), 3e-4, Path("a"))] == [
        "none",
        "true",
        "32 32 100",
        "0.0003",
        "a",
    ]


def test_config_and_plan_import_no_torch():
    code = "import sys, megatron_aquila.commands.config, megatron_aquila.plan.memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
