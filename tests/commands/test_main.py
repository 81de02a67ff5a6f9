"""The console script: what it lists, how fast, and what it says to what it does not know."""

import importlib
import subprocess
import sys
import time

import pytest

from logitjax import commands
from logitjax.commands import cli


def call(*arguments):
    command = [sys.executable, "-m", "logitjax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def test_the_list_comes_at_once():
    start = time.perf_counter()
    call("--help")
    # Python itself takes some tens of milliseconds; jax would take seconds.
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_explains_itself_in_whole_phrases(name):
    module = importlib.import_module(f"logitjax.commands.{name.replace('-', '_')}")
    assert f"logitjax {name} " in module.__doc__
    assert callable(module.run)
    for line in cli.help_text(name, "", [module.Config]).splitlines():
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
        (["generate", "--top_k=a"], "error: flag --top_k=a: "),
        (["prepare"], "error: name: expected a value, got none"),
        (["extract-features"], "error: workdir: expected a value, got none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, said):
    done = call(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
