"""What the few-shot experiment learns from: features of two encoders, and samples of pictures."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import _features, _few_shot_synsets
from logitjax import data, heads
from logitjax.models import vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures come from and how the zero-shot classifier names them.

    Attributes:
      data: of :func:`logitjax.data.load_image_set`.
      train: the split that is sampled from.
      test: the split to score on; None where the rest of ``train`` is.
      fit: what a square loses or gains, ``'crop'`` or ``'pad'``.
      size: of the views; 0 takes each encoder's own.
      synsets: ImageNet classes of every class, for encoders with an ImageNet head.
      cosine: score by cosines with the mean weights of those classes, not by their probability.
    """

    data: str
    train: str = "all"
    test: str | None = None
    fit: str = "crop"
    size: int = 0
    synsets: Mapping[str, str] | None = None
    cosine: bool = False


SOURCES: dict[str, Source] = {
    "stamps": Source(data="stamps", fit="pad", size=160, synsets=_few_shot_synsets.STAMPS),
    "fashion": Source(
        data="tfds:fashion_mnist_png",
        train="train[:500]",
        test="test[:2000]",
        size=96,
        synsets=_few_shot_synsets.FASHION,
        cosine=True,
    ),
}
# CLIP's eleven, by their names in tfds; `caltech101` and `sun397` have no validation there either.
CLIP_SOURCES: dict[str, Source] = {
    name: Source(data=f"tfds:{spec}", train=train, test=test)
    for name, spec, train, test in [
        ("imagenet", "imagenet2012", "train", "validation"),
        ("caltech101", "caltech101", "train", "test"),
        ("dtd", "dtd", "train", "test"),
        ("eurosat", "eurosat:rgb", "train[:50%]", "train[50%:]"),
        ("fgvc_aircraft", "fgvc_aircraft", "train", "test"),
        ("food101", "food101", "train", "validation"),
        ("oxford_flowers", "oxford_flowers102", "train", "test"),
        ("oxford_pets", "oxford_iiit_pet", "train", "test"),
        ("stanford_cars", "cars196", "train", "test"),
        ("sun397", "sun397", "train", "test"),
        ("ucf101", "ucf101", "train", "test"),
    ]
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All pictures of a source, encoded.

    Attributes:
      name: of the source.
      class_names: by class number.
      train: ``[views, n, ...]``.
      train_labels: ``[n]``.
      test: ``[m, ...]``, or None where the rest of ``train`` (its first view) is the test.
      test_labels: ``[m]``.
      class_weights: ``[features, classes]`` of the zero-shot classifier, columns of length one.
    """

    name: str
    class_names: tuple[str, ...]
    train: heads.FewShotInputs
    train_labels: np.ndarray
    test: heads.FewShotInputs | None
    test_labels: np.ndarray | None
    class_weights: np.ndarray

    @property
    def views(self) -> int:
        return len(self.train)


def load_task(config: Any, name: str) -> Task:
    """Encode what the caches do not hold yet, and read them."""
    if name.startswith("synthetic"):
        return synthetic(name)
    source = SOURCES.get(name) or CLIP_SOURCES.get(name)
    if source is None:
        known = ", ".join([*SOURCES, *CLIP_SOURCES])
        raise ValueError(f"data: expected one of {known} or synthetic:CLASSES, got {name!r}")
    encoders = [
        vision.load_encoder(spec, size=source.size or None)
        for spec in (config.encoder, config.auxiliary)
    ]

    def encode(split: str, views: str, limit: str) -> tuple[list[data.Features], data.ImageSet]:
        images = data.load_image_set(source.data, split=split)
        rows = _rows(images, limit)
        directory = epath.Path(config.features) / name
        found = []
        for encoder in encoders:
            cache = _features.extract(
                encoder,
                images,
                directory / _slug(encoder.name) / f"{_slug(split)}_{_slug(views)}",
                views=_features.views_of(encoder, views, fit=source.fit),
                rows=rows,
                batch_size=config.encode_batch,
            )
            found.append(cache.rows(rows))
        return found, images

    # A sample takes 16 pictures of a class and 4 to validate, out of these.
    limit = "" if source.test is None or source.train.endswith("]") else "per_class:20"
    (first, second), images = encode(source.train, config.views, limit)
    weights = _class_weights(encoders[0], source, name, images.class_names)

    def inputs(first: data.Features, second: data.Features) -> heads.FewShotInputs:
        made = heads.FewShotInputs(
            zero_shot=_zero_shot(source, first, weights, images.class_names),
            features=heads.unit_rows(first.features),
            auxiliary=heads.unit_rows(second.features),
        )
        return jax.tree.map(lambda x: np.moveaxis(np.asarray(x, np.float32), 1, 0), made)

    test = test_labels = None
    if source.test is not None:
        pair, _ = encode(source.test, "plain", "")
        test, test_labels = jax.tree.map(lambda x: x[0], inputs(*pair)), pair[0].labels
    return Task(
        name=name,
        class_names=images.class_names,
        train=inputs(first, second),
        train_labels=first.labels,
        test=test,
        test_labels=test_labels,
        class_weights=weights,
    )


def _rows(images: data.ImageSet, limit: str) -> np.ndarray:
    from experiments import extract_features

    return extract_features.rows_of(images, limit or "all")


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _class_weights(
    encoder: vision.Encoder, source: Source, name: str, class_names: tuple[str, ...]
) -> np.ndarray:
    """Mean of unit vectors, of length one again: of prompts, or of rows of the ImageNet head."""
    if encoder.tokenizer is not None:
        texts = _prompted(name, class_names)
        columns = [
            heads.unit_rows(encoder.text_features(encoder.tokenize(prompts))) for prompts in texts
        ]
    elif source.synsets is not None and encoder.num_classes == 1000:
        kernel = heads.unit_rows(jnp.asarray(encoder.model.head.kernel[...]).T)
        ids = _few_shot_synsets.ids_of(source.synsets, class_names)
        columns = [kernel[rows] for rows in ids]
    else:
        raise ValueError(
            f"encoder: {encoder.name} has neither text nor an ImageNet head to name {name} with"
        )
    means = jnp.stack([column.mean(0) for column in columns])
    return np.asarray(heads.unit_rows(means).T, np.float32)


def _prompted(name: str, class_names: tuple[str, ...]) -> list[list[str]]:
    templates = PROMPTS.get(name, ("a photo of a {}.",))
    return [[t.format(c.replace("_", " ")) for t in templates] for c in class_names]


# Tip-Adapter's, one data set a line; ImageNet has seven.
PROMPTS: dict[str, tuple[str, ...]] = {
    "imagenet": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "oxford_flowers": ("a photo of a {}, a type of flower.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "ucf101": ("a photo of a person doing {}.",),
}


def _zero_shot(
    source: Source, found: data.Features, weights: np.ndarray, class_names: tuple[str, ...]
) -> Any:
    if source.synsets is None or source.cosine or found.logits is None:
        return heads.zero_shot_logits(found.features, weights)
    log_p = jax.nn.log_softmax(jnp.asarray(found.logits))
    ids = _few_shot_synsets.ids_of(source.synsets, class_names)
    return jnp.stack([jax.nn.logsumexp(log_p[..., rows], axis=-1) for rows in ids], -1)


def synthetic(name: str) -> Task:
    """Gaussian classes seen by two encoders, of which the first has names for them."""
    classes = int(name.partition(":")[2] or 5)
    rng = np.random.default_rng(0)
    width, room = 32, 40
    weights = np.linalg.qr(rng.normal(size=(width, max(classes, 1))))[0].astype(np.float32)
    others = rng.normal(size=(classes, 24))
    labels = np.repeat(np.arange(classes), room)
    features = weights.T[labels] + 0.3 * rng.normal(size=(len(labels), width))
    auxiliary = others[labels] + 2.0 * rng.normal(size=(len(labels), 24))
    features, auxiliary = (heads.unit_rows(x.astype(np.float32)) for x in (features, auxiliary))
    # A classifier with half of its weights wrong is better than chance and worse than the labels.
    noisy = np.asarray(heads.unit_rows((weights + 0.2 * rng.normal(size=weights.shape)).T).T)
    inputs = heads.FewShotInputs(
        zero_shot=heads.zero_shot_logits(features, noisy.astype(np.float32)),
        features=features,
        auxiliary=auxiliary,
    )
    return Task(
        name=name,
        class_names=tuple(str(k) for k in range(classes)),
        train=jax.tree.map(lambda x: np.asarray(x, np.float32)[None], inputs),
        train_labels=labels.astype(np.int32),
        test=None,
        test_labels=None,
        class_weights=noisy.astype(np.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Several samples of a task, padded so that all numbers of shots have one shape.

    Attributes:
      support: ``[runs, views * n, ...]``.
      labels: ``[runs, n]``, -1 where a row is not there.
      held_out: validation and test pictures, their labels -1 where a row is not there.
    """

    support: heads.FewShotInputs
    labels: np.ndarray
    held_out: dict[str, tuple[heads.FewShotInputs, np.ndarray]]


def rows_of_run(
    task: Task, shots: int, *, run: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of ``task.train`` to learn from, to validate on, and to test on if it has no test.

    More shots contain fewer; validation does not depend on the shots. A class that has too few
    pictures for all of them gives fewer shots.
    """
    rng = np.random.default_rng([seed, run])
    for_validation, for_test = (2, 2) if task.test is None else (4, 0)
    parts: tuple[list, list, list] = ([], [], [])
    for number in range(len(task.class_names)):
        rows = rng.permutation(np.flatnonzero(task.train_labels == number))
        count = min(shots, len(rows) - for_validation - for_test)
        if count < 1:
            raise ValueError(
                f"data: {task.name} has {len(rows)} pictures of {task.class_names[number]!r}, too "
                "few to learn from, validate and test"
            )
        parts[0].append(rows[:count])
        parts[1].append(rows[-for_validation:])
        parts[2].append(rows[count:-for_validation])
    train, validation, test = (np.concatenate(part) for part in parts)
    return train, validation, test


def draw(task: Task, shots: int, *, runs: Any, most: int, seed: int = 0) -> Samples:
    """Samples of the runs with these numbers; ``most`` shots are what there is room for."""
    drawn = [rows_of_run(task, shots, run=run, seed=seed) for run in runs]
    room = [rows_of_run(task, most, run=runs[0], seed=seed)[0].size]
    # The fewer the shots, the more is left to test on.
    room += [drawn[0][1].size, rows_of_run(task, 1, run=runs[0], seed=seed)[2].size]

    def padded(part: int) -> np.ndarray:
        rows = np.full((len(drawn), room[part]), -1)
        for run, found in enumerate(drawn):
            rows[run, : found[part].size] = found[part]
        return rows

    def pick(rows: np.ndarray, views: bool) -> tuple[heads.FewShotInputs, np.ndarray]:
        def of(x: np.ndarray) -> np.ndarray:
            if not views:
                return x[0][rows]
            return np.moveaxis(x[:, rows], 0, 1).reshape(len(rows), -1, x.shape[-1])

        return jax.tree.map(of, task.train), np.where(rows >= 0, task.train_labels[rows], -1)

    support, labels = pick(padded(0), True)
    held_out = {"validation": pick(padded(1), False)}
    if task.test is None:
        held_out["test"] = pick(padded(2), False)
    else:
        repeated = jax.tree.map(lambda x: np.repeat(x[None], len(drawn), 0), task.test)
        held_out["test"] = (repeated, np.repeat(task.test_labels[None], len(drawn), 0))  # type: ignore
    return Samples(support=support, labels=labels, held_out=held_out)
