"""array_record files with errors that name the file, on local and remote paths."""

import bisect
import itertools
import os
import tempfile
import threading
import uuid
from collections.abc import Sequence

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

# One record a group is what random access wants; no read-ahead for the same reason.
_WRITER_OPTIONS = "group_size:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def replace_atomically(path: epath.Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part of it."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    temporary.write_bytes(content)
    temporary.replace(path)


class ShardWriter:
    """Writes numbered shards; each appears under its name only when it is complete.

    array_record itself writes to local disks only, so a shard for elsewhere is written locally
    and then copied.
    """

    def __init__(self, directory: epath.Path, rows_per_shard: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._rows_per_shard = rows_per_shard
        self._scratch = tempfile.TemporaryDirectory(
            dir=None if is_remote(directory) else os.fspath(directory), prefix=".packing-"
        )
        self._writer: ArrayRecordWriter | None = None
        self._rows = 0
        self.shards: list[dict[str, int | str]] = []

    def write(self, record: bytes) -> None:
        writer = self._writer
        if writer is None:
            writer = self._writer = ArrayRecordWriter(os.fspath(self._path()), _WRITER_OPTIONS)
        writer.write(record)
        self._rows += 1
        if self._rows == self._rows_per_shard:
            self._finish_shard()

    def close(self) -> None:
        self._finish_shard()
        self._scratch.cleanup()

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._scratch.cleanup()

    def _path(self) -> epath.Path:
        return epath.Path(self._scratch.name) / f"rows-{len(self.shards):05d}.array_record"

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        path = self._path()
        target = self._directory / path.name
        size = path.stat().length
        if is_remote(target):
            path.copy(target, overwrite=True)
            path.unlink()
        else:
            path.replace(target)
        self.shards.append({"file": target.name, "rows": self._rows, "bytes": size})
        self._writer, self._rows = None, 0


class ShardReader:
    """Random access over shards, checked against the sizes they were written with."""

    def __init__(self, directory: epath.Path, shards: Sequence[dict]):
        self._paths = [directory / shard["file"] for shard in shards]
        self._rows = [int(shard["rows"]) for shard in shards]
        self._ends = list(itertools.accumulate(self._rows))
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self._mirror: tempfile.TemporaryDirectory | None = None
        for path, shard in zip(self._paths, shards, strict=True):
            if not path.exists():
                raise FileNotFoundError(f"packed data lacks a shard: {path}")
            size = path.stat().length
            if size != shard["bytes"]:
                raise ValueError(
                    f"packed shard {path} is damaged: {size} bytes instead of {shard['bytes']}; "
                    f"delete {directory} and pack again"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: Sequence[int]) -> list[bytes]:
        return [self._read(int(index)) for index in indices]

    def _read(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        offset = index - (self._ends[shard] - self._rows[shard])
        with self._lock:
            try:
                return self._reader(shard).read([offset])[0]
            except RuntimeError as error:
                raise ValueError(
                    f"packed shard {self._paths[shard]} is damaged at row {offset}: {error}"
                ) from None

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard not in self._readers:
            path = self._paths[shard]
            local = self._fetch(path) if is_remote(path) else path
            reader = ArrayRecordReader(os.fspath(local), _READER_OPTIONS)
            if not reader.ok() or reader.num_records() != self._rows[shard]:
                raise ValueError(f"packed shard {path} is damaged: it cannot be opened")
            self._readers[shard] = reader
        return self._readers[shard]

    def _fetch(self, path: epath.Path) -> epath.Path:
        if self._mirror is None:
            self._mirror = tempfile.TemporaryDirectory(prefix="logitjax-rows-")
        local = epath.Path(self._mirror.name) / path.name
        path.copy(local, overwrite=True)
        return local
