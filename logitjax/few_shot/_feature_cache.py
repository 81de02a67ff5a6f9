"""What an encoder makes of pictures, on disk: features of every view, logits, and the classes."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from logitjax.storage import _row_cache

MANIFEST = "features.json"
_NOUN = "feature cache"
_NAMES_OF = {
    "encoder": "encoder_fingerprint",
    "data": "data_fingerprint",
    "class_names": "data_fingerprint",
}
_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """What a cache was made from and what a row holds.

    Attributes:
      encoder: its name.
      encoder_fingerprint: a hash of its weights.
      preprocessing: how colours become inputs.
      views: how pictures were scaled and cut (``str`` of `ImageViews`).
      data: the pictures' source.
      data_fingerprint: of the pictures.
      class_names: by class number.
      num_views: a row.
      num_features: a view.
      num_logits: a view; 0 where the encoder has no class head.
      compute_dtype: what the encoder computed in.
      dtype: 'float32' or 'float16': how both are stored.
    """

    encoder: str
    encoder_fingerprint: str
    preprocessing: str
    views: str
    data: str
    data_fingerprint: str
    class_names: tuple[str, ...]
    num_views: int
    num_features: int
    num_logits: int = 0
    compute_dtype: str = "float32"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    @property
    def bytes_per_row(self) -> int:
        """Size of one row on disk."""
        return self._layout.itemsize

    @property
    def _layout(self) -> np.dtype:
        shape = (self.num_views, self.num_features + self.num_logits)
        return np.dtype([("label", "<i4"), ("numbers", _DTYPES[self.dtype], shape)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Rows of a cache: numpy arrays when read; when written, arrays that are still being computed.

    Attributes:
      features: float32 ``[rows, views, num_features]``.
      logits: float32 ``[rows, views, num_logits]``, or None.
      labels: int32 ``[rows]``.
    """

    features: Any
    logits: Any
    labels: Any


