"""Data of the few-shot experiment: features of two encoders, and names of classes."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.few_shot import synsets as few_shot_synsets
from experiments.few_shot.config import Config
from experiments.few_shot.sources import Source, source_of
from logitjax import data, few_shot, vision
from logitjax.commands.extract_features import slug

# A class needs samples of 16 to train and 4 to validate on, enough that two samples differ.
_PER_CLASS = "per_class:32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All pictures of a source, encoded.

    Attributes:
        class_names: Names by class number.
        train: `[views, n, ...]` pictures to learn from.
        plain: The same pictures `[n, ...]` without augmentation, as for validation and tests.
        train_labels: `[n]` classes.
        test: `[m, ...]` pictures and labels `[m]`; None if the rest of `train` is the test.
        class_weights: `[features, classes]` of the zero-shot classifier, columns of length one.
        scale: Scale of its cosines.
        shifted: More pictures and labels to score on, by name.
    """

    name: str
    class_names: tuple[str, ...]
    train: few_shot.Inputs
    plain: few_shot.Inputs
    train_labels: np.ndarray
    test: tuple[few_shot.Inputs, np.ndarray] | None
    class_weights: np.ndarray
    scale: float
    shifted: Mapping[str, tuple[few_shot.Inputs, np.ndarray]]

    @property
    def views(self) -> int:
        return len(self.train)


def load_task(config: Config, spec: str) -> Task:
    """Encode what the caches do not hold yet, and read them."""
    if spec.startswith("synthetic"):
        return synthetic(spec)
    name, source = source_of(spec)
    encoders = [
        vision.load_encoder(encoder, size=source.size or None)
        for encoder in (config.encoder, config.auxiliary)
    ]

    def encode(
        source_spec: str, split: str, views: str, rows: str = "all"
    ) -> tuple[list[few_shot.Features], data.ImageSet]:
        images = data.load_image_set(source_spec, split=split)
        chosen = images.choose(rows)
        items = []
        for encoder in encoders:
            cache = few_shot.extract_features(
                encoder,
                images,
                epath.Path(config.features)
                / slug(source_spec)
                / slug(encoder.name)
                / f"{slug(split)}_{slug(views)}",
                views=data.ImageViews.of(encoder, views, fit=source.fit),
                rows=chosen,
                batch_size=config.encode_batch,
            )
            items.append(cache.read(chosen))
        return items, images

    limited = source.test is not None and not source.train.endswith("]")
    rows = _PER_CLASS if limited else "all"
    pair, images = encode(source.data, source.train, "plain", rows)
    names = images.class_names
    weights = _class_weights(encoders[0], source, name, names)

    def inputs(pair: list[few_shot.Features]) -> few_shot.Inputs:
        first, second = pair
        made = few_shot.Inputs.of(
            first.features, weights, scale=source.scale, auxiliary=second.features
        )
        if source.synsets is not None and not source.cosine and first.logits is not None:
            ids = few_shot_synsets.ids_of(source.synsets, names)
            made = dataclasses.replace(made, zero_shot=_of_synsets(first.logits, ids))
        return jax.tree.map(lambda x: np.moveaxis(np.asarray(x, np.float32), 1, 0), made)

    plain = inputs(pair)
    train = plain
    if config.views != "plain":
        train = inputs(encode(source.data, source.train, config.views, rows)[0])

    def held_out(source_spec: str, split: str) -> tuple[few_shot.Inputs, np.ndarray]:
        pair, result = encode(source_spec, split, "plain")
        if result.class_names != names:
            raise ValueError(f"{source_spec}: its classes are not those of {source.data}")
        return jax.tree.map(lambda x: x[0], inputs(pair)), pair[0].labels

    return Task(
        name=name,
        class_names=names,
        train=train,
        plain=jax.tree.map(lambda x: x[0], plain),
        train_labels=pair[0].labels,
        test=None if source.test is None else held_out(source.data, source.test),
        class_weights=weights,
        scale=source.scale,
        shifted={key: held_out(*location) for key, location in source.shifted.items()},
    )


def _class_weights(
    encoder: vision.Encoder, source: Source, name: str, class_names: tuple[str, ...]
) -> np.ndarray:
    """Mean of unit vectors, rescaled to length one: of prompts, or of rows of the ImageNet head."""
    if encoder.tokenizer is not None:
        which = data.RECOGNITION_SETS.get(name)
        if which is not None:
            which.prompts(class_names)  # raises where they are numbers
        words = [one.replace("_", " ") for one in class_names]
        return np.asarray(encoder.zero_shot(words, source.prompts), np.float32)
    if source.synsets is None or encoder.num_classes != 1000:
        raise ValueError(
            f"encoder: {encoder.name} has neither text nor an ImageNet head to name {name} with"
        )
    kernel = _unit(np.asarray(encoder.model.head.kernel[...]).T)
    ids = few_shot_synsets.ids_of(source.synsets, class_names)
    means = np.stack([kernel[rows].mean(0) for rows in ids])
    return _unit(means).T


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


@jax.jit
def _of_synsets(logits: jax.Array, ids: Sequence[np.ndarray]) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return jnp.stack([jax.nn.logsumexp(log_p[..., rows], axis=-1) for rows in ids], -1)


def synthetic(spec: str) -> Task:
    """Gaussian classes seen by two encoders, the first of which can name them."""
    classes = int(spec.partition(":")[2] or 5)
    rng = np.random.default_rng(0)
    width, room = 32, 40
    weights = np.linalg.qr(rng.normal(size=(width, classes)))[0].astype(np.float32)
    others = rng.normal(size=(classes, 24))
    labels = np.repeat(np.arange(classes), room).astype(np.int32)
    # A classifier with noisy weights is better than chance and worse than the labels.
    noisy = _unit((weights + 0.2 * rng.normal(size=weights.shape)).T).T

    def pictures(noise: float) -> few_shot.Inputs:
        features = weights.T[labels] + noise * rng.normal(size=(len(labels), width))
        auxiliary = others[labels] + 2.0 * rng.normal(size=(len(labels), 24))
        features, auxiliary = (x.astype(np.float32) for x in (features, auxiliary))
        made = few_shot.Inputs.of(features, noisy, auxiliary=auxiliary)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), made)

    plain = pictures(0.3)
    return Task(
        name=spec,
        class_names=tuple(str(k) for k in range(classes)),
        train=jax.tree.map(lambda x: x[None], plain),
        plain=plain,
        train_labels=labels,
        test=None,
        class_weights=noisy,
        scale=100.0,
        shifted={"noisier": (pictures(0.5), labels)},
    )
