"""From absl flags to one frozen dataclass, and from an error to one line.

A command or an experiment is a frozen dataclass `Config` whose fields carry their help, and
`run(config, workdir)`, or `run(config)` where nothing is kept. `main(Config, PRESETS, run)` does
the rest: `--help`, flags, presets below them, `config.json`, several processes, exit statuses.
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import logging as py_logging
import os
import sys
import textwrap
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol

import jax
from absl import flags, logging
from etils import epath

from logitjax import processes, storage, training

_COMPILED = str(epath.Path("~/.cache/logitjax/compiled").expanduser())
# What a user can mend. Anything else is a fault of ours and shows its traceback.
_ONE_LINE_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
)
_HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort")


@typing.runtime_checkable
class Dataclass(Protocol):
    """An instance of whatever dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


REQUIRED: Any = dataclasses.MISSING
"""Default of a `field` that has to be given."""


def field(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    positional: bool = False,
    selects: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field that becomes the flag of the same name.

    Args:
        default: Its value where neither a flag nor a preset gives one; `REQUIRED` for none.
        help: What it is, as a whole phrase.
        choices: All its values, for text.
        minimum: Lowest value, for numbers.
        positional: Whether arguments without a flag are its values; for one tuple of text.
        selects: Whether it says what of a run is done now, and changes nothing of what is done: a
            workdir may be continued with another value.
        secret: Whether it is a key or a password: it is not written to disk, and a workdir may be
            continued with another one.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "positional": positional}
    metadata |= {"selects": selects, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a run lives, and which of its processes this is."""

    workdir: str = field(
        REQUIRED,
        "Directory of the run, also on an object store. The same directory continues the run.",
    )
    coordinator_address: str | None = field(
        None, "Host and port of process 0, if no cluster says them."
    )
    num_processes: int | None = field(None, "Number of processes, if no cluster says it.")
    process_id: int | None = field(None, "Number of this process, from 0.")


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A field of a configuration as a flag.

    Attributes:
        field: Its name, default and help.
        kind: Type of its value, or of each of its values.
        several: Whether it is a tuple.
        choices: All its values, where they are named.
    """

    field: dataclasses.Field
    kind: Any
    several: bool
    choices: Sequence[str]


def _flags(config_class: type) -> list[_Flag]:
    hints = typing.get_type_hints(config_class)
    made = []
    for field_ in dataclasses.fields(config_class):
        kind, choices = hints[field_.name], field_.metadata["choices"] or ()
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        several = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        if typing.get_origin(kind) is typing.Literal:
            kind, choices = str, typing.get_args(kind)
        made.append(_Flag(field_, kind, several, tuple(choices)))
    return made


def define_flags(
    config_class: type, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> flags.FlagValues:
    """A flag for each field, and `--preset` where there are any."""
    values = flags.FlagValues()
    if presets:
        first = next(iter(presets))
        flags.DEFINE_enum("preset", first, list(presets), "", flag_values=values)
    for flag in _flags(config_class):
        name, least = flag.field.name, flag.field.metadata["minimum"]
        # None throughout: what was not given is left to the preset and the dataclass.
        if flag.several:
            flags.DEFINE_multi_string(name, None, "", flag_values=values)
        elif flag.choices:
            flags.DEFINE_enum(name, None, flag.choices, "", flag_values=values)
        elif flag.kind is bool:
            flags.DEFINE_bool(name, None, "", flag_values=values)
        elif flag.kind is int:
            flags.DEFINE_integer(name, None, "", lower_bound=least, flag_values=values)
        elif flag.kind is float:
            flags.DEFINE_float(name, None, "", lower_bound=least, flag_values=values)
        else:
            flags.DEFINE_string(name, None, "", flag_values=values)
    return values


def config_from_flags(
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]] | None,
    values: flags.FlagValues,
    rest: Sequence[str] = (),
) -> Any:
    """The preset's values, overridden by the flags that were given.

    Args:
        config_class: The dataclass.
        presets: Its defaults by name.
        values: Flags of `define_flags`, parsed.
        rest: Arguments without a flag.

    Raises:
        ValueError: A value of the wrong type, a required one that is missing, or an argument
            that nothing takes.
    """
    chosen = dict(presets[values.preset]) if presets else {}
    for flag in _flags(config_class):
        name, given = flag.field.name, values[flag.field.name].value
        if rest and flag.field.metadata["positional"]:
            given, rest = [*(given or []), *rest], ()
        if given is None:
            if name not in chosen and flag.field.default is REQUIRED:
                raise ValueError(f"{name}: expected a value, got none; give --{name}=...")
            continue
        if flag.several:
            if flag.kind is not str:
                given = [item for one in given for item in one.split(",")]
            try:
                given = tuple(flag.kind(item) for item in given if item)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        chosen[name] = given
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
    return config_class(**chosen)


