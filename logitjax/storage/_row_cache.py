"""Rows that something expensive was computed of, in array_record parts that can be added to.

A cache is a directory with a manifest, which says what it was made from, and parts: a shard of
records and a small JSON file with the rows they belong to. A part counts once both are there, so
processes need not talk, a killed run loses at most the part it was at, and rows can follow later.
"""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tqdm import tqdm

from logitjax.storage._array_record import ShardReader, is_remote, replace_atomically

_FORMAT = 1


class RowReader:
    """The records of a cache, found by row; rows may have been written in any order.

    Attributes:
      held: the rows there are, ascending.
    """

    def __init__(self, directory: epath.Path, noun: str):
        parts = _read_parts(directory)
        self._directory, self._noun = directory, noun
        self._reader = ShardReader(directory, [part["shard"] for part in parts])
        rows = [row for part in parts for row in _expand(part["rows"])]
        # Two runs that did not know of each other may both have written a row.
        self.held, self._places = np.unique(np.asarray(rows, np.int64), return_index=True)

    def __len__(self) -> int:
        return len(self.held)

    def missing(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which of these rows are not there, ascending; -1 is never missing."""
        wanted = np.unique(np.asarray(rows, np.int64))
        return np.setdiff1d(wanted[wanted >= 0], self.held)

    def read(self, rows: Sequence[int] | np.ndarray, hint: str) -> list[bytes]:
        """The records of rows that must all be there."""
        rows = np.asarray(rows, np.int64)
        lacking = self.missing(rows)
        if len(lacking):
            raise ValueError(
                f"{self._noun} {self._directory} lacks {len(lacking)} of the rows asked for, "
                f"such as {lacking[0]}: {hint}"
            )
        places = self._places[np.searchsorted(self.held, rows)]
        return self._reader.read(places.tolist())


def write_manifest(
    root: epath.Path,
    name: str,
    identity: Any,
    noun: str,
    *,
    names_of: Mapping[str, str] | None = None,
) -> None:
    """Start a cache, or make sure that the one there was made from the same.

    ``names_of`` are the fields that only name what another field is the fingerprint of: a file
    that was moved is still the same.
    """
    if (root / name).exists():
        held = read_manifest(root, name, type(identity), noun)
        expected = dataclasses.asdict(identity)
        for field, fingerprint in (names_of or {}).items():
            if getattr(held, fingerprint) == expected[fingerprint]:
                del expected[field]
        check_identity(root, held, expected, noun)
        return
    root.mkdir(parents=True, exist_ok=True)
    record = {"format": _FORMAT} | dataclasses.asdict(identity)
    replace_atomically(root / name, json.dumps(record, indent=1).encode())


def read_manifest(root: epath.Path, name: str, kind: type, noun: str) -> Any:
    """What a cache was made from."""
    path = root / name
    if not path.exists():
        raise FileNotFoundError(f"no {noun} in {root} (it has no {name})")
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != _FORMAT:
            raise ValueError("another format")
        # JSON knows no tuples.
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete {root} and let it be made again"
        ) from None


def check_identity(
    root: epath.Path,
    held: Any,
    expected: Mapping[str, Any],
    noun: str,
    *,
    at_least: tuple[str, ...] = (),
) -> None:
    """Raise and name every field that differs; those ``at_least`` may be larger."""
    wrong = []
    for name, value in expected.items():
        has = getattr(held, name)
        if has == value or (name in at_least and has >= value):
            continue
        wrong.append(f"its {name} is {has!r}, not {value!r}")
    if wrong:
        raise ValueError(f"{noun} {root} does not fit: {'; '.join(wrong)}")


def write_rows(
    root: epath.Path,
    rows: Sequence[int] | np.ndarray,
    compute: Callable[[np.ndarray], Any],
    encode: Callable[[Any, int], Sequence[bytes]],
    *,
    batch_size: int,
    rows_per_shard: int,
    label: str,
    bytes_per_row: int,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Write the rows that are not there yet, this process's share of them.

    Args:
      root: of the cache.
      rows: wanted in the end.
      compute: always called with ``batch_size`` rows, repeated ones in the last call. What it has
        only dispatched runs while the next batch is fetched.
      encode: ``(computed, count) -> `` the records of the first ``count`` rows.
      batch_size: rows a call.
      rows_per_shard: rows a part, and what a kill can lose.
      label: on the progress bar.
      bytes_per_row: for the log.
      process_index: which share of the parts to write.
      process_count: among how many.
    """
    wanted = np.unique(np.asarray(rows, np.int64))
    # Chunks are cut from all wanted rows, so that they stay the same whatever is there already.
    chunks = [wanted[i : i + rows_per_shard] for i in range(0, len(wanted), rows_per_shard)]
    held = np.unique([r for part in _read_parts(root) for r in _expand(part["rows"])])
    todo = [np.setdiff1d(chunk, held) for chunk in chunks[process_index::process_count]]
    todo = [chunk for chunk in todo if len(chunk)]
    count = sum(map(len, todo))
    if count:
        logging.info(
            "%s: %d rows to read, %.1f MB (all %d rows: %.1f MB)",
            label,
            count,
            count * bytes_per_row / 1e6,
            len(wanted),
            len(wanted) * bytes_per_row / 1e6,
        )
    with tqdm(total=count, desc=label, unit=" rows", disable=None) as bar:
        done = 0
        for chunk in todo:
            _write_shard(root, chunk, compute, encode, batch_size, bar)
            done += len(chunk)
            # A disabled bar does not count.
            if bar.disable:
                logging.info("%s: %d of %d rows read", label, done, count)


def _write_shard(
    root: epath.Path,
    chunk: np.ndarray,
    compute: Callable[[np.ndarray], Any],
    encode: Callable[[Any, int], Sequence[bytes]],
    batch_size: int,
    bar: Any,
) -> None:
    name = f"part-{chunk[0]:08d}-{hashlib.sha256(chunk.tobytes()).hexdigest()[:12]}"
    target = root / f"{name}.array_record"
    # array_record writes to local disks only.
    near = None if is_remote(root) else os.fspath(root)
    with tempfile.TemporaryDirectory(dir=near, prefix=".reading-") as scratch:
        path = epath.Path(scratch) / target.name
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")

        def write(computed: Any, count: int) -> None:
            for record in encode(computed, count):
                writer.write(record)
            bar.update(count)

        try:
            last: tuple[Any, int] | None = None
            for start in range(0, len(chunk), batch_size):
                real = chunk[start : start + batch_size]
                computed = compute(np.resize(real, batch_size))
                if last is not None:
                    write(*last)
                last = (computed, len(real))
            if last is not None:
                write(*last)
        finally:
            writer.close()
        size = path.stat().length
        if is_remote(root):
            path.copy(target, overwrite=True)
        else:
            path.replace(target)
    shard = {"file": target.name, "rows": len(chunk), "bytes": size}
    part = {"rows": _ranges(chunk), "shard": shard}
    replace_atomically(root / f"{name}.json", json.dumps(part).encode())


def _ranges(rows: np.ndarray) -> list[list[int]]:
    """Ascending indices as half-open runs."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(rows, cuts)]


def _expand(ranges: Sequence[Sequence[int]]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


def _read_parts(root: epath.Path) -> list[dict]:
    names = sorted(p.name for p in root.iterdir() if re.fullmatch(r"part-.*\.json", p.name))
    return [json.loads((root / name).read_text()) for name in names]
