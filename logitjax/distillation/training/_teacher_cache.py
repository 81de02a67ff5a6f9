import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int

from logitjax.storage import ArrayCodec, Manifest, RowCache

# Stored in float32, unlike the lists.
_MOMENTS = ("log_z", "mean", "std")
_LIKELIHOODS = ("label", "boundary")
KIND = "teacher cache"
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Statistics = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Everything that a cache is made from. Losses may use a cache only if all of it matches.

    Attributes:
        model: the teacher, as the user specified it.
        tokenizer, data: fingerprints of the teacher's tokenizer and of the packed rows.
        vocab_size, positions, k: size of its vocabulary, positions per row, logits per position.
        dtype: type of stored log-probabilities: 'float16', 'bfloat16' or 'float32'.
        tail_samples: tokens per position sampled outside the top k, for unbiased divergences.
        likelihoods: whether it keeps log-probabilities of each label and of a word's beginning in
            its place, 8 bytes per position, for `alm`.
        rest: whether it keeps the log-normaliser, mean and deviation of all logits. Otherwise, only
            losses that compare the top logits alone may use it.
        weights: digest of the teacher's weights; empty if unknown.
    """

    model: str
    tokenizer: str
    data: str
    vocab_size: int
    positions: int
    k: int
    dtype: str = "float16"
    tail_samples: int = 0
    likelihoods: bool = False
    rest: bool = True
    weights: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not 1 <= self.k <= self.vocab_size:
            raise ValueError(
                f"k: expected a number in 1..{self.vocab_size}, the vocabulary, got {self.k}"
            )
        if self.tail_samples < 0:
            raise ValueError(f"tail_samples: expected at least 0, got {self.tail_samples}")
        # Samples stand for the mass beyond the top k, which requires the normaliser.
        if self.tail_samples and not self.rest:
            raise ValueError(f"tail_samples: expected 0 without rest, got {self.tail_samples}")

    @property
    def bytes_per_row(self) -> int:
        """Size of one row on disk."""
        return _Codec(self).bytes_per_row


class _Codec:
    """Store log-probabilities (logits without the rest) in a short type, ids in the shortest."""

    def __init__(self, identity: TeacherIdentity):
        # uint16 takes half the bytes.
        id_type = np.uint16 if identity.vocab_size <= 1 << 16 else np.int32
        sizes = {"": identity.k, "tail_": identity.tail_samples}
        # Entries per position of each list, in the stored order.
        self.entries = {
            f"{prefix}{name}": size
            for prefix, size in sizes.items()
            if size
            for name in ("values", "indices")
        }
        lists = {
            name: (
                id_type if name.endswith("indices") else _DTYPES[identity.dtype],
                (identity.positions, size),
            )
            for name, size in self.entries.items()
        }
        self.normalised = identity.rest
        names = (
            *(_MOMENTS if identity.rest else ()),
            *(_LIKELIHOODS if identity.likelihoods else ()),
        )
        moments = dict.fromkeys(names, (np.float32, (identity.positions,)))
        self._arrays = ArrayCodec({**lists, **moments})
        self.bytes_per_row = self._arrays.bytes_per_row

    def encode(self, computed: Any, count: int) -> list[bytes]:
        arrays = {
            n: np.asarray(computed[n] if isinstance(computed, Mapping) else getattr(computed, n))
            for n in self._arrays.fields
        }
        for name, array in arrays.items():
            if name.endswith("values") and array.ndim == 3 and self.normalised:
                # Log-probabilities need less of a short type's range than logits do.
                arrays[name] = array.astype(np.float32) - arrays["log_z"][..., None]
        return self._arrays.encode(arrays, count)

    def decode(self, records: Sequence[bytes]) -> Statistics:
        out = self._arrays.decode(records)
        for name in self.entries:
            if name.endswith("values"):
                out[name] = out[name].astype(np.float32)
                if self.normalised:
                    out[name] += out["log_z"][..., None]
            else:
                out[name] = out[name].astype(np.int32)
        return out


class TeacherCache(RowCache):
    """A teacher's output on rows of packed data, by row number.

    Training may visit rows in any order, any number of times. `fill` lets the teacher read missing
    rows; its `compute` returns a mapping or an object with the fields of `losses.GraphStatistics`,
    `[batch_size, positions, k]` and `[batch_size, positions]`, and, with `tail_samples`,
    `tail_values` and `tail_indices`.

    >>> import tempfile
    >>> identity = TeacherIdentity(
    ...     model="a", tokenizer="t", data="d", vocab_size=9, positions=4, k=2, dtype="float32"
    ... )
    >>> def compute(rows):
    ...     two = np.broadcast_to(np.array([3.0, 1.0], np.float32), (len(rows), 4, 2))
    ...     one = np.ones((len(rows), 4), np.float32)
    ...     ids = np.broadcast_to(rows[:, None, None] % 9, two.shape)
    ...     return dict(values=two, indices=ids, log_z=4 * one, mean=0 * one, std=one)
    >>> cache = TeacherCache(tempfile.mkdtemp(), identity)
    >>> cache.fill(range(5), compute, batch_size=2)
    >>> cache.read([4, 0])["indices"][:, 0, 0]
    array([4, 0], dtype=int32)
    >>> cache.check(tokenizer="other")
    Traceback (most recent call last):
    ValueError: teacher cache ... does not fit: its tokenizer is 't', not 'other' ...

    Args:
        directory: As of `RowCache`, with its errors.
        identity: Inputs it is made from; needed to begin a cache that does not exist.
    """

    # A loss may use fewer logits than are stored.
    _at_least = ("k", "tail_samples", "likelihoods", "rest")

    def __init__(self, directory: str | os.PathLike[str], identity: TeacherIdentity | None = None):
        if identity is None:
            identity = TeacherIdentity(**Manifest(directory, KIND).read()["made_from"])
        self.identity = identity
        codec = _Codec(identity)
        self._entries = codec.entries
        made_from = dataclasses.asdict(identity)
        if not identity.weights:
            # Caches of earlier versions do not have it.
            del made_from["weights"]
        super().__init__(directory, codec, made_from=made_from, kind=KIND)

    def __repr__(self) -> str:
        return (
            f"TeacherCache({os.fspath(self.directory)!r}, {len(self)} rows, "
            f"top {self.identity.k} of {self.identity.model})"
        )

    @property
    def vocab_size(self) -> int:
        return self.identity.vocab_size

    def read(self, rows: Sequence[int] | Int[np.ndarray, " batch"]) -> Statistics:
        """Read the fields of `losses.GraphStatistics` for a batch's rows.

        Args:
            rows: `[batch]` row numbers in the packed data, such as `batch["row"]`; -1 gives zeros.

        Returns:
            `values` (float32) and `indices` (int32), both `[batch, positions, k]`; with `rest`
            `log_z`, `mean` and `std`, float32 `[batch, positions]`; with `tail_samples` also
            `tail_values` and `tail_indices`, the fields of `losses.TailSample`; with `likelihoods`
            `label` and `boundary`, float32 `[batch, positions]`.

        Raises:
            ValueError: The cache lacks a row.
        """
        rows = np.asarray(rows, np.int64)
        real = rows >= 0
        stored: Statistics = super().read(rows[real])
        if real.all():
            return stored
        out = {name: np.zeros((len(rows), *a.shape[1:]), a.dtype) for name, a in stored.items()}
        for name, array in stored.items():
            out[name][real] = array
        return out
