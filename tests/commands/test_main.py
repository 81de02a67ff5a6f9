"""The console script: what it lists and loads, and what it says to what it does not know."""

import importlib
import subprocess
import sys

import pytest

from logitjax import commands
from logitjax.commands import _flags


def test_the_list_of_commands_needs_nothing_heavy():
    script = "import sys; from logitjax.commands import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    listed, loaded = done.stdout.rsplit("\n", 2)[:2]
    for name, line in commands.COMMANDS.items():
        assert f"  {name} " in listed
        assert line in listed
    assert not {"jax", "numpy", "absl", "etils"} & set(loaded.split())


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself_in_whole_phrases(name):
    module = importlib.import_module(f"logitjax.commands.{name.replace('-', '_')}")
    assert f"logitjax {name} " in module.__doc__
    assert callable(module.run)
    flags = _flags.flags_of(module.Config)
    assert [flag.name for flag in flags if not flag.help] == []
    for line in _flags.help_text(name, "", flags).splitlines():
        assert "'s." not in line
        assert not line.strip().startswith(("Of ", "of "))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["genrate"],
            "error: command: expected one that `logitjax --help` lists, perhaps gen",
        ),
        (["serve", "--prot=1"], "error: Unknown command line flag 'prot'. Did you mean: port ?"),
        (["generate", "--top_k=a"], "error: top_k: expected a whole number, got 'a'"),
        (["prepare"], "error: name: expected a value, got none"),
        (["extract-features"], "error: out: expected a value, got none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == 1
