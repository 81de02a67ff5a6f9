"""Configurations in files: those that a user writes, and `config.json` next to a result."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath

from logitjax import storage
from logitjax.commands import _flags

# Files that record when a run was started, whether or not it produced anything.
_RECORDS = ("config.json", "lock", "starts.json", "goodput.jsonl", "goodput")


def read_config(path: str, sections: Collection[str], flags: Collection[str]) -> dict[str, Any]:
    """Values by flag name from a YAML file, such as the `config.json` next to a result."""
    # Imported here because most runs have no file and every command imports this module.
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
            # Sections are only for readers: names are flat and unique across all of them.
            if name in sections and name not in flags:
                gather(value)
            else:
                _flags.check_names(f"config: {path}", [name], flags)
                values[name] = value

    gather(record)
    return values


def write_config(config: _flags.Dataclass, folder: epath.Path, flag: str) -> None:
    """Write `config.json` without secrets; refuse a folder with another configuration.

    Fields that only describe how a run executes are written but not compared. A folder that
    contains only the record of a failed or killed run may be used again.
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
        # A flipped bit makes an unknown flag name; another command has more flags of its own.
        if len(unknown) == len(missing) == 1:
            name, stored = missing.pop(), unknown.pop()
            raise ValueError(f"{path}: expected a flag {name!r}, got {stored!r}; {again}")
        flags = _flags.flags_of(type(config))
        # Another mesh computes the same result, so such a run may be continued.
        free = {f.name for f in flags if f.metadata.get("execution") or f.metadata.get("secret")}
        changed = sorted(k for k in {*old, *new} - free if old.get(k) != new.get(k))
        if changed and _has_results(folder):
            raise ValueError(
                f"{flag}: expected a folder of this configuration, got {path} with another "
                f"{', '.join(changed)}; choose a new --{flag}"
            )
    # The other processes only compare: two writers of one file on an object store would race.
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(path, text)


def _has_results(folder: epath.Path) -> bool:
    """Whether the folder contains more than the record of a run and unfinished leftovers."""
    for path in folder.iterdir():
        record = path.name in _RECORDS or path.name.startswith((".", "error."))
        if not record and (_has_results(path) if path.is_dir() else True):
            return True
    return False