def help_text(
    program: str,
    doc: str | None,
    classes: Sequence[type],
    presets: Mapping[str, Any] | None = None,
    *,
    workdir: str = "workdir",
) -> str:
    """What `--help` prints: the docstring, then each flag of the classes with its help.

    Args:
        program: What was called.
        doc: Its docstring.
        classes: Dataclasses whose fields are flags.
        presets: Named sets of defaults.
        workdir: What the program calls the flag of its directory.
    """
    shown, rest = [], ""
    if presets:
        names = "|".join(presets)
        shown.append((f"--preset={names}", "Named set of defaults. The first is the default."))
    for flag in itertools.chain(*map(_flags, classes)):
        metadata: Any = flag.field.metadata
        default: Any = flag.field.default
        says = metadata["help"].rstrip(".") + "."
        if metadata["positional"]:
            rest = f" {flag.field.name.upper()} ..."
        value = "TEXT" if flag.kind is str else "NUMBER"
        if flag.several:
            says += " May be repeated." if flag.kind is str else " Commas separate several."
        if default is REQUIRED:
            says += " Required."
        elif default not in (None, (), ""):
            shown_default = ", ".join(map(str, default)) if flag.several else default
            says += f" Default: {shown_default}."
        name = workdir if flag.field.name == "workdir" else flag.field.name
        name = f"--{name}={'|'.join(flag.choices) or value}"
        shown.append((f"--[no]{flag.field.name}" if flag.kind is bool else name, says))
    lines = [f"usage: {program} [--flag=value ...]{rest}", "", inspect.cleandoc(doc or ""), ""]
    for name, says in shown:
        lines += [f"  {name}", textwrap.indent(textwrap.fill(says, 90), " " * 6)]
    return "\n".join(lines)


