"""Flags to dataclass: presets, overrides, and a workdir that keeps its configuration."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
from absl import flags
from etils import epath

from logitjax.commands import audit, cache_logits, cli, distill


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = cli.field("a", "A name.")
    kind: str = cli.field("x", "A choice.", choices=("x", "y"))
    layers: tuple[int, ...] = cli.field((), "Some layers.")
    source: tuple[str, ...] = cli.field(("s",), "A source.", positional=True)
    part: str = cli.field("all", "What is done now.", selects=True)
    rate: float = cli.field(0.5, "A rate.")
    on: bool = cli.field(False, "A switch.")
    key: str | None = cli.field(None, "A key.", secret=True)


PRESETS = {"small": {"rate": 0.1}, "large": {"name": "big", "layers": (1, 2)}}


def parse(*arguments: str) -> Config:
    values = cli.define_flags(Config, PRESETS)
    rest = values(["program", *arguments])[1:]
    return cli.config_from_flags(Config, PRESETS, values, rest)


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


def test_arguments_without_a_flag_go_to_the_field_that_takes_them():
    assert parse("p", "--source=q", "r").source == ("q", "p", "r")


def test_a_required_value_is_asked_for():
    @dataclasses.dataclass(frozen=True)
    class Needy:
        model: str = cli.field(cli.REQUIRED, "A model.")

    values = cli.define_flags(Needy)
    values(["program"])
    with pytest.raises(ValueError, match="model: expected a value, got none; give --model="):
        cli.config_from_flags(Needy, None, values)


def test_help_shows_the_docstring_and_every_flag_with_its_default():
    text = cli.help_text("logitjax toy", "What it does.", [Config], PRESETS)
    assert text.startswith("usage: logitjax toy [--flag=value ...] SOURCE ...\n\nWhat it does.")
    assert "--kind=x|y\n      A choice. Default: x." in text
    assert "--[no]on\n" in text
    assert "--preset=small|large" in text


def test_help_calls_the_directory_as_the_command_does():
    @dataclasses.dataclass(frozen=True)
    class Kept:
        workdir: str = cli.field(cli.REQUIRED, "Folder of the run.")

    assert "--out=TEXT\n" in cli.help_text("toy", None, [Kept], workdir="out")
    assert "--workdir=TEXT\n" in cli.help_text("toy", None, [Kept])


def run_alone(config):
    print(config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nmae=b"], "error: Unknown command line flag 'nmae'. Did you mean: name ?"),
        (["--kind=z"], "error: flag --kind=z: value should be one of <x|y>"),
        (["--rate=fast"], "error: flag --rate=fast: could not convert string to float: 'fast'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, PRESETS, run_alone, program="toy", arguments=arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == said + "\n"


def test_workdir_keeps_its_configuration(tmp_path):
    workdir = epath.Path(tmp_path)
    cli.write_config(Config(), workdir)
    cli.write_config(Config(), workdir)
    with pytest.raises(ValueError, match="differs in rate;"):
        cli.write_config(Config(rate=0.7, part="first"), workdir)
    cli.write_config(Config(part="first"), workdir)
    assert json.loads((workdir / "config.json").read_text())["part"] == "first"


def test_a_secret_is_not_written_and_may_change(tmp_path):
    workdir = epath.Path(tmp_path)
    # As an earlier version wrote it.
    old = dataclasses.asdict(Config(key="first-key"))
    (tmp_path / "config.json").write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")
    for key in ("first-key", "second-key", None):
        cli.write_config(Config(key=key), workdir)
        text = (workdir / "config.json").read_text()
        assert json.loads(text)["name"] == "a"
        assert "key" not in text
    with pytest.raises(ValueError, match="differs in rate;"):
        cli.write_config(Config(rate=0.7, key="second-key"), workdir)


@pytest.mark.parametrize("command", [audit, cache_logits, distill])
def test_the_keys_of_servers_are_secrets(command):
    (field,) = [f for f in dataclasses.fields(command.Config) if f.name == "api_key"]
    assert field.metadata["secret"]


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--source=/no/such/model"], "/no/such/model"),
        pytest.param(["--data=text:/no/such/text"], "/no/such/text", marks=pytest.mark.slow),
        pytest.param(["--mesh=data:3"], "data:3", marks=pytest.mark.slow),
        pytest.param(["--cache_top_k=1000"], "1000", marks=pytest.mark.slow),
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


@pytest.fixture
def ended(monkeypatch):
    """What the process would have ended with."""

    def leave(cause, status):
        print(f"error: {cause}", file=sys.stderr)
        raise SystemExit(status)

    monkeypatch.setattr(cli.training.distributed, "leave", leave)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 75),
        (ValueError("rate: expected less"), 2),
    ],
)
@pytest.mark.usefixtures("ended")
def test_an_error_is_one_line_and_its_status_says_whether_to_start_again(
    tmp_path, capsys, error, status
):
    def run(config, workdir):
        raise error

    run.__module__ = __name__
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, PRESETS, run, program="toy", arguments=[f"--workdir={tmp_path}"])
    assert stop.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {error} (details: {tmp_path}/error.txt)")
    assert type(error).__name__ in (tmp_path / "error.txt").read_text()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    "spoil",
    [lambda path: path.mkdir(), lambda path: os.symlink("/dev/full", path)],
    ids=["unwritable", "full"],
)
@pytest.mark.usefixtures("ended")
def test_a_disk_that_takes_no_details_does_not_hide_the_first_error(tmp_path, capsys, spoil):
    def run(config, workdir):
        spoil(workdir / "error.txt")
        raise OSError(errno.EIO, "Input/output error")

    run.__module__ = __name__
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, PRESETS, run, program="toy", arguments=[f"--workdir={tmp_path}"])
    assert stop.value.code == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 5] Input/output error; this may pass")
