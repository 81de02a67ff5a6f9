"""array_record files with errors that name the file, on local and remote paths."""

import bisect
import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from logitjax.storage._files import is_remote
from logitjax.storage._progress import progress

# One record per group is best for random access, as is no read-ahead.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

Shard = dict[str, Any]


@contextlib.contextmanager
def open_shard(directory: epath.Path, name: str) -> Iterator[tuple[Callable[[bytes], None], Shard]]:
    """Yields `(write, shard)`: a file that gets its name when the body has ended without error.

    `shard` then has its name, rows and bytes. array_record itself writes only to local disks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    near = None if is_remote(directory) else os.fspath(directory)
    prefix = f".unfinished-{name}-"
    # Left by a killed run; only one process at a time writes a shard, so they are unused.
    for leftover in directory.glob(f"{prefix}*") if near else ():
        leftover.rmtree()
    with tempfile.TemporaryDirectory(dir=near, prefix=prefix) as scratch:
        target = directory / f"{name}.array_record"
        path = epath.Path(scratch) / target.name
        writer = ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
        shard: Shard = {"file": target.name, "rows": 0}

        def write(record: bytes) -> None:
            writer.write(record)
            shard["rows"] += 1
            progress.mark()

        try:
            yield write, shard
        finally:
            writer.close()
        shard["bytes"] = path.stat().length
        if is_remote(directory):
            path.copy(target, overwrite=True)
        else:
            path.replace(target)


def write_shards(
    directory: epath.Path, records: Iterable[bytes], rows_per_shard: int, name: str = "rows-{:05d}"
) -> list[Shard]:
    """Write a stream of records as numbered shards, each complete or absent.

    Args:
        directory: Folder of the shards; created if necessary.
        records: The records; an error in them keeps the shards before the current one.
        name: Name of a shard, with a placeholder for its number.

    Returns:
        For each shard its file's name, rows and bytes, for a manifest.
    """
    shards: list[Shard] = []
    records = iter(records)
    for first in records:
        with open_shard(directory, name.format(len(shards))) as (write, shard):
            for record in itertools.chain([first], itertools.islice(records, rows_per_shard - 1)):
                write(record)
        shards.append(shard)
    return shards


class ShardReader:
    """Random access to shards, checked against the sizes that `write_shards` returned.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard has another size or, on reading, is damaged inside.
    """

    def __init__(self, directory: epath.Path, shards: Sequence[Shard]):
        self._paths = [directory / shard["file"] for shard in shards]
        self._rows = [int(shard["rows"]) for shard in shards]
        self._ends = list(itertools.accumulate(self._rows))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self._mirror: tempfile.TemporaryDirectory | None = None
        for path, shard in zip(self._paths, shards, strict=True):
            if not path.exists():
                raise FileNotFoundError(f"{directory} lacks a shard: {path}")
            size = path.stat().length
            if size != shard["bytes"]:
                raise ValueError(
                    f"shard {path} is damaged: {size} bytes instead of {shard['bytes']}; delete "
                    f"{directory} to create it again"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: Sequence[int]) -> list[bytes]:
        """Return the records of these numbers, counted over all shards."""
        return [self._read(int(index)) for index in indices]

    def _read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        offset = index - (self._ends[shard] - self._rows[shard])
        # The reader is not thread-safe.
        with self._lock:
            try:
                return self._reader(shard).read([offset])[0]
            except RuntimeError as error:
                raise ValueError(
                    f"shard {self._paths[shard]} is damaged at row {offset}: {error}"
                ) from None

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            path = self._paths[shard]
            local = self._fetch(path) if is_remote(path) else path
            reader = ArrayRecordReader(os.fspath(local), _READER_OPTIONS)
            if not reader.ok() or reader.num_records() != self._rows[shard]:
                raise ValueError(f"shard {path} is damaged: it cannot be opened")
            self._readers[shard] = reader
        return self._readers[shard]

    def _fetch(self, path: epath.Path) -> epath.Path:
        if self._mirror is None:
            self._mirror = tempfile.TemporaryDirectory(prefix="logitjax-rows-")
        local = epath.Path(self._mirror.name) / path.name
        path.copy(local, overwrite=True)
        return local
