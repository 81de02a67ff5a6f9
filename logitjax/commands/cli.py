"""Parse flags into one frozen dataclass, run a function on it, and report errors in one line.

A command or an experiment is a frozen dataclass `Config`, which may nest dataclasses of the
library, and a function `run(config, out)`, or `run(config)` if it writes no files; experiments call
their folder `workdir`. `main(Config, PRESETS, run)` does the rest: `--help`, flags and
`--config=FILE`, presets, `config.json`, several processes, exit statuses.
"""

import collections
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import logging as py_logging
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags as absl_flags
from absl import logging
from etils import epath
from jax._src import compilation_cache

import logitjax
from logitjax import processes, storage, training
from logitjax.commands import _config_file, _flags
from logitjax.commands._flags import REQUIRED as REQUIRED
from logitjax.commands._flags import Dataclass as Dataclass
from logitjax.commands._flags import build as build
from logitjax.commands._flags import field as field
from logitjax.commands._flags import flatten as flatten
from logitjax.commands._flags import nested as nested

_COMPILED = str(epath.Path("~/.cache/logitjax/compiled").expanduser())
# Errors that a user can fix. Any other error is a bug and shows its traceback.
_ONE_LINE_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")
_INTERRUPTED = 128 + signal.SIGINT
# Time to unwind, for example to finish a checkpoint, before the process is ended.
_GRACE_SECONDS = 5.0
# People take ten seconds of silence for a hang.
_SAY_SECONDS = 7.0
_last_line = 0.0
_interrupted = threading.Event()
_PACKAGE = str(pathlib.Path(logitjax.__file__).parent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Processes:
    """The rank of this process among several."""

    coordinator_address: str | None = field(
        None, "Host and port of process 0, if no cluster provides them."
    )
    num_processes: int | None = field(None, "Number of processes, if no cluster provides it.")
    process_id: int | None = field(None, "Number of this process, from 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Families:
    """Families of models in addition to those of the library."""

    family: tuple[str, ...] = field(
        (), "Family of decoders of your own, as package.module:VALUE (docs/add_a_family.md)."
    )


def _folder_class(name: str) -> type:
    """A configuration with the flags of a run's folder."""
    says = "Folder of the run, also on an object store. The same command continues the run in it."
    fields: list[Any] = [(name, str, field(REQUIRED, says))]
    # Experiments have a planner, `python -m experiments.plan`.
    if name == "out":
        says = (
            "Only print what would be read and written, the number of steps, and an estimate of "
            "time, memory and disk space."
        )
        fields.append(("dry_run", bool, field(False, says)))
    return dataclasses.make_dataclass("Folder", fields)


def parse(
    classes: Sequence[type],
    presets: Mapping[str, Mapping[str, Any]] | None,
    arguments: Sequence[str],
    *,
    program: str = "",
) -> list[Any]:
    """Build a configuration from a preset (the first by default), a file and flags.

    Invalid values raise ValueError; an unknown flag raises absl's error.
    """
    flags = _flags.flags_of(*classes)
    names = {flag.name for flag in flags}
    choice = _flags.choice_of(presets)
    others = {"config": ()} | ({choice: tuple(presets)} if presets else {})
    settings = _flags.read_command_line(program, flags, others, arguments)
    file, chosen = settings.pop("config", None), {}
    if file is not None:
        sections = {name for flag in flags for name in flag.path[:-1]}
        settings = _config_file.read_config(file, sections, {*names, *others}) | settings
    if presets:
        name = settings.pop(choice, next(iter(presets)))
        if name not in presets:
            raise ValueError(f"{choice}: expected one of {', '.join(presets)}, got {name!r}")
        _flags.check_names(f"{choice} {name}", presets[name], names)
        chosen = presets[name]
    # Flags take precedence over the file, which takes precedence over the preset.
    values = {**chosen, **settings}
    read = {flag.name: flag.read(values[flag.name]) for flag in flags if flag.name in values}
    return [_flags.build(one, read) for one in classes]


def _is_ours(record: Any) -> bool:
    """Hide progress notes of libraries, which would drown ours; warnings stay."""
    global _last_line
    is_ours = record.pathname.startswith(_PACKAGE) or "site-packages" not in record.pathname
    shown = is_ours or record.levelno > py_logging.INFO
    if shown:
        _last_line = time.monotonic()
    return shown


@contextlib.contextmanager
def _narrated() -> Iterator[None]:
    """Log the current activity after some seconds of silence; on a terminal, bars do so."""
    done = threading.Event()

    def narrate() -> None:
        marks, moved = 0, time.monotonic()
        while not done.wait(_SAY_SECONDS / 10):
            last, doing = storage.progress.last()
            if last != marks and sys.stderr.isatty():
                moved = time.monotonic()
            marks = last
            if time.monotonic() - max(moved, _last_line) > _SAY_SECONDS:
                moved = time.monotonic()
                logging.info("still %s", doing)

    if not (jax.distributed.is_initialized() and jax.process_index()):
        # A daemon thread, so that it does not keep a finished process alive.
        threading.Thread(target=narrate, name="narrator", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _write_details(workdir: epath.Path) -> str:
    """Write the traceback to `error.txt`, within five seconds; return a note with its path."""
    index = jax.process_index() if jax.distributed.is_initialized() else 0
    path = workdir / (f"error.{index}.txt" if index else "error.txt")
    text, written = traceback.format_exc(), threading.Event()

    def write() -> None:
        # The disk itself may have failed, which must not hide the first error.
        with contextlib.suppress(Exception):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.set()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(5.0)
    return f" (details: {path})" if written.is_set() else ""


def _fail(
    error: BaseException, status: int, workdir: epath.Path | None, note: str = ""
) -> NoReturn:
    """Print one line about an error and exit, at once if other processes or threads may hang."""
    if _interrupted.is_set():
        raise KeyboardInterrupt
    message = " ".join(str(error).split()) or type(error).__name__
    details = _write_details(workdir) if workdir else ""
    if status == os.EX_TEMPFAIL:
        note = note or "; this may pass, and the same command then continues"
    if jax.distributed.is_initialized() or status == os.EX_TEMPFAIL:
        training.distributed.leave(f"{message}{details}{note}", status)
    print(f"error: {message}{details}{note}", file=sys.stderr)
    sys.exit(status)


def _let_others_speak(error: BaseException) -> None:
    """Wait after a failed collective: another process has gone, and may still report why."""
    failed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    if failed and jax.distributed.is_initialized():
        time.sleep(3.0)


@contextlib.contextmanager
def _interruptible(says: str) -> Iterator[None]:
    """End the process with one line on Ctrl-C, after unwinding or after a few seconds."""
    # Python raises KeyboardInterrupt when the main thread returns from what it waits for, which may
    # be minutes of compilation. A thread receives the signal at once. Only the main thread may set
    # signal handlers; a notebook or a test calls this from another.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = threading.Lock()

    def end() -> None:
        # Whichever thread is first acquires it and never releases it.
        ending.acquire()
        if jax.distributed.is_initialized():
            training.distributed.leave(says, _INTERRUPTED)
        logging.flush()
        sys.stdout.flush()
        # A progress bar or partly printed text leaves the cursor within a line.
        print(f"\n{says}" if sys.stderr.isatty() else says, file=sys.stderr, flush=True)
        # Threads that are still compiling or writing must not delay the exit.
        os._exit(_INTERRUPTED)

    def listen() -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT:
                _interrupted.set()
                time.sleep(_GRACE_SECONDS)
                end()
        os.close(reader)

    _interrupted.clear()
    reader, writer = os.pipe()
    # A handler that waited for space in the pipe would block the whole process.
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, name="interrupts", daemon=True).start()
    try:
        yield
    except BaseException as error:
        # A callback or thread that was interrupted fails with unrelated errors.
        if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            end()
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def main(
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]] | None,
    run: Callable[..., None],
    *,
    program: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse flags, join the other processes, run; errors that a user can fix end in one line.

    A wrong flag, wrong data or a missing package ends with status 2. A failing disk, object store,
    hub or network ends with 75, and the same command may be started again. Ctrl-C ends with 130.
    All processes of a run end with the status of the first that fails.

    Args:
        config_class: The dataclass that `run` receives. It may nest others.
        presets: Its defaults by name, flat. The first are used if none is named.
        run: `(config, out)` or `(config, workdir)`, called by every process with a locked folder
            that contains `config.json`, or `(config)`. The folder's flag is named after the
            parameter.
        program: Name of the program in `--help`. By default the name of the module.
        arguments: Command-line arguments after the program. By default those of `sys.argv`.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    module = sys.modules[run.__module__]
    if program is None:
        spec = module.__spec__
        program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    parameters = inspect.signature(run).parameters
    kept = next((name for name in ("out", "workdir") if name in parameters), "")
    folder = [_folder_class(kept), _Processes] if kept else []
    classes = [*folder, _Families, config_class]
    # Handled before absl, which would print its own flags.
    if set(arguments) & set(_HELP):
        print(_flags.help_text(program, module.__doc__, _flags.flags_of(*classes), presets))
        return
    says = "interrupted; the same command continues" if kept else "interrupted"
    with _interruptible(says):
        _main(classes, presets, run, program, arguments, kept)


# A process's own start-up counts for its first run only, as in a notebook.
_accounts = itertools.count()


def _process_start() -> float | None:
    """Time at which this process started, where Linux reports it."""
    with contextlib.suppress(OSError):
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        return time.time() - uptime + int(ticks) / os.sysconf("SC_CLK_TCK")
    return None


@contextlib.contextmanager
def _accounted(folder: epath.Path) -> Iterator[None]:
    """Process 0 keeps account of the run's time and logs how it was spent."""
    if jax.process_index() != 0:
        yield
        return
    record = training.Goodput(folder)
    with record.account(None if next(_accounts) else _process_start()):
        yield
    total = record.summary()
    parts = sorted(total["seconds"].items(), key=lambda part: -part[1])
    text = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts if seconds >= 0.5)
    logging.info("%.0f s in %d starts: %s", total["wall"], total["starts"], text)


