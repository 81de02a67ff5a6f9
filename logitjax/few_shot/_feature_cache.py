"""Image features on disk: features of every view, logits and classes, and their extraction."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Int

from logitjax import data, vision
from logitjax.ops import checks
from logitjax.storage import ArrayCodec, Manifest, RowCache

_KIND = "feature cache"
_NAMES_OF = {
    "encoder": "encoder_fingerprint",
    "data": "data_fingerprint",
    "class_names": "data_fingerprint",
}
# Little-endian on every machine.
_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """Everything that a cache was made from, and the contents of a row.

    Attributes:
        encoder_fingerprint: a hash of the encoder's weights.
        preprocessing: conversion of colours to inputs.
        views: scaling and cropping of pictures (``str`` of `ImageViews`).
        data: the pictures' source.
        num_logits: number of logits per view; 0 if the encoder has no class head.
        compute_dtype: type in which the encoder computed.
        dtype: type of features and logits on disk, 'float32' or 'float16'.
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
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {self.dtype!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Rows of a cache: numpy arrays when read; arrays that may still be computing when written.

    Attributes:
        features: float32 ``[rows, views, num_features]``.
        logits: float32 ``[rows, views, num_logits]``, or None.
        labels: int32 ``[rows]``.
    """

    features: Any
    logits: Any
    labels: Any


class _Codec:
    """Features and logits of a view side by side in a short type, and the class."""

    def __init__(self, identity: FeatureIdentity):
        self._identity = identity
        self._sizes = {"features": identity.num_features, "logits": identity.num_logits}
        # `[views, features + logits]`.
        numbers = (identity.num_views, sum(self._sizes.values()))
        self._arrays = ArrayCodec(
            {"label": (np.int32, ()), "numbers": (_DTYPES[identity.dtype], numbers)}
        )
        self.bytes_per_row = self._arrays.bytes_per_row

    def encode(self, computed: Features, count: int) -> list[bytes]:
        parts = []
        for name, size in self._sizes.items():
            value = getattr(computed, name)
            if value is None and not size:
                # The encoder has no classifier.
                continue
            shape = () if value is None else np.shape(value)
            if shape[1:] != (self._identity.num_views, size):
                expected = f"[batch, {self._identity.num_views}, {size}]"
                raise ValueError(f"{name}: expected {expected}, got {shape}")
            parts.append(np.asarray(value, np.float32))
        labels = np.asarray(computed.labels)[:count]
        checks.ids(labels, len(self._identity.class_names), "labels")
        # The last batch is padded.
        numbers = np.concatenate(parts, -1)[:count]
        # The largest float16 is 65504: checked below.
        with np.errstate(over="ignore"):
            stored = numbers.astype(_DTYPES[self._identity.dtype])
        if not np.isfinite(stored).all():
            raise ValueError(
                f"features: expected values that {self._identity.dtype} holds, got up to "
                f"{np.abs(numbers).max():g} from {self._identity.encoder}"
            )
        return self._arrays.encode({"label": labels, "numbers": stored}, count)

    def decode(self, records: Sequence[bytes]) -> Features:
        stored = self._arrays.decode(records)
        numbers, cut = stored["numbers"].astype(np.float32), self._sizes["features"]
        logits = numbers[..., cut:] if self._sizes["logits"] else None
        return Features(features=numbers[..., :cut], logits=logits, labels=stored["label"])


class FeatureCache(RowCache):
    """Features of pictures by one encoder, indexed by their number in the image set.

    `fill` encodes missing pictures (`compute` returns `Features`), `read` keeps the order.

    >>> import tempfile
    >>> identity = FeatureIdentity(
    ...     encoder="net", encoder_fingerprint="n", preprocessing="", views="plain", data="dots",
    ...     data_fingerprint="d", class_names=("a", "b"), num_views=1, num_features=3,
    ... )
    >>> def compute(rows):
    ...     features = np.broadcast_to(rows[:, None, None], (len(rows), 1, 3))
    ...     return Features(features=features, logits=None, labels=rows % 2)
    >>> cache = FeatureCache(tempfile.mkdtemp(), identity)
    >>> cache.fill(range(5), compute, batch_size=2)
    >>> two = cache.read([4, 1])
    >>> two.features[:, 0, 0], two.labels
    (array([4., 1.], dtype=float32), array([0, 1], dtype=int32))
    >>> cache.check(encoder_fingerprint="other")
    Traceback (most recent call last):
    ValueError: feature cache ... does not fit: its encoder_fingerprint is 'n', not 'other' ...

    Args:
        directory: Folder of the cache; errors are those of `RowCache`.
        identity: Inputs that it is made from; creates a cache if there is none. Without it the
            cache must exist. Encoder, data and classes may be renamed if fingerprints are equal.
    """

    def __init__(self, directory: str | os.PathLike[str], identity: FeatureIdentity | None = None):
        made_from = None if identity is None else dataclasses.asdict(identity)
        if identity is None:
            identity = _identity(Manifest(directory, _KIND).read()["made_from"])
        super().__init__(
            directory, _Codec(identity), made_from=made_from, kind=_KIND, names_of=_NAMES_OF
        )
        self.identity = _identity(self.made_from)

    def __repr__(self) -> str:
        contents = f"{self.identity.views} views of {self.identity.data} by {self.identity.encoder}"
        return f"FeatureCache({os.fspath(self.directory)!r}, {len(self)} rows, {contents})"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.identity.class_names

    def read(self, rows: Sequence[int] | Int[np.ndarray, " batch"]) -> Features:
        """Features, logits and labels of rows `[batch]` of the image set."""
        return super().read(rows)

    def all(self) -> Features:
        """Every existing row, in ascending order."""
        return self.read(self.row_numbers)


def _identity(made_from: Mapping[str, Any]) -> FeatureIdentity:
    # A list in JSON.
    return FeatureIdentity(**{**made_from, "class_names": tuple(made_from["class_names"])})


def extract_features(
    encoder: vision.Encoder,
    images: data.ImageSet,
    directory: epath.PathLike,
    *,
    views: data.ImageViews,
    rows: Any = None,
    batch_size: int = 16,
    dtype: str = "float16",
) -> FeatureCache:
    """Encode pictures once with a frozen encoder, and store the features.

    Rows already in the directory are skipped, so a killed call continues when repeated. All views
    of a batch are encoded at once on this process's devices. Processes share the shards.

    Args:
        directory: Folder of the cache: empty, or a cache of the same encoder, pictures and views.
        views: Views of each picture, such as from `data.ImageViews.of`.
        rows: Numbers of the pictures, such as from `ImageSet.choose`; by default all.
        batch_size: Number of pictures encoded together, with all their views.
        dtype: Type on disk.

    Raises:
        TypeError: Rows that are not integers, such as a mask.
        ValueError: The directory contains features of something else (it names the difference), or
            a row does not exist.
    """
    chosen = np.arange(len(images)) if rows is None else np.asarray(rows)
    checks.ids(chosen, len(images), "rows")
    identity = FeatureIdentity(
        encoder=encoder.name,
        encoder_fingerprint=encoder.fingerprint,
        preprocessing=f"mean={encoder.preprocessing.mean} std={encoder.preprocessing.std}",
        views=str(views),
        data=images.source,
        data_fingerprint=images.fingerprint,
        class_names=images.class_names,
        num_views=views.count,
        num_features=encoder.num_features,
        num_logits=encoder.num_classes,
        compute_dtype=encoder.dtype,
        dtype=dtype,
    )
    total = batch_size * views.count
    devices = jax.local_devices()
    # A batch splits evenly.
    used = next(n for n in range(len(devices), 0, -1) if total % n == 0)
    mesh = jax.make_mesh((used,), ("data",), (AxisType.Auto,), devices=devices[:used])
    spread = NamedSharding(mesh, PartitionSpec("data"))
    # Replicated on each device.
    placed = encoder.placed(NamedSharding(mesh, PartitionSpec()))

    def fetch(row: int) -> tuple[np.ndarray, int]:
        picture, label = images[row]
        return views(picture, row=row), label

    # PIL decodes without the GIL.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

        def compute(chunk: np.ndarray) -> Features:
            fetched = list(pool.map(fetch, chunk.tolist()))
            pixels = np.concatenate([picture for picture, _ in fetched])
            features, logits = placed.encode(jax.device_put(pixels, spread))
            # Features or logits are the last axis.
            shape = (len(chunk), views.count, -1)
            # Nothing is waited for: `fill` takes this when the next batch has been dispatched.
            return Features(
                features=features.reshape(shape),
                logits=None if logits is None else logits.reshape(shape),
                labels=np.array([label for _, label in fetched], np.int32),
            )

        cache = FeatureCache(directory, identity)
        cache.fill(
            chosen,
            compute,
            batch_size=batch_size,
            rows_per_shard=256,
            label=encoder.name,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return cache
