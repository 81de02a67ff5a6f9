"""Records of published benchmarks, from files beside each other or from the hub."""

import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from logitjax import storage
from logitjax.storage import guard


def read_records(source: str | os.PathLike[str], stems: Sequence[str]) -> list[dict[str, Any]]:
    """The records of the first of some files that is there.

    Files may be JSON (a list, or an object a line), plain text (a record `{"text"}` each
    paragraph), or Parquet, whole or in numbered parts as the hub has them.
    """
    endings = (".json", ".jsonl", ".txt", ".parquet", "-*.parquet")
    patterns = [stem + ending for stem in stems for ending in endings]
    text = os.fspath(source)
    if text.startswith("hf:"):
        root = storage.hub_snapshot(text[3:], patterns, kind="dataset")
    else:
        root = epath.Path(text).expanduser()
    found = next((files for p in patterns if (files := sorted(root.glob(p)))), None)
    if found is None:
        raise FileNotFoundError(f"no {' or '.join(stems)} under {root}, as JSON, text or Parquet")
    return [record for path in found for record in _read(path)]


def _read(path: epath.Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        parquet = storage.require("pyarrow.parquet", extra="eval")
        with path.open("rb") as file:
            return parquet.read_table(file).to_pylist()
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, {error.reason}") from None
    if path.suffix == ".txt":
        return [{"text": part.strip()} for part in text.split("\n\n") if part.strip()]
    whole = path.suffix == ".json" and text.lstrip().startswith("[")
    records = []
    for number, part in enumerate([text] if whole else text.split("\n"), start=1):
        if part.strip():
            try:
                found = guard.parse_json(part.encode())
            except json.JSONDecodeError as error:
                line = number + error.lineno - 1
                raise ValueError(f"{path}:{line}: not JSON: {error.msg}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            records += found if whole else [found]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected objects")
    return records


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """A text of a record."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key}: expected text, got {value!r}")
    return value
