"""Flags to dataclass: presets, overrides, and a workdir that keeps its configuration."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import zlib

import jax
import pytest
from absl import flags
from etils import epath
from jax._src import compilation_cache

from logitjax import models, training
from logitjax.commands import _config_file, _flags, audit, cache_logits, cli, distill


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = cli.field("a", "A name.")
    kind: str = cli.field("x", "A choice.", choices=("x", "y"))
    layers: tuple[int, ...] = cli.field((), "Some layers.")
    source: tuple[str, ...] = cli.field(("s",), "A source.", positional=True)
    part: str = cli.field("all", "What is done now.", execution=True)
    rate: float = cli.field(0.5, "A rate.", minimum=0)
    on: bool = cli.field(False, "A switch.")
    key: str | None = cli.field(None, "A key.", secret=True)


PRESETS = {"small": {"rate": 0.1}, "large": {"name": "big", "layers": (1, 2)}}


def parse(*arguments: str, config_class=Config, presets=PRESETS):
    (config,) = cli.parse([config_class], presets, arguments)
    return config


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


def test_a_name_in_a_preset_that_no_flag_has_is_refused():
    with pytest.raises(ValueError, match=r"preset bad: expected .*, perhaps rate, got 'raet'"):
        parse(presets={"bad": {"raet": 1}})


def test_arguments_without_a_flag_go_to_the_field_that_takes_them():
    assert parse("p", "--source=q", "r").source == ("q", "p", "r")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """A course.

    Attributes:
      top: number of ``steps``,
        all told.
      data: Text.
      loop: The loop.
    """

    data: str
    top: int = 3
    loop: training.LoopOptions = training.LoopOptions()  # noqa: RUF009

    def __post_init__(self):
        if self.top < 1:
            raise ValueError(f"top: expected at least 1, got {self.top}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nest:
    rate: float = cli.field(0.5, "A rate.")
    course: Course = cli.nested(without=["progress"], rename={"top": "steps"})


def nest(*arguments):
    return parse(*arguments, config_class=Nest, presets=None)


def test_fields_of_what_a_configuration_nests_are_flags_under_flat_names():
    config = nest("--data=d", "--steps=5", "--eval_every=7", "--rate=1")
    loop = training.LoopOptions(eval_every=7)
    assert config == Nest(rate=1.0, course=Course(data="d", top=5, loop=loop))
    text = _flags.help_text("toy", None, _flags.flags_of(Nest))
    assert "--steps=NUMBER\n      Number of `steps`, all told. Default: 3." in text
    assert "--profile_steps=NUMBER" in text
    assert "--data=TEXT\n      Text. Required." in text
    assert "progress" not in text


def test_what_a_nested_dataclass_refuses_is_said_of_the_flag():
    with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0$"):
        nest("--data=d", "--steps=0")
    with pytest.raises(ValueError, match=r"^data: expected a value, got none; give --data=...$"):
        nest()


def test_two_fields_of_one_name_are_refused_with_both_owners():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Clash:
        top: int = cli.field(1, "Another.")
        course: Course = cli.nested()

    with pytest.raises(TypeError, match=r"^top: expected one field, .*Clash and .*Course"):
        _flags.flags_of(Clash)


def test_a_file_gives_flags_values_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    # PyYAML reads 3e-4, which has no point, as text.
    path.write_text("rate: 3e-4\ncourse:\n  data: d\n  loop: {eval_every: 7}\nsteps: 4\n")
    config = nest(f"--config={path}", "--eval_every=8")
    loop = training.LoopOptions(eval_every=8)
    assert config == Nest(rate=3e-4, course=Course(data="d", top=4, loop=loop))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raet: 1", "config: .*run.yaml: expected the name of a flag, perhaps rate, got 'raet'"),
        ("rate: yes", "rate: expected a number, got True"),
        ("top: 3", "got 'top'"),
        ("- rate", "config: expected names and values in "),
        ("rate: [", "config: expected YAML in "),
    ],
)
def test_what_a_file_may_not_say_is_refused(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        nest(f"--config={tmp_path / 'run.yaml'}")


def test_what_is_written_beside_a_result_gives_the_same_configuration(tmp_path):
    config = nest("--data=d", "--steps=5", "--eval_every=7")
    _config_file.write_config(config, epath.Path(tmp_path), "out")
    assert nest(f"--config={tmp_path / 'config.json'}") == config


def test_help_shows_the_docstring_and_every_flag_with_its_default():
    text = _flags.help_text("logitjax toy", "What it does.", _flags.flags_of(Config), PRESETS)
    assert text.startswith("usage: logitjax toy [--flag=value ...] SOURCE ...\n\nWhat it does.")
    assert "--kind=x|y\n      A choice. Default: x." in text
    assert "--[no]on\n" in text
    assert "--preset=small|large" in text


def run_alone(config):
    print(config)


def run_out(config, out):
    (out / "made").write_text(config.name)


def run_workdir(config, workdir):
    raise AssertionError


@pytest.mark.parametrize(("run", "name"), [(run_out, "out"), (run_workdir, "workdir")])
def test_the_flag_of_the_folder_is_what_the_run_calls_it(capsys, run, name):
    cli.main(Config, PRESETS, run, program="toy", arguments=["--help"])
    assert f"--{name}=TEXT\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(Config, PRESETS, run, program="toy", arguments=[])
    assert f"error: {name}: expected a value, got none; give --{name}=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nmae=b"], "error: Unknown command line flag 'nmae'. Did you mean: name ?"),
        (["--kind=z"], "error: kind: expected one of x, y, got 'z'"),
        (["--rate=fast"], "error: rate: expected a number, got 'fast'"),
        (["--rate=-1"], "error: rate: expected at least 0, got '-1'"),
        (["--config=/no/such"], "error: config: no such file: /no/such"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, PRESETS, run_alone, program="toy", arguments=arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == message + "\n"


def test_a_folder_with_results_keeps_its_configuration(tmp_path):
    folder = epath.Path(tmp_path)

    def write(**changes):
        _config_file.write_config(Config(**changes), folder, "out")

    write()
    (tmp_path / "result").touch()
    write()
    with pytest.raises(
        ValueError, match=r"^out: .*config\.json with another rate; choose a new --out$"
    ):
        write(rate=0.7, part="first")
    write(part="first")
    content = (folder / "config.json").read_bytes()
    assert json.loads(content)["part"] == "first"
    # A flipped bit in a value is another value; anywhere else the file is named.
    for i in range(len(content)):
        flipped = bytes([*content[:i], content[i] ^ (1 << i % 8), *content[i + 1 :]])
        (folder / "config.json").write_bytes(flipped)
        with contextlib.suppress(ValueError):
            json.loads(flipped.decode())
            write(part="first")
            continue
        with pytest.raises(ValueError, match=r"config\.json: |with another "):
            write(part="first")
    (folder / "config.json").write_bytes(content.replace(b'"rate"', b'"rave"'))
    with pytest.raises(
        ValueError, match=r"config\.json: expected a flag 'rate', got 'rave'; remove"
    ):
        write(part="first")


def test_a_run_that_made_nothing_does_not_claim_its_folder(tmp_path):
    folder = epath.Path(tmp_path)
    _config_file.write_config(Config(name="tpyo"), folder, "out")
    # As a run leaves it that was killed, or failed, before it made anything.
    for name in ("lock", "error.txt", "error.1.txt", "data/.unfinished-x/rows"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    _config_file.write_config(Config(name="typo"), folder, "out")
    (folder / "data" / "rows").touch()
    with pytest.raises(ValueError, match="with another name"):
        _config_file.write_config(Config(name="tpyo"), folder, "out")


def test_a_secret_is_not_written_and_may_change(tmp_path):
    folder = epath.Path(tmp_path)
    # As an earlier version wrote it.
    old = dataclasses.asdict(Config(key="first-key"))
    (tmp_path / "config.json").write_text(json.dumps(old, indent=1, sort_keys=True) + "\n")
    (tmp_path / "result").touch()
    for key in ("first-key", "second-key", None):
        _config_file.write_config(Config(key=key), folder, "out")
        text = (folder / "config.json").read_text()
        assert json.loads(text)["name"] == "a"
        assert "key" not in text


@pytest.mark.parametrize("command", [audit, cache_logits, distill])
def test_the_keys_of_servers_are_secrets(command):
    (flag,) = [flag for flag in _flags.flags_of(command.Config) if flag.name == "api_key"]
    assert flag.metadata["secret"]


@pytest.mark.parametrize(
    ("template", "level", "shown"),
    [
        ("{package}/training/_loop.py", "INFO", True),
        ("{package}/site-packages.py", "INFO", True),
        ("/venv/site-packages/orbax/checkpoint.py", "INFO", False),
        ("/venv/site-packages/orbax/checkpoint.py", "WARNING", True),
        ("/home/me/experiments/train.py", "INFO", True),
    ],
)
def test_notes_of_ours_are_shown_wherever_the_package_is_installed(
    monkeypatch, template, level, shown
):
    # Where `pip install` puts it.
    monkeypatch.setattr(cli, "_PACKAGE", "/venv/site-packages/logitjax")
    path = template.format(package="/venv/site-packages/logitjax")
    record = logging.LogRecord("absl", getattr(logging, level), path, 1, "said", None, None)
    assert cli._is_ours(record) == shown


# A command, interrupted in its own code, in a thread's, or in a compiler that no signal reaches.
INTERRUPTED = """
import dataclasses, os, signal, sys, threading, time
from logitjax.commands import cli
cli._GRACE_SECONDS = 0.5