def _main(
    classes: list[type],
    presets: Mapping[str, Mapping[str, Any]] | None,
    run: Callable[..., None],
    program: str,
    arguments: Sequence[str],
    kept: str,
) -> None:
    """Continue `main` once it is known whether there is a folder and what its flag is called."""
    for flag in _flags.flags_of(*classes):
        if f"--{flag.name}=help" in arguments and flag.metadata.get("listing"):
            print(flag.metadata["listing"]())
            return
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_is_ours)
    # absl's logging requires it.
    absl_flags.FLAGS.mark_as_parsed()
    details = None
    try:
        *running, brought, config = parse(classes, presets, arguments, program=program)
        for text in brought.family:
            # Imported here so that a command without models starts without them.
            importlib.import_module("logitjax.models").register_family(text)
    except (absl_flags.Error, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    cached = jax.config.values["jax_compilation_cache_dir"] is not None
    if not cached:
        jax.config.update("jax_compilation_cache_dir", _COMPILED)
        compilation_cache.__dict__.update(zstd=None, zstandard=None)  # zlib notices flipped bits
    try:
        if not kept:
            run(config)
            return
        # A run of hours logs its activity; a command that only prints is quiet.
        logging.set_verbosity(logging.INFO)
        folder = epath.Path(getattr(running[0], kept))
        if getattr(running[0], "dry_run", False):
            with _narrated():
                # Imported here so that a command without models starts without them.
                work = importlib.import_module("logitjax.commands.work")
                for line in work.estimate(config).lines(program, folder):
                    print(line, flush=True)
            return
        training.distributed.initialize(**dataclasses.asdict(running[1]))
        with _narrated(), training.lock_workdir(folder), _accounted(folder):
            # Before this point, the folder may belong to another run.
            details = folder
            if not cached and "://" in str(folder):
                # The run may continue on other machines, which would compile everything again.
                jax.config.update("jax_compilation_cache_dir", f"{folder}/.compiled")
            with processes.first_before_others("writing config.json"):
                _config_file.write_config(config, folder, kept)
            kinds = collections.Counter(device.device_kind for device in jax.devices())
            devices = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            logging.info("%s on %s, into %s", program, devices, folder)
            run(config, folder)
    except _ONE_LINE_ERRORS as error:
        _let_others_speak(error)
        status = os.EX_TEMPFAIL if storage.may_pass(error) else 2
        _fail(error, status, details)
    # XLA raises one type for a full device, a lost process and its own bugs: only the text differs.
    except jax.errors.JaxRuntimeError as error:
        first = RuntimeError(str(error).splitlines()[0][:300])
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(first, 2, details, "; a device's memory is too small for this")
        if not jax.distributed.is_initialized() and not storage.may_pass(error):
            raise
        _let_others_speak(error)
        _fail(first, os.EX_TEMPFAIL, None, "; another process is gone, the same command continues")
    except Exception as error:
        if storage.may_pass(error):
            _fail(error, os.EX_TEMPFAIL, details)
        if not jax.distributed.is_initialized():
            raise
        # Others wait in a collective, so this process cannot unwind: it reports the failure now.
        traceback.print_exc()
        _fail(error, 1, None)
