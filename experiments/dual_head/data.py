"""Data of the dual-head experiment: arrays of inputs and labels, and augmentation."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.dual_head.config import Config
from experiments.dual_head.images import load_images
from logitjax import data

TEXT_FEATURES = 1024
# Rows of length one would need learning rates that no published schedule has.
SCALE = 8.0
_CIFAR_MEAN, _CIFAR_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs (float32 features or uint8 images) with their classes."""

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task; `mean` and `std` are the images' (0 and 1 for features)."""

    train: Part
    validation: Part
    test: Part
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.train.inputs.shape[1:]


def load_task(config: Config, workdir: epath.Path) -> Task:
    """The three splits; validation is taken from training if the source has none of its own."""
    if config.data == "tfds:udhr":
        limits = {"train": config.train_examples, "validation": 0, "test": config.test_examples}
        parts = {name: _text(name, limit) for name, limit in limits.items()}
        classes, mean, std = 100, (0.0,), (1.0,)
    else:
        options = {"size": config.image_size, "cache_dir": workdir / "images"}
        test_name = "val" if config.data.startswith("folder:") else "test"
        train = load_images(config.data, **options)
        test = load_images(config.data, split=test_name, **options)
        order = np.random.default_rng(0).permutation(len(train))
        held_out = np.sort(order[: config.validation_examples])
        kept = np.sort(order[config.validation_examples :])
        parts = {
            "train": Part(inputs=_rows(train.images, kept), labels=train.labels[kept]),
            "validation": Part(inputs=_rows(train.images, held_out), labels=train.labels[held_out]),
            "test": Part(inputs=test.images, labels=test.labels),
        }
        classes = train.num_classes
        mean, std = _statistics(config.data, parts["train"].inputs)
    limits = {"train": config.train_examples, "test": config.test_examples}
    for name, limit in limits.items():
        if limit and limit < len(parts[name]):
            rows = np.sort(np.random.default_rng(1).permutation(len(parts[name]))[:limit])
            parts[name] = Part(
                inputs=_rows(parts[name].inputs, rows), labels=parts[name].labels[rows]
            )
    return Task(**parts, num_classes=classes, mean=mean, std=std)