class FeatureCache:
    """Read access to what `write_feature_cache` has written.

    >>> import tempfile
    >>> identity = FeatureIdentity(
    ...     encoder="net", encoder_fingerprint="n", preprocessing="", views="plain", data="dots",
    ...     data_fingerprint="d", class_names=("a", "b"), num_views=1, num_features=3,
    ... )
    >>> def compute(rows):
    ...     features = np.broadcast_to(rows[:, None, None], (len(rows), 1, 3))
    ...     return Features(features=features, logits=None, labels=rows % 2)
    >>> cache = write_feature_cache(tempfile.mkdtemp(), identity, range(5), compute, batch_size=2)
    >>> found = cache.rows([4, 1])
    >>> found.features[:, 0, 0], found.labels
    (array([4., 1.], dtype=float32), array([0, 1], dtype=int32))
    >>> cache.check(encoder_fingerprint="other")
    Traceback (most recent call last):
    ValueError: feature cache ... does not fit: its encoder_fingerprint is 'n', not 'other'
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = epath.Path(directory).expanduser()
        self.identity: FeatureIdentity = _row_cache.read_manifest(
            self.directory, MANIFEST, FeatureIdentity, _NOUN
        )
        self._reader = _row_cache.RowReader(self.directory, _NOUN)

    def __len__(self) -> int:
        return len(self._reader)

    def __repr__(self) -> str:
        made = f"{self.identity.views} views of {self.identity.data} by {self.identity.encoder}"
        return f"FeatureCache({os.fspath(self.directory)!r}, {len(self)} rows, {made})"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.identity.class_names

    @property
    def row_numbers(self) -> np.ndarray:
        """The rows there are, ascending."""
        return self._reader.held

    def check(self, **expected: Any) -> None:
        """Raise unless the identity has these values.

        Raises:
          ValueError: names every field that differs, with both values.
        """
        _row_cache.check_identity(self.directory, self.identity, expected, _NOUN)

    def missing(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> np.ndarray:
        """Which of these rows the cache does not hold, ascending."""
        return self._reader.missing(rows)

    def rows(self, indices: Sequence[int] | Int[np.ndarray, " batch"]) -> Features:
        """Features, logits and labels of rows.

        Args:
          indices: ``[batch]`` rows of the image set.

        Returns:
          The `Features`, in the order asked for.

        Raises:
          ValueError: the cache lacks a row.
        """
        records = self._reader.read(indices, "extract them first")
        who = self.identity
        layout = who._layout
        damaged = next((r for r in records if len(r) != layout.itemsize), None)
        if damaged is not None:
            raise ValueError(f"damaged record: {len(damaged)} bytes instead of {layout.itemsize}")
        stored = np.frombuffer(b"".join(records), layout)
        numbers = stored["numbers"].astype(np.float32)
        labels = stored["label"].astype(np.int32)
        logits = numbers[..., who.num_features :] if who.num_logits else None
        return Features(features=numbers[..., : who.num_features], logits=logits, labels=labels)

    def all(self) -> Features:
        """Every row there is, in ascending order."""
        return self.rows(self.row_numbers)


def write_feature_cache(
    directory: str | os.PathLike[str],
    identity: FeatureIdentity,
    rows: Sequence[int] | Int[np.ndarray, " rows"],
    compute: Callable[[np.ndarray], Features],
    *,
    batch_size: int,
    rows_per_shard: int = 256,
    process_index: int = 0,
    process_count: int = 1,
) -> FeatureCache:
    """Encode pictures once; rows that the directory already holds are not encoded again.

    Each process writes shards of its own and needs no other; a shard counts once it is complete,
    so a killed run loses at most the one it was at, and the same call goes on from there. With
    several processes, wait for all of them before using the result.

    Args:
      directory: where the cache is or will be; may be remote.
      identity: what it is made from.
      rows: of the image set.
      compute: ``rows [batch_size] -> Features``. Always called with ``batch_size`` rows, so that it
        compiles once.
      batch_size: rows a call.
      rows_per_shard: rows a file, and what a kill can lose.
      process_index: which share of the shards to write.
      process_count: among how many.

    Returns:
      The cache as it is on disk now.

    Raises:
      ValueError: the directory holds a cache of something else (says what differs; encoder, data
        and classes may have other names if their fingerprints are the same), or ``compute`` returns
        other shapes.
    """
    root = epath.Path(directory).expanduser()
    _row_cache.write_manifest(root, MANIFEST, identity, _NOUN, names_of=_NAMES_OF)
    _row_cache.write_rows(
        root,
        rows,
        compute,
        lambda computed, count: _encode(identity, computed, count),
        batch_size=batch_size,
        rows_per_shard=rows_per_shard,
        label=identity.encoder,
        bytes_per_row=identity.bytes_per_row,
        process_index=process_index,
        process_count=process_count,
    )
    return FeatureCache(root)


def _encode(identity: FeatureIdentity, found: Features, count: int) -> list[bytes]:
    sizes = {"features": identity.num_features, "logits": identity.num_logits}
    parts = []
    for name, size in sizes.items():
        value = getattr(found, name)
        if value is None and not size:
            continue
        shape = () if value is None else np.shape(value)
        if shape[1:] != (identity.num_views, size):
            raise ValueError(f"{name}: expected [batch, {identity.num_views}, {size}], got {shape}")
        parts.append(np.asarray(value, np.float32))
    numbers = np.concatenate(parts, -1)[:count]
    stored = np.zeros(count, identity._layout)
    with np.errstate(over="ignore"):
        stored["numbers"] = numbers
    if not np.isfinite(stored["numbers"]).all():
        raise ValueError(
            f"{identity.encoder}: values up to {np.abs(numbers).max():g} cannot be stored as "
            f"{identity.dtype}"
        )
    stored["label"] = found.labels[:count]
    return [row.tobytes() for row in stored]
