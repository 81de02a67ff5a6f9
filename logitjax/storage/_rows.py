"""Expensive results for rows, stored in parts that can be extended.

A part, a shard and a JSON file of its rows, counts once both exist: processes need not talk.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from logitjax.storage import _guard as guard
from logitjax.storage._digest import digest
from logitjax.storage._files import write_json
from logitjax.storage._guard import read_json
from logitjax.storage._manifest import Manifest
from logitjax.storage._progress import progress
from logitjax.storage._shards import ShardReader, open_shard

# Seconds between log lines without a terminal.
_LOG_SECONDS = 10.0

Rows = Sequence[int] | np.ndarray


class ArrayCodec:
    """Rows of named arrays of fixed shapes, encoded from and decoded to `{name: [batch, *shape]}`.

    Args:
        fields: `{name: (dtype, shape of a row)}`.

    >>> codec = ArrayCodec({"value": ("float32", (2,)), "label": ("int32", ())})
    >>> records = codec.encode({"value": np.ones((3, 2)), "label": np.arange(3)}, 2)
    >>> len(records), codec.bytes_per_row, codec.decode(records)["label"]
    (2, 12, array([0, 1], dtype=int32))
    """

    def __init__(self, fields: Mapping[str, tuple[Any, tuple[int, ...]]]):
        self.fields = {name: (np.dtype(dtype), shape) for name, (dtype, shape) in fields.items()}
        # Little-endian on every machine.
        self._row = np.dtype(
            [(name, dtype.newbyteorder("<"), shape) for name, (dtype, shape) in self.fields.items()]
        )
        self.bytes_per_row = self._row.itemsize

    def encode(self, computed: Any, count: int) -> list[bytes]:
        """Records from a mapping, or from an object with these attributes."""
        rows = np.empty(count, self._row)
        for name, (dtype, shape) in self.fields.items():
            array = computed[name] if isinstance(computed, Mapping) else getattr(computed, name)
            array = _fitting(np.asarray(array), dtype, name)
            if array.shape[1:] != shape or len(array) < count:
                expected = ", ".join(["batch", *map(str, shape)])
                raise ValueError(f"{name}: expected [{expected}], got {array.shape}")
            rows[name] = array[:count]
        return [row.tobytes() for row in rows]

    def decode(self, records: Sequence[bytes]) -> dict[str, np.ndarray]:
        """The arrays of rows, each `[rows, *shape]`."""
        for record in records:
            if len(record) != self.bytes_per_row:
                raise ValueError(
                    f"damaged record: {len(record)} bytes instead of {self.bytes_per_row}"
                )
        rows = np.frombuffer(b"".join(records), self._row)
        return {
            name: np.ascontiguousarray(rows[name], kind) for name, (kind, _) in self.fields.items()
        }


class RowCache:
    """Expensive results for numbered rows, computed once and stored on disk.

    A directory made from other inputs is refused. Rows are computed in batches, in any order, by
    one or several processes; after a kill, the same call continues.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> codec = ArrayCodec({"square": ("int64", ())})
    >>> def compute(rows):
    ...     return {"square": rows**2}
    >>> cache = RowCache(directory, codec, made_from={"data": "integers", "power": 2})
    >>> cache.fill(range(5), compute, batch_size=2)
    >>> cache.read([4, 1])["square"], cache.missing([3, 7])
    (array([16,  1]), array([7]))
    >>> RowCache(directory, codec, made_from={"data": "integers", "power": 3})
    Traceback (most recent call last):
    ValueError: row cache ... does not fit: its power is 2, not 3 ...

    Args:
        directory: Folder of the cache, existing or new; may be remote.
        codec: Encoding of rows as bytes, such as an `ArrayCodec`: `encode(computed, count)` returns
            the records of the first `count` rows of a batch, `decode(records)` the result of
            `read`, and `bytes_per_row` is about the size of a record, for progress reports.
        made_from: Everything that determines the rows: JSON values by name, such as the digest of
            the data. Creates a cache if there is none. Without it the cache must exist.
        kind: Name of the cache in errors.
        names_of: As in `Manifest.check`.

    Raises:
        FileNotFoundError: There is no cache, and no `made_from` to create one with.
        ValueError: It was made from other inputs (names all differences), or is damaged.
    """

    # Parts of `made_from` that may be larger in a cache than requested.
    _at_least: tuple[str, ...] = ()

    def __init__(
        self,
        directory: str | os.PathLike[str],
        codec: Any,
        *,
        made_from: Mapping[str, Any] | None = None,
        kind: str = "row cache",
        names_of: Mapping[str, str] | None = None,
    ):
        self.directory = epath.Path(directory).expanduser()
        self._codec, self._kind = codec, kind
        manifest = Manifest(self.directory, kind)
        if made_from is None:
            self.made_from = manifest.read()["made_from"]
        else:
            self.made_from = manifest.claim(made_from, names_of=names_of)
        self._load()

    def _load(self) -> None:
        parts = _read_parts(self.directory)
        self._reader = ShardReader(self.directory, [part["shard"] for part in parts])
        rows = [row for part in parts for span in part["rows"] for row in range(*span)]
        # Two independent runs may both have written a row.
        self._rows, self._places = np.unique(np.asarray(rows, np.int64), return_index=True)
        self._added = False

    @property
    def row_numbers(self) -> np.ndarray:
        """The existing rows, ascending."""
        if self._added:
            self._load()
        return self._rows

    def __len__(self) -> int:
        return len(self.row_numbers)

    def check(self, **expected: Any) -> None:
        """Raise a `ValueError` that names all differences unless the cache was made from these."""
        Manifest(self.directory, self._kind).check(expected, at_least=self._at_least)

    def missing(self, rows: Rows) -> np.ndarray:
        """The missing ones of these rows, ascending; -1 is never missing."""
        expected = np.unique(_row_numbers(rows))
        return np.setdiff1d(expected[expected >= 0], self.row_numbers)

    def read(self, rows: Rows) -> Any:
        """Read these rows in this order, decoded by the codec.

        Raises:
            ValueError: A row is missing, or a record is damaged.
        """
        rows = _row_numbers(rows)
        missing = self.missing(rows)
        if len(missing) or (len(rows) and rows.min() < 0):
            first = missing[0] if len(missing) else rows.min()
            raise ValueError(
                f"{self._kind} {self.directory} lacks {max(1, len(missing))} of the requested "
                f"rows, such as {first}: compute them first"
            )
        places = self._places[np.searchsorted(self.row_numbers, rows)]
        return self._codec.decode(self._reader.read(places.tolist()))

    def fill(
        self,
        rows: Rows,
        compute: Callable[[np.ndarray], Any],
        *,
        batch_size: int,
        rows_per_shard: int = 256,
        label: str = "",
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Compute the missing rows, this process's share of them.

        Each process writes its own parts independently. With several processes, wait for all of
        them and open the cache again before reading.

        Args:
            rows: The rows that should exist in the end.
            compute: Maps `rows [batch_size]` to the codec's input. Always called with `batch_size`
                rows, repeated ones in the last call, so that it compiles once. Work that it has
                only dispatched runs while the next batch is fetched.
            rows_per_shard: Rows per file, the most that a kill can lose.
            label: Label of the progress bar.
        """
        expected = np.unique(_row_numbers(rows, least=0))
        todo = self._todo(expected, rows_per_shard, process_index, process_count)
        count = sum(map(len, todo))
        megabytes = self._codec.bytes_per_row / 1e6
        if count:
            logging.info(
                "%s: %d rows to read, %.1f MB (all %d rows: %.1f MB)",
                *(label, count, count * megabytes, len(expected), len(expected) * megabytes),
            )
        progress.mark(f"reading rows of {label or self.directory}")
        with tqdm(total=count, desc=label, unit=" rows", disable=None) as bar:
            done, logged = 0, time.monotonic()

            def written(rows: int) -> None:
                nonlocal done, logged
                bar.update(rows)
                done += rows
                # A disabled bar, without a terminal, shows nothing.
                if bar.disable and (done == count or time.monotonic() - logged > _LOG_SECONDS):
                    logging.info("%s: %d of %d rows read", label, done, count)
                    logged = time.monotonic()

            for part in todo:
                self._write_part(part, _ahead(part, compute, batch_size), written)

    def calls(
        self,
        rows: Rows,
        *,
        batch_size: int,
        rows_per_shard: int = 256,
        process_index: int = 0,
        process_count: int = 1,
    ) -> int:
        """Number of times that `fill` with these arguments would call `compute` now."""
        expected = np.unique(_row_numbers(rows, least=0))
        todo = self._todo(expected, rows_per_shard, process_index, process_count)
        return sum(-(-len(part) // batch_size) for part in todo)

    def _todo(self, rows: np.ndarray, size: int, index: int, count: int) -> list[np.ndarray]:
        """The missing rows of each part that this process writes."""
        # Split from all requested rows, so that parts do not depend on existing ones.
        local = [rows[i : i + size] for i in range(0, len(rows), size)][index::count]
        # Read anew from disk: another process may have written since.
        self._load()
        return [part for part in (self.missing(part) for part in local) if len(part)]

    def add(self, rows: Rows, computed: Any) -> None:
        """Write computed values of these rows as one part."""
        rows = _row_numbers(rows, least=0)
        self._write_part(rows, [(computed, len(rows))], lambda count: None)

    def _write_part(self, rows: np.ndarray, batches: Any, written: Callable[[int], Any]) -> None:
        # The same rows, the same file.
        name = f"part-{rows[0]:08d}-{digest(rows)[:12]}"
        with open_shard(self.directory, name) as (write, shard):
            for computed, count in batches:
                for record in self._codec.encode(computed, count):
                    write(record)
                written(count)
        write_json(self.directory / f"{name}.json", {"rows": _ranges(rows), "shard": shard})
        # Read when somebody asks: to look at all parts after each is slow.
        self._added = True


def _row_numbers(rows: Rows, *, least: int | None = None) -> np.ndarray:
    """Rows as int64; masks of rows and negative numbers are refused."""
    numbers = np.asarray(rows)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(f"rows: expected integers, got {numbers.dtype}")
    if least is not None and numbers.size and numbers.min() < least:
        location = int((numbers < least).argmax())
        raise ValueError(
            f"rows: expected {least} or more, got {numbers.ravel()[location]} at {location}"
        )
    return numbers.astype(np.int64)


def _fitting(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array; integers must be stored in an integer type."""
    if not np.issubdtype(dtype, np.integer) or array.dtype == bool or array.dtype == dtype:
        return array
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, for {dtype}, got {array.dtype}")
    wrong = (array < np.iinfo(dtype).min) | (array > np.iinfo(dtype).max)
    if wrong.any():
        location = int(wrong.argmax())
        raise ValueError(f"{name}: expected {dtype}, got {array.ravel()[location]} at {location}")
    return array


def _ahead(rows: np.ndarray, compute: Callable[[np.ndarray], Any], batch_size: int) -> Any:
    """Yield `(computed, count)` of each batch, dispatching the next one first."""
    last: tuple[Any, int] | None = None
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # The last batch repeats its rows, because another shape would compile again.
        computed = compute(np.resize(batch, batch_size))
        if last is not None:
            yield last
        last = (computed, len(batch))
    if last is not None:
        yield last


def _ranges(rows: np.ndarray) -> list[list[int]]:
    """Indices as half-open runs of ascending ones."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(rows, cuts)]


def _read_parts(root: epath.Path) -> list[dict]:
    names = sorted(p.name for p in root.iterdir() if re.fullmatch(r"part-.*\.json", p.name))
    parts = []
    for name in names:
        part = read_json(root / name, form=dict)
        with guard.naming(root / name):
            shard, runs = part["shard"], part["rows"]
            guard.whole(shard["bytes"], "bytes")
            rows = guard.whole(shard["rows"], "rows", most=1 << 40)
            guard.inside(root, shard["file"], "file")
            ends = [(guard.whole(a, "rows"), guard.whole(b, "rows", least=a)) for a, b in runs]
            # They are expanded into a list of the length they claim.
            if sum(b - a for a, b in ends) != rows:
                raise ValueError(f"rows: expected {rows} in all")
        parts.append(part)
    return parts
