"""Configurations in files: those that a user writes, and the one beside a result."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath

from logitjax import storage
from logitjax.commands import _flags

# Files that tell of a run's starts, whether or not one of them came to something.
_RECORDS = ("config.json", "lock", "starts.json", "goodput.jsonl", "goodput")


def read_config(path: str, sections: Collection[str], flags: Collection[str]) -> dict[str, Any]:
    """Values by flags' names from a YAML file, of which `config.json` beside a result is one."""
    # Here: most runs have no file, and every command imports this module.
    import yaml

    location = epath.Path(path)
    if not location.exists():
        raise FileNotFoundError(f"config: no such file: {path}")
    try:
        record = yaml.safe_load(location.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected YAML in {path}, got {error}") from None
    values: dict[str, Any] = {}

    def gather(mapping: Any) -> None:
        if not isinstance(mapping, Mapping):
            raise ValueError(f"config: expected names and values in {path}, got {mapping!r:.40}")
        for name, value in mapping.items():
            # Sections are for the reader: names are flat, and unique over all of them.
            if name in sections and name not in flags:
                gather(value)
            else:
                _flags.check_names(f"config: {path}", [name], flags)
                values[name] = value

    gather(record)
    return values


def write_config(config: _flags.Dataclass, folder: epath.Path, flag: str) -> None:
    """Write `config.json` without secrets; a folder of another configuration is refused.

    Fields that say how a run executes are written and not compared. A folder that holds nothing
    but the record of a run belongs to nobody, whether its run failed or was killed.
    """
    values = _flags.flatten(config)
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    path = folder / "config.json"
    if path.exists() and path.read_bytes() != text.encode():
        again = "remove this file, which is then written again"
        try:
            old, new = storage.read_json(path, form=dict), json.loads(text)
        except ValueError as error:
            raise ValueError(f"{error}; {again}") from None
        unknown, missing = ({*a} - {*b} for a, b in ((old, new), (new, old)))
        # One bit makes another name of a flag's; another command has more of its own.
        if len(unknown) == len(missing) == 1:
            name, stored = missing.pop(), unknown.pop()
            raise ValueError(f"{path}: expected a flag {name!r}, got {stored!r}; {again}")
        flags = _flags.flags_of(type(config))
        # Another mesh computes the same result: such a run may be continued.
        free = {f.name for f in flags if f.metadata.get("execution") or f.metadata.get("secret")}
        changed = sorted(k for k in {*old, *new} - free if old.get(k) != new.get(k))
        if changed and _has_results(folder):
            raise ValueError(
                f"{flag}: expected a folder of this configuration, got {path} with another "
                f"{', '.join(changed)}; choose a new --{flag}"
            )
    # Others have only compared: two writers of one file on a store would race.
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(path, text)


def _has_results(folder: epath.Path) -> bool:
    """Whether there is any file except the record of a run and unfinished leftovers."""
    for path in folder.iterdir():
        record = path.name in _RECORDS or path.name.startswith((".", "error."))
        if not record and (_has_results(path) if path.is_dir() else True):
            return True
    return False
