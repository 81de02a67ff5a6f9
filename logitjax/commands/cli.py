"""From absl flags to one frozen dataclass: presets first, then what the command line says.

An experiment is a frozen dataclass ``Config`` whose fields carry their help, a dict of presets, and
``run(config, workdir)``; ``main(Config, PRESETS, run)`` does the rest.
"""

import dataclasses
import json
import logging as py_logging
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath

from logitjax import processes, training

_COMPILED = str(epath.Path("~/.cache/logitjax/compiled").expanduser())
# Anything else is a fault of ours and shows its traceback.
_SAID_IN_ONE_LINE = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    training.NonFiniteError,
    training.WorkdirInUseError,
)


def field(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that becomes the flag of the same name."""
    metadata = {"help": help, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def _define(field_: dataclasses.Field, annotation: Any, values: flags.FlagValues) -> None:
    name, help_ = field_.name, field_.metadata.get("help", "")
    optional = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    if optional:
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    help_ = f"{help_} (default {field_.default!r})"
    if typing.get_origin(annotation) is tuple:
        of_text = typing.get_args(annotation)[0] is str
        how = "repeatable" if of_text else "comma-separated or repeated"
        flags.DEFINE_multi_string(name, None, f"{help_}; {how}, none if empty", flag_values=values)
    elif field_.metadata.get("choices"):
        flags.DEFINE_enum(name, None, list(field_.metadata["choices"]), help_, flag_values=values)
    elif annotation is bool:
        flags.DEFINE_bool(name, None, help_, flag_values=values)
    elif annotation is int:
        flags.DEFINE_integer(name, None, help_, flag_values=values)
    elif annotation is float:
        flags.DEFINE_float(name, None, help_, flag_values=values)
    else:
        flags.DEFINE_string(name, None, help_, flag_values=values)


def define_flags(
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]],
    values: flags.FlagValues = flags.FLAGS,
) -> None:
    """One flag a field, plus ``--preset`` and ``--workdir``."""
    flags.DEFINE_enum(
        "preset", next(iter(presets)), list(presets), "Named set of defaults.", flag_values=values
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Where the run lives; the same one resumes it.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", flag_values=values)
    flags.DEFINE_integer("process_id", None, "Which of them this is.", flag_values=values)
    hints = typing.get_type_hints(config_class)
    for field_ in dataclasses.fields(config_class):
        _define(field_, hints[field_.name], values)


def config_from_flags(
    config_class: type, presets: Mapping[str, Mapping[str, Any]], values: flags.FlagValues
) -> Any:
    """The preset's values, overridden by the flags that were given."""
    chosen = dict(presets[values.preset])
    hints = typing.get_type_hints(config_class)
    for field_ in dataclasses.fields(config_class):
        given = values[field_.name].value
        if given is None:
            continue
        if isinstance(given, list):
            element = typing.get_args(hints[field_.name])[0]
            if element is not str:
                given = [item for one in given for item in one.split(",")]
            given = tuple(element(item) for item in given if item)
        chosen[field_.name] = given
    return config_class(**chosen)


def write_config(config: Any, workdir: epath.Path) -> None:
    """Write ``config.json``; a workdir that holds another configuration is refused."""
    text = json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n"
    path = workdir / "config.json"
    if path.exists() and path.read_text() != text:
        old, new = json.loads(path.read_text()), json.loads(text)
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        raise ValueError(
            f"workdir {workdir} belongs to a run with another configuration: it differs in "
            f"{', '.join(changed)}; name a new --workdir"
        )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _is_ours(record: Any) -> bool:
    """Libraries' own progress notes would bury the experiment's; their warnings stay."""
    return record.levelno > py_logging.INFO or "site-packages" not in record.pathname


def _leave(status: int) -> None:
    """Ends the process; one of many at once, for the usual way out waits for the others."""
    if not training.distributed.is_joined():
        sys.exit(status)
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(
    config_class: type,
    presets: Mapping[str, Mapping[str, Any]],
    run: Callable[[Any, epath.Path], None],
) -> None:
    """Parse flags, write ``config.json`` into the workdir, run; user errors end as one line.

    Args:
      config_class: the experiment's ``Config``.
      presets: its defaults by name.
      run: ``(config, workdir)``; every process calls it.
    """
    define_flags(config_class, presets)

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        if not logging.level_info():
            logging.set_verbosity(logging.INFO)
        logging.get_absl_handler().addFilter(_is_ours)
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", _COMPILED)
        workdir = epath.Path(flags.FLAGS.workdir)
        try:
            config = config_from_flags(config_class, presets, flags.FLAGS)
            training.distributed.initialize(
                flags.FLAGS.coordinator_address, flags.FLAGS.num_processes, flags.FLAGS.process_id
            )
            with processes.first_before_others("config"):
                write_config(config, workdir)
            run(config, workdir)
        except _SAID_IN_ONE_LINE as error:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "error.txt").write_text(traceback.format_exc())
            print(f"error: {error} (details: {workdir}/error.txt)", file=sys.stderr)
            _leave(2)
        except jax.errors.JaxRuntimeError as error:
            if not training.distributed.is_joined():
                raise
            # What fails in a collective fails because another process is gone.
            said = str(error).splitlines()[0][:300]
            print(
                f"error: process {jax.process_index()}: {said}\nAnother process is gone; the same "
                "command goes on from the newest checkpoint.",
                file=sys.stderr,
            )
            _leave(training.LOST_STATUS)
        except Exception:
            if not training.distributed.is_joined():
                raise
            traceback.print_exc()
            _leave(1)

    app.run(start)