def _rows(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # A memory map of ImageNet must not be copied to leave out a few rows.
    return _Subset(images, rows) if isinstance(images, np.memmap) else images[rows]  # type: ignore


class _Subset:
    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows
        self.shape, self.dtype = (len(rows), *array.shape[1:]), array.dtype
        self.nbytes = len(rows) * int(np.prod(array.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.array[self.rows[index]])


def _statistics(spec: str, images: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if spec.startswith("cifar100:"):
        return _CIFAR_MEAN, _CIFAR_STD
    if spec.startswith("folder:"):
        return _IMAGENET_MEAN, _IMAGENET_STD
    sample = images[: min(len(images), 10_000)] / 255.0
    axes = (0, 1, 2)
    return (tuple(float(x) for x in sample.mean(axes)), tuple(float(x) for x in sample.std(axes)))


def _text(split: str, limit: int) -> Part:
    # tfds shuffled the examples when it wrote them, so the first ones are a fair sample.
    examples = data.load_examples(
        "tfds:experiments.dual_head.udhr:Udhr", split=f"{split}[:{limit}]" if limit else split
    )
    texts = [example["text"] for example in examples]
    # The builder imports tfds, which pictures do not need.
    from experiments.dual_head.udhr import LANGUAGES

    number = {code: i for i, code in enumerate(LANGUAGES)}
    labels = np.array([number[example["language"]] for example in examples], np.int32)
    return Part(inputs=hashed_ngrams(texts), labels=labels)


def hashed_ngrams(texts: list[str], *, features: int = TEXT_FEATURES) -> np.ndarray:
    """Counts of hashed runs of one to three characters, each row scaled to one length."""
    width = max(map(len, texts))
    codes = np.zeros((len(texts), width), np.uint64)
    for row, text in enumerate(texts):
        codes[row, : len(text)] = [ord(c) for c in text]
    counts = np.zeros(len(texts) * features, np.float32)
    offset = np.arange(len(texts), dtype=np.uint64)[:, None] * np.uint64(features)
    prime = np.uint64(0x9E3779B97F4A7C15)
    for n in (1, 2, 3):
        value = np.full((len(texts), width - n + 1), n, np.uint64)
        for i in range(n):
            value = (value ^ codes[:, i : width - n + 1 + i]) * prime
            value ^= value >> np.uint64(29)
        index = offset + value % np.uint64(features)
        counts += np.bincount(index.ravel().astype(np.int64), minlength=counts.size)
    rows = counts.reshape(len(texts), features)
    return SCALE * rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A task on a mesh: its training rows on every device, or in pieces if there are too many.

    Attributes:
        arrays: Inputs and labels on every device; None if they arrive in pieces.
        chunk_steps: Steps in a piece.
    """

    task: Task
    mesh: Mesh
    arrays: tuple[Any, Any] | None
    chunk_steps: int = 256

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def pieces(self, order: np.ndarray, key: jax.Array) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Inputs, labels, `[steps, batch]` rows of them and a key, for each piece of an epoch."""
        put = functools.partial(jax.device_put, device=self.replicated)
        if self.arrays is not None:
            yield *self.arrays, put(order), key
            return
        train = self.task.train
        for start in range(0, len(order), self.chunk_steps):
            part = order[start : start + self.chunk_steps]
            rows = np.arange(part.size).reshape(part.shape)
            inputs, labels = train.inputs[part.ravel()], train.labels[part.ravel()]
            yield put(inputs), put(labels), put(rows), jax.random.fold_in(key, start)


def fits_on_device(task: Task, device_bytes: int = 4 << 30) -> bool:
    """Whether every device holds all training rows; otherwise they stay on the host."""
    return task.train.inputs.nbytes <= device_bytes


def place(task: Task, mesh: Mesh) -> Placed:
    """The task with its training rows on every device, if there is room."""
    if not fits_on_device(task):
        return Placed(task=task, mesh=mesh, arrays=None)
    arrays = np.asarray(task.train.inputs[:]), np.asarray(task.train.labels)
    return Placed(task=task, mesh=mesh, arrays=jax.device_put(arrays, NamedSharding(mesh, P())))


def prepare_inputs(task: Task, kind: str) -> Callable[[Any, jax.Array | None], jax.Array]:
    """Turn raw rows into a network's inputs, augmented if a key is given; runs under jit.

    `crop_flip` pads by 4, cuts out a random place and mirrors half of the images, as on CIFAR;
    `resized_crop` takes 8 to 100% of the area at an aspect ratio of 3/4 to 4/3, as on ImageNet.
    """

    def run(rows: Any, key: jax.Array | None) -> jax.Array:
        x = jnp.asarray(rows, jnp.float32)
        if x.ndim == 2:
            return x
        if key is not None and kind == "crop_flip":
            x = _crop_flip(x, key)
        elif key is not None and kind == "resized_crop":
            x = _resized_crop(x, key)
        return (x / 255.0 - jnp.array(task.mean)) / jnp.array(task.std)

    return run


def _flip(images: jax.Array, key: jax.Array) -> jax.Array:
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def _crop_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 9)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return _flip(jax.vmap(cut)(padded, corners), flip_key)


def _resized_crop(images: jax.Array, key: jax.Array) -> jax.Array:
    area_key, ratio_key, place_key, flip_key = jax.random.split(key, 4)
    count, height, width, _ = images.shape
    area = jax.random.uniform(area_key, (count,), minval=0.08, maxval=1.0)
    ratio = jnp.exp(
        jax.random.uniform(ratio_key, (count,), minval=-1.0, maxval=1.0) * np.log(4 / 3)
    )
    sides = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], -1)
    sides = jnp.minimum(sides, 1.0) * jnp.array([height, width])
    room = jnp.array([height, width]) - sides
    corners = jax.random.uniform(place_key, (count, 2)) * room

    def cut(image: jax.Array, side: jax.Array, corner: jax.Array) -> jax.Array:
        scale = jnp.array([height, width]) / side
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, "linear", antialias=True
        )

    return _flip(jax.vmap(cut)(images, sides, corners), flip_key)