def write_config(config: Dataclass, workdir: epath.Path) -> None:
    """Write `config.json` without secrets; a workdir of another configuration is refused."""
    fields = dataclasses.fields(config)
    secrets = {f.name for f in fields if f.metadata.get("secret")}
    shown = {k: v for k, v in dataclasses.asdict(config).items() if k not in secrets}
    text = json.dumps(shown, indent=1, sort_keys=True) + "\n"
    path = workdir / "config.json"
    if path.exists() and path.read_text() != text:
        old, new = json.loads(path.read_text()), json.loads(text)
        free = secrets | {f.name for f in fields if f.metadata.get("selects")}
        changed = sorted(k for k in {*old, *new} - free if old.get(k) != new.get(k))
        if changed:
            raise ValueError(
                f"workdir {workdir} belongs to a run with another configuration: it differs in "
                f"{', '.join(changed)}; name a new --workdir"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(path, text)


def _is_ours(record: Any) -> bool:
    """Libraries' own progress notes would bury the experiment's; their warnings stay."""
    return record.levelno > py_logging.INFO or "site-packages" not in record.pathname


def _write_details(workdir: epath.Path) -> str:
    """Leaves the traceback as `error.txt`, if it can within five seconds; where it is, in words."""
    index = jax.process_index() if training.distributed.is_joined() else 0
    path = workdir / (f"error.{index}.txt" if index else "error.txt")
    text, written = traceback.format_exc(), threading.Event()

    def write() -> None:
        # The disk may be what failed: it must not hide the first error.
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
    """One line about an error, and the end: at once where others wait or a thread may hang."""
    said = " ".join(str(error).split()) or type(error).__name__
    details = _write_details(workdir) if workdir else ""
    if status == os.EX_TEMPFAIL:
        note = note or "; this may pass, and the same command goes on"
    if training.distributed.is_joined() or status == os.EX_TEMPFAIL:
        training.distributed.leave(f"{said}{details}{note}", status)
    print(f"error: {said}{details}{note}", file=sys.stderr)
    sys.exit(status)


def _let_others_speak(error: BaseException) -> None:
    """What fails in a collective fails because another process is gone, which may yet say why.

    The watch then ends this process with the other's words.
    """
    failed = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    if failed and training.distributed.is_joined():
        time.sleep(3.0)


def main(
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]] | None,
    run: Callable[..., None],
    *,
    program: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse flags, join the other processes, run; what a user can mend ends as one line.

    A wrong flag, wrong data and a missing package end with status 2; a disk, a store, a hub or a
    network that fails ends with 75, after which the same command may be started again. All
    processes of a run end with the status of the first that fails. A `run` that takes a workdir
    gets one, locked and with `config.json` in it; one that calls it `out` lets users call it so
    too.

    Args:
        config_class: The dataclass that `run` is given.
        presets: Its defaults by name; the first ones hold if none is named.
        run: `(config, workdir)` or `(config, out)`, which every process calls, or `(config)`.
        program: What `--help` calls it; the module's name if omitted.
        arguments: What follows the program on the command line; `sys.argv`'s if omitted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    doc = sys.modules[run.__module__]
    if program is None:
        spec = doc.__spec__
        program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    kept = {"workdir", "out"} & set(inspect.signature(run).parameters)
    if set(arguments) & set(_HELP):
        classes = (_Place, config_class) if kept else (config_class,)
        # A command that calls its directory `out` documents that name.
        name = next(iter(kept), "workdir")
        print(help_text(program, doc.__doc__, classes, presets, workdir=name))
        return
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_is_ours)
    flags.FLAGS.mark_as_parsed()  # absl's logging waits for it
    place, details = None, None
    try:
        values = define_flags(config_class, presets)
        if kept:
            values.append_flag_values(define_flags(_Place))
            for name in kept - {"workdir"}:
                flags.DEFINE_alias(name, "workdir", flag_values=values)
        rest = values([program, *arguments])[1:]
        place = config_from_flags(_Place, None, values) if kept else None
    except (flags.Error, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", _COMPILED)
    try:
        config = config_from_flags(config_class, presets, values, rest)
        if place is None:
            run(config)
            return
        logging.set_verbosity(logging.INFO)
        training.distributed.initialize(
            place.coordinator_address, place.num_processes, place.process_id
        )
        workdir = epath.Path(place.workdir)
        with training.lock_workdir(workdir):
            details = workdir  # Before, it may be another run's.
            with processes.first_before_others("config"):
                write_config(config, workdir)
            run(config, workdir)
    except _ONE_LINE_ERRORS as error:
        _let_others_speak(error)
        status = os.EX_TEMPFAIL if storage.may_pass(error) else 2
        _fail(error, status, details)
    except jax.errors.JaxRuntimeError as error:
        first = RuntimeError(str(error).splitlines()[0][:300])
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(first, 2, details, "; a device's memory is too small for this")
        if not training.distributed.is_joined() and not storage.may_pass(error):
            raise
        _let_others_speak(error)
        _fail(first, os.EX_TEMPFAIL, None, "; another process is gone, the same command goes on")
    except Exception as error:
        if storage.may_pass(error):
            _fail(error, os.EX_TEMPFAIL, details)
        if not training.distributed.is_joined():
            raise
        traceback.print_exc()
        _fail(error, 1, None)
