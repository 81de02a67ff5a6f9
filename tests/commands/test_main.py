"""The console script: what it lists and loads, and what it says to what it does not know."""

import importlib
import json
import subprocess
import sys

import pytest
from etils import epath

from logitjax import commands
from logitjax.commands import _config_file, _flags, cli


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
    ("arguments", "message"),
    [
        (["genrate"], "error: command: expected one that `logitjax --help` lists, perhaps gen"),
        (["serve", "--prot=1"], "error: Unknown command line flag 'prot'. Did you mean: port ?"),
        (["generate", "--top_k=a"], "error: top_k: expected a whole number, got 'a'"),
        (["prepare"], "error: name: expected a value, got none"),
        (["extract-features"], "error: out: expected a value, got none"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()
    # Where JAX loads slowly the command says so first.
    assert [line for line in told if "loading JAX" not in line] == told[-1:]
    assert told[-1].startswith(message)


def test_an_interrupt_while_a_command_is_imported_is_one_line_and_status_130():
    script = """if True:
        import importlib, os, signal
        from logitjax import commands
        signal.signal(signal.SIGINT, signal.default_int_handler)
        importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)
        commands.main(["gw"])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("command", "typos"),
    [
        (
            [
                "distill",
                "--student=tiny",
                "--data=text:LICENSE",
                "--batch_size=8",
                "--teacher=tiny:1",
            ],
            ["--data=text:/no", "--student=/no", "--teacher=/no", "--loss=1:lk", "--seq_len=9999"],
        ),
        (
            ["convert-head", "--model=tiny", "--data=text:LICENSE"],
            ["--model=/no", "--data=text:/no"],
        ),
        (["audit", "--model=tiny"], ["--model=/no", "--data=text:/no"]),
        (["score", "--model=tiny", "--data=text:LICENSE"], ["--data=text:/no", "--model=/no"]),
        (["cache-logits", "--student=tiny", "--data=text:LICENSE"], ["--teacher=/no"]),
        (
            ["few-shot", "--data=synthetic:3", "--encoder=random:imagenet_resnet18"],
            ["--data=stmaps", "--encoder=/no", "--method=adg"],
        ),
        (
            ["extract-features", "--encoder=random:imagenet_resnet18", "--data=synthetic:3"],
            ["--data=stmaps"],
        ),
        (
            ["unlearn", "--model=tiny", "--forget=forget", "--retain=retain"],
            ["--forget=/no", "--retain=/no", "--model=/no"],
        ),
    ],
    ids=lambda value: value[0] if value[0][0] != "-" else "",
)
def test_a_typo_may_be_corrected_in_the_same_folder(tmp_path, capsys, command, typos):
    out = tmp_path / "out"
    for name in ("forget", "retain"):
        rows = [{"question": f"{name} {i}", "answer": f"of {name} {i}"} for i in range(9)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [argument.replace(f"={name}", f"={tmp_path / name}") for argument in command]
    for typo in typos:
        with pytest.raises(SystemExit) as stop:
            commands.main([*command, typo, f"--out={out}"])
        assert stop.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "a folder of this configuration" not in message, typo
        assert typo.rpartition("=")[2].rpartition(":")[2] in message, typo
    module = importlib.import_module(f"logitjax.commands.{command[0].replace('-', '_')}")
    (config,) = cli.parse([module.Config], None, command[1:])
    _config_file.write_config(config, epath.Path(out), "out")
