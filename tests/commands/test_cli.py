"""Flags to dataclass: presets, overrides, and a workdir that keeps its configuration."""

import dataclasses
import subprocess
import sys

import pytest
from absl import flags
from etils import epath

from logitjax.commands import cli


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = cli.field("a", "A name.")
    kind: str = cli.field("x", "A choice.", choices=("x", "y"))
    layers: tuple[int, ...] = cli.field((), "Some layers.")
    source: tuple[str, ...] = cli.field(("s",), "Repeatable")
    rate: float = cli.field(0.5, "A rate.")
    on: bool = cli.field(False, "A switch.")


PRESETS = {"small": {"rate": 0.1}, "large": {"name": "big", "layers": (1, 2)}}


def parse(*arguments: str) -> Config:
    values = flags.FlagValues()
    cli.define_flags(Config, PRESETS, values)
    values(["program", "--workdir=w", *arguments])
    return cli.config_from_flags(Config, PRESETS, values)


def test_first_preset_is_the_default():
    assert parse() == Config(rate=0.1)


def test_flags_override_the_preset():
    config = parse("--preset=large", "--layers=3,4", "--source=p", "--source=q", "--on")
    assert config == Config(name="big", layers=(3, 4), source=("p", "q"), on=True)


def test_lists_add_up_and_may_be_emptied():
    config = parse("--preset=large", "--layers=3,4", "--layers=5", "--source=")
    assert config == Config(name="big", layers=(3, 4, 5), source=())
    assert parse("--preset=large", "--layers=") == Config(name="big")


@pytest.mark.parametrize("argument", ["--kind=z", "--rate=fast", "--preset=none", "--layers=a"])
def test_bad_values_are_refused(argument):
    with pytest.raises((flags.IllegalFlagValueError, ValueError)):
        parse(argument)


def test_workdir_keeps_its_configuration(tmp_path):
    workdir = epath.Path(tmp_path)
    cli.write_config(Config(), workdir)
    cli.write_config(Config(), workdir)
    with pytest.raises(ValueError, match="differs in rate"):
        cli.write_config(Config(rate=0.7), workdir)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--source=/no/such/model"], "/no/such/model"),
        (["--data=text:/no/such/text"], "/no/such/text"),
        (["--mesh=data:3"], "data:3"),
        (["--cache_top_k=1000"], "1000"),
    ],
)
def test_bad_input_is_one_line_that_names_the_culprit(tmp_path, arguments, culprit):
    command = [sys.executable, "-m", "experiments.graph_fusion", f"--workdir={tmp_path}"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert culprit in errors[0]
    assert "Traceback" not in done.stderr
