"""What a teacher says about packed rows, on disk: top logits and what makes them probabilities."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from jaxtyping import Int

from logitjax.storage import _row_cache

MANIFEST = "teacher.json"
_MOMENTS = ("log_z", "mean", "std")
_NOUN = "teacher cache"
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
      tail_samples: tokens a position drawn from outside the top k, for an unbiased estimate of
        divergences; 0 for none.
    """

    model: str
    tokenizer: str
    data: str
    vocab_size: int
    positions: int
    k: int
    dtype: str = "float16"
    tail_samples: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.k <= self.vocab_size:
            raise ValueError(f"k must be in 1..{self.vocab_size}, the vocabulary, got {self.k}")
        if self.tail_samples < 0:
            raise ValueError(f"tail_samples must not be negative, got {self.tail_samples}")

    @property
    def bytes_per_row(self) -> int:
        """Size of one row on disk."""
        entry = self._value_type.itemsize + self._id_type.itemsize
        return self.positions * ((self.k + self.tail_samples) * entry + 3 * 4)

    @property
    def _fields(self) -> dict[str, int]:
        """Name and entries a position of what is log-probabilities or ids, in the stored order."""
        fields = {"values": self.k, "indices": self.k}
        if self.tail_samples:
            fields |= dict.fromkeys(("tail_values", "tail_indices"), self.tail_samples)
        return fields

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
        self.identity: TeacherIdentity = _row_cache.read_manifest(
            self.directory, MANIFEST, TeacherIdentity, _NOUN
        )
        self._reader = _row_cache.RowReader(self.directory, _NOUN)

    def __len__(self) -> int:
        return len(self._reader)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({os.fspath(self.directory)!r}, {len(self)} rows, "
            f"top {self.identity.k} of {self.identity.model})"
        )

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    def check(self, **expected: Any) -> None:
        """Raise unless the identity has these values (``k``, ``tail_samples``: at least so many).

        Raises:
          ValueError: names every field that differs, with both values.
        """
        _row_cache.check_identity(
            self.directory, self.identity, expected, _NOUN, at_least=("k", "tail_samples")
        )

    def missing(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> np.ndarray:
        """Which of these rows the cache does not hold, ascending; -1 is never missing."""
        return self._reader.missing(rows)

    def rows(self, indices: Sequence[int] | Int[np.ndarray, " batch"]) -> Statistics:
        """The fields of `losses.GraphStatistics` for a batch's rows.

        Args:
          indices: ``[batch]`` row indices of the packed data, as ``batch["row"]`` has them; -1
            gives zeros.

        Returns:
          ``values`` (float32) and ``indices`` (int32), both ``[batch, positions, k]``; ``log_z``,
          ``mean`` and ``std``, float32 ``[batch, positions]``; with ``tail_samples`` also
          ``tail_values`` and ``tail_indices``, the fields of `losses.TailSample`.

        Raises:
          ValueError: the cache lacks a row.
        """
        indices = np.asarray(indices, np.int64)
        real = np.flatnonzero(indices >= 0)
        records = self._reader.read(indices[real], "let the teacher read them first")
        out = _empty(self.identity, len(indices))
        for slot, record in zip(real, records, strict=True):
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
        `losses.GraphStatistics`, ``[batch_size, positions, k]`` and ``[batch_size, positions]``,
        and, with ``tail_samples``, ``tail_values`` and ``tail_indices``.
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
    _row_cache.write_manifest(root, MANIFEST, identity, _NOUN)
    _row_cache.write_rows(
        root,
        rows,
        compute,
        lambda computed, count: _encode(identity, computed, count),
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        label=identity.model,
        bytes_per_row=identity.bytes_per_row,
        process_index=process_index,
        process_count=process_count,
    )
    return TeacherCache(root)


def _encode(identity: TeacherIdentity, said: Any, count: int) -> list[bytes]:
    lists = identity._fields
    arrays = {
        n: np.asarray(said[n] if isinstance(said, Mapping) else getattr(said, n))
        for n in (*lists, *_MOMENTS)
    }
    for name, array in arrays.items():
        expected = (identity.positions, lists[name]) if name in lists else (identity.positions,)
        if array.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected [batch, {', '.join(map(str, expected))}], got {array.shape}"
            )
    parts = []
    for name, array in arrays.items():
        if name in _MOMENTS:
            parts.append(array.astype("<f4"))
        elif name.endswith("indices"):
            parts.append(array.astype(identity._id_type))
        else:
            # Log-probabilities need less of a short type's range than logits do.
            log_p = array.astype(np.float32) - arrays["log_z"][..., None].astype(np.float32)
            parts.append(log_p.astype(identity._value_type))
    return [b"".join(a[i].tobytes() for a in parts) for i in range(count)]


def _decode(identity: TeacherIdentity, record: bytes) -> Statistics:
    if len(record) != identity.bytes_per_row:
        raise ValueError(f"damaged record: {len(record)} bytes instead of {identity.bytes_per_row}")
    out: Statistics = {}
    begin = 0
    for name, entries in identity._fields.items():
        kind = identity._id_type if name.endswith("indices") else identity._value_type
        end = begin + identity.positions * entries * kind.itemsize
        out[name] = np.frombuffer(record[begin:end], kind).reshape(identity.positions, entries)
        begin = end
    moments = np.frombuffer(record[begin:], "<f4").reshape(len(_MOMENTS), identity.positions)
    out |= dict(zip(_MOMENTS, moments, strict=True))
    for name in identity._fields:
        if name.endswith("values"):
            out[name] = out[name].astype(np.float32) + out["log_z"][:, None]
    return out


def _empty(identity: TeacherIdentity, count: int) -> Statistics:
    shape = (count, identity.positions)
    out: Statistics = {name: np.zeros(shape, np.float32) for name in _MOMENTS}
    for name, entries in identity._fields.items():
        kind = np.int32 if name.endswith("indices") else np.float32
        out[name] = np.zeros((*shape, entries), kind)
    return out
