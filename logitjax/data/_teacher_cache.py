"""What a teacher says about packed rows, on disk: top logits and what makes them probabilities."""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Int
from tqdm import tqdm

from logitjax.data._array_record import ShardReader, is_remote, replace_atomically

MANIFEST = "teacher.json"
FIELDS = ("values", "indices", "log_z", "mean", "std")
_FORMAT = 1
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Statistics = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """What a cache was made from; losses may only be computed where all of it matches.

    Attributes:
      model: the teacher, as its user names it.
      tokenizer: fingerprint of the teacher's tokenizer.
      data: fingerprint of the packed rows.
      vocab_size: entries of the teacher's vocabulary.
      positions: positions a row.
      k: logits kept a position.
      dtype: 'float16', 'bfloat16' or 'float32': how log-probabilities are stored.
    """

    model: str
    tokenizer: str
    data: str
    vocab_size: int
    positions: int
    k: int
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.k <= self.vocab_size:
            raise ValueError(f"k must be in 1..{self.vocab_size}, the vocabulary, got {self.k}")

    @property
    def bytes_per_row(self) -> int:
        """Size of one row on disk."""
        entry = self._value_type.itemsize + self._id_type.itemsize
        return self.positions * (self.k * entry + 3 * 4)

    @property
    def _value_type(self) -> np.dtype:
        return np.dtype(_DTYPES[self.dtype])

    @property
    def _id_type(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<i4")


class TeacherCache:
    """Read access to what `write_teacher_cache` has written.

    Rows are found by the index they have in the packed data, so training may visit them in any
    order and as often as it likes.

    >>> import tempfile
    >>> identity = TeacherIdentity(
    ...     model="a", tokenizer="t", data="d", vocab_size=9, positions=4, k=2, dtype="float32"
    ... )
    >>> def compute(rows):
    ...     two = np.broadcast_to(np.array([3.0, 1.0], np.float32), (len(rows), 4, 2))
    ...     one = np.ones((len(rows), 4), np.float32)
    ...     ids = np.broadcast_to(rows[:, None, None] % 9, two.shape)
    ...     return dict(values=two, indices=ids, log_z=4 * one, mean=0 * one, std=one)
    >>> directory = tempfile.mkdtemp()
    >>> cache = write_teacher_cache(directory, identity, range(5), compute, batch_size=2)
    >>> cache.rows([4, 0])["indices"][:, 0, 0]
    array([4, 0], dtype=int32)
    >>> cache.check(tokenizer="other")
    Traceback (most recent call last):
    ValueError: teacher cache ... does not fit: its tokenizer is 't', not 'other'
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = epath.Path(directory).expanduser()
        self.identity = _read_identity(self.directory)
        parts = _read_parts(self.directory)
        self._reader = ShardReader(self.directory, [part["shard"] for part in parts])
        rows = [row for part in parts for row in _expand(part["rows"])]
        order = np.argsort(np.asarray(rows, np.int64), kind="stable")
        self._rows, self._places = np.asarray(rows, np.int64)[order], order

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({os.fspath(self.directory)!r}, {len(self)} rows, "
            f"top {self.identity.k} of {self.identity.model})"
        )

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    def check(self, **expected: Any) -> None:
        """Raise unless the identity has these values (``k``: at least so many).

        Raises:
          ValueError: names every field that differs, with both values.
        """
        _check(self.directory, self.identity, expected)

    def missing(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> np.ndarray:
        """Which of these rows the cache does not hold, ascending; -1 is never missing."""
        wanted = np.unique(np.asarray(rows, np.int64))
        return np.setdiff1d(wanted[wanted >= 0], self._rows)

    def rows(self, indices: Sequence[int] | Int[np.ndarray, " batch"]) -> Statistics:
        """The fields of `losses.GraphStatistics` for a batch's rows.

        Args:
          indices: ``[batch]`` row indices of the packed data, as ``batch["row"]`` has them; -1
            gives zeros.

        Returns:
          ``values`` (float32) and ``indices`` (int32), both ``[batch, positions, k]``; ``log_z``,
          ``mean`` and ``std``, float32 ``[batch, positions]``.

        Raises:
          ValueError: the cache lacks a row.
        """
        indices = np.asarray(indices, np.int64)
        lacking = self.missing(indices)
        if len(lacking):
            raise ValueError(
                f"teacher cache {self.directory} lacks {len(lacking)} of the rows asked for, "
                f"such as {lacking[0]}: let the teacher read them first"
            )
        real = np.flatnonzero(indices >= 0)
        places = self._places[np.searchsorted(self._rows, indices[real])]
        out = _empty(self.identity, len(indices))
        for slot, record in zip(real, self._reader.read(places.tolist()), strict=True):
            for name, value in _decode(self.identity, record).items():
                out[name][slot] = value
        return out


def write_teacher_cache(
    directory: str | os.PathLike[str],
    identity: TeacherIdentity,
    rows: Sequence[int] | Int[np.ndarray, " rows"],
    compute: Callable[[np.ndarray], Any],
    *,
    batch_size: int,
    rows_per_shard: int = 256,
    process_index: int = 0,
    process_count: int = 1,
) -> TeacherCache:
    """Let a teacher read rows once; rows that the directory already holds are not read again.

    Each process writes shards of its own and needs no other; a shard counts once it is complete,
    so a killed run loses at most the one it was at, and the same call goes on from there. More rows
    can be added later. With several processes, wait for all of them before using the result.

    Args:
      directory: where the cache is or will be; may be remote.
      identity: what it is made from.
      rows: indices into the packed data.
      compute: ``rows [batch_size] -> `` a mapping or object with the fields of
        `losses.GraphStatistics`, ``[batch_size, positions, k]`` and ``[batch_size, positions]``.
        Always called with ``batch_size`` rows, so that it compiles once.
      batch_size: rows a call.
      rows_per_shard: rows a file, and what a kill can lose.
      process_index: which share of the shards to write.
      process_count: among how many.

    Returns:
      The cache as it is on disk now.

    Raises:
      ValueError: the directory holds a cache of something else (says what differs), or ``compute``
        returns other shapes.
    """
    root = epath.Path(directory).expanduser()
    if (root / MANIFEST).exists():
        _check(root, _read_identity(root), dataclasses.asdict(identity), exact=True)
    else:
        root.mkdir(parents=True, exist_ok=True)
        record = {"format": _FORMAT} | dataclasses.asdict(identity)
        replace_atomically(root / MANIFEST, json.dumps(record, indent=1).encode())
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
            identity.model,
            count,
            count * identity.bytes_per_row / 1e6,
            len(wanted),
            len(wanted) * identity.bytes_per_row / 1e6,
        )
    with tqdm(total=count, desc=identity.model, unit=" rows", disable=None) as bar:
        done = 0
        for chunk in todo:
            _write_shard(root, identity, chunk, compute, batch_size, bar)
            done += len(chunk)
            # A disabled bar does not count.
            if bar.disable:
                logging.info("%s: %d of %d rows read", identity.model, done, count)
    return TeacherCache(root)


def _write_shard(
    root: epath.Path,
    identity: TeacherIdentity,
    chunk: np.ndarray,
    compute: Callable[[np.ndarray], Any],
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
        try:
            for start in range(0, len(chunk), batch_size):
                real = chunk[start : start + batch_size]
                for record in _encode(identity, compute(np.resize(real, batch_size)), len(real)):
                    writer.write(record)
                bar.update(len(real))
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


def _encode(identity: TeacherIdentity, said: Any, count: int) -> list[bytes]:
    arrays = {
        n: np.asarray(said[n] if isinstance(said, Mapping) else getattr(said, n)) for n in FIELDS
    }
    shape = (identity.positions, identity.k)
    for name, array in arrays.items():
        expected = shape if name in ("values", "indices") else shape[:1]
        if array.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected [batch, {', '.join(map(str, expected))}], got {array.shape}"
            )
    # Log-probabilities need less of a short type's range than logits do.
    log_p = arrays["values"].astype(np.float32) - arrays["log_z"][..., None].astype(np.float32)
    values = log_p.astype(identity._value_type)
    ids = arrays["indices"].astype(identity._id_type)
    rest = [arrays[name].astype("<f4") for name in FIELDS[2:]]
    return [b"".join(a[i].tobytes() for a in (values, ids, *rest)) for i in range(count)]


def _decode(identity: TeacherIdentity, record: bytes) -> Statistics:
    if len(record) != identity.bytes_per_row:
        raise ValueError(f"damaged record: {len(record)} bytes instead of {identity.bytes_per_row}")
    shape = (identity.positions, identity.k)
    entries = identity.positions * identity.k
    begin = entries * identity._value_type.itemsize
    end = begin + entries * identity._id_type.itemsize
    log_p = np.frombuffer(record[:begin], identity._value_type).reshape(shape)
    ids = np.frombuffer(record[begin:end], identity._id_type).reshape(shape)
    log_z, mean, std = np.frombuffer(record[end:], "<f4").reshape(3, identity.positions)
    values = log_p.astype(np.float32) + log_z[:, None]
    return dict(values=values, indices=ids, log_z=log_z, mean=mean, std=std)


def _empty(identity: TeacherIdentity, count: int) -> Statistics:
    shape = (count, identity.positions)
    out: Statistics = {name: np.zeros(shape, np.float32) for name in FIELDS[2:]}
    out["values"] = np.zeros((*shape, identity.k), np.float32)
    out["indices"] = np.zeros((*shape, identity.k), np.int32)
    return out


def _ranges(rows: np.ndarray) -> list[list[int]]:
    """Ascending indices as half-open runs."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(rows, cuts)]


def _expand(ranges: Sequence[Sequence[int]]) -> list[int]:
    return [row for start, stop in ranges for row in range(start, stop)]


def _read_identity(root: epath.Path) -> TeacherIdentity:
    path = root / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"no teacher cache in {root} (it has no {MANIFEST})")
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != _FORMAT:
            raise ValueError("another format")
        return TeacherIdentity(**record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete {root} and let the teacher read again"
        ) from None


def _read_parts(root: epath.Path) -> list[dict]:
    names = sorted(p.name for p in root.iterdir() if re.fullmatch(r"part-.*\.json", p.name))
    return [json.loads((root / name).read_text()) for name in names]


def _check(
    root: epath.Path, held: TeacherIdentity, expected: Mapping[str, Any], *, exact: bool = False
) -> None:
    wrong = []
    for name, value in expected.items():
        has = getattr(held, name)
        if has == value or (name == "k" and not exact and has >= value):
            continue
        wrong.append(f"its {name} is {has!r}, not {value!r}")
    if wrong:
        raise ValueError(f"teacher cache {root} does not fit: {'; '.join(wrong)}")