@dataclasses.dataclass(frozen=True)
class Config:
    how: str = cli.field("", "Where.")

def sleep(config):
    later = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    later.start()
    try:
        if config.how == "deaf":
            # Another thread takes the signal, and nothing wakes this one.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        time.sleep(60)
    except KeyboardInterrupt:
        if config.how == "disguised":
            raise ValueError("a callback failed")
        if config.how == "thread":
            threading.Thread(target=lambda: time.sleep(60)).start()
        raise

def run(config, out):
    sleep(config)

def alone(config):
    sleep(config)

cli.main(Config, None, alone if "--how=alone" in sys.argv else run)
"""


def as_in_a_terminal():
    # Where the suite itself runs in the background, its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("how", ["code", "deaf", "thread", "disguised", "alone"])
def test_an_interrupt_is_one_line_and_status_130(tmp_path, how):
    command = [sys.executable, "-c", INTERRUPTED, f"--how={how}"]
    command += [] if how == "alone" else [f"--out={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, preexec_fn=as_in_a_terminal
    )
    says = "interrupted" if how == "alone" else "interrupted; the same command continues"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, says)
    assert "Traceback" not in done.stderr
    # What nothing wakes unlocks nothing; the operating system does.
    assert (tmp_path / "lock").exists() == (how == "deaf")


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
    """The exit status that the process would have had."""

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


@pytest.mark.usefixtures("ended")
def test_compiled_programs_lie_in_the_store_of_the_run_unless_they_have_a_place(
    tmp_path, monkeypatch
):
    """A store's next start is on another machine; a local folder's finds them at home."""
    monkeypatch.setattr(training, "lock_workdir", contextlib.nullcontext)
    monkeypatch.setattr(cli, "_accounted", contextlib.nullcontext)
    monkeypatch.setattr(_config_file, "write_config", lambda *written: None)
    caches = []

    def run(config, workdir):
        caches.append(jax.config.jax_compilation_cache_dir)

    run.__module__ = __name__
    before = jax.config.jax_compilation_cache_dir
    try:
        for folder in ("gs://bucket/run", str(tmp_path)):
            for store in (None, "elsewhere"):
                jax.config.update("jax_compilation_cache_dir", store)
                cli.main(Config, PRESETS, run, program="toy", arguments=[f"--workdir={folder}"])
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    home = os.path.expanduser("~/.cache/logitjax/compiled")
    assert caches == ["gs://bucket/run/.compiled", "elsewhere", home, "elsewhere"]
    # A program with a flipped bit gave other numbers, or crashed.
    stored = bytearray(compilation_cache.compress_executable(bytes(range(256)) * 9))
    stored[len(stored) // 2] ^= 4
    with pytest.raises(zlib.error):
        compilation_cache.decompress_executable(bytes(stored))


@pytest.mark.usefixtures("ended")
def test_a_family_of_ones_own_is_known_before_the_command_runs(monkeypatch, capsys):
    brought = []
    monkeypatch.setattr(models, "register_family", brought.append)
    ran = []

    def run(config):
        ran.append(list(brought))

    run.__module__ = __name__
    cli.main(Config, PRESETS, run, program="toy", arguments=["--family=package.module:VALUE"])
    assert ran == [["package.module:VALUE"]]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        cli.main(Config, PRESETS, run, program="toy", arguments=["--family=nowhere:VALUE"])
    assert stop.value.code == 2
    assert "error: family nowhere:VALUE: expected an importable module" in capsys.readouterr().err
