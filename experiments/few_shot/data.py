"""What the few-shot experiment learns from: features of two encoders, and names of classes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.few_shot import synsets as few_shot_synsets
from logitjax import data, few_shot, vision

# Of a class, for samples of 16 and 4 to validate on: enough that two samples differ.
_PER_CLASS = "per_class:32"


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
      scale: of cosines: CLIP's, or one for a head that was never trained on cosines.
      prompts: with ``{}`` for the name of a class, for encoders with a text tower.
      shifted: further pictures of the same classes to score on: data and split by name.
    """

    data: str
    train: str = "all"
    test: str | None = None
    fit: str = "crop"
    size: int = 0
    synsets: Mapping[str, str] | None = None
    cosine: bool = False
    scale: float = 100.0
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    shifted: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


SOURCES: dict[str, Source] = {
    "stamps": Source(data="stamps", fit="pad", size=160, synsets=few_shot_synsets.STAMPS),
    "fashion": Source(
        data="tfds:fashion_mnist_png",
        train="train[:500]",
        test="test[:2000]",
        size=96,
        synsets=few_shot_synsets.FASHION,
        cosine=True,
        # Where the likelihood of the 500 is highest; the head is 33% right and 78% sure at 100.
        scale=20.0,
    ),
    # Learnt from one vendor's drawings, scored on three others' of the same emoji.
    "emoji": Source(
        data="emoji:apple",
        fit="pad",
        size=96,
        synsets=few_shot_synsets.EMOJI,
        shifted={v: (f"emoji:{v}", "all") for v in ("facebook", "google", "twitter")},
    ),
}
# CLIP's eleven, as tfds or folders have them, and what tests a shift of ImageNet's pictures.
CLIP_SOURCES: dict[str, Source] = {
    name: Source(
        data=f"recognition:{name}",
        train="train",
        test="test",
        prompts=which.templates,
        shifted={
            other: (f"recognition:{other}", "test")
            for other in data.RECOGNITION_SETS
            if other.startswith(f"{name}_")
        },
    )
    for name, which in data.RECOGNITION_SETS.items()
    if "train" in which.folders or not which.folders
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All pictures of a source, encoded.

    Attributes:
      name: of the source.
      class_names: by class number.
      train: ``[views, n, ...]``.
      plain: the same pictures ``[n, ...]`` as they are validated and tested on.
      train_labels: ``[n]``.
      test: ``[m, ...]`` and labels ``[m]``; None where the rest of ``train`` is the test.
      class_weights: ``[features, classes]`` of the zero-shot classifier, columns of length one.
      scale: of its cosines.
      shifted: by name further pictures and labels to score on.
    """

    name: str
    class_names: tuple[str, ...]
    train: few_shot.FewShotInputs
    plain: few_shot.FewShotInputs
    train_labels: np.ndarray
    test: tuple[few_shot.FewShotInputs, np.ndarray] | None
    class_weights: np.ndarray
    scale: float
    shifted: Mapping[str, tuple[few_shot.FewShotInputs, np.ndarray]]

    @property
    def views(self) -> int:
        return len(self.train)


def source_of(spec: str) -> tuple[str, Source]:
    """``NAME``, or ``NAME=DATA`` for pictures that lie elsewhere."""
    name, _, place = spec.partition("=")
    source = SOURCES.get(name) or CLIP_SOURCES.get(name)
    if source is None:
        known = ", ".join([*SOURCES, *CLIP_SOURCES])
        raise ValueError(f"data: expected one of {known} or synthetic:CLASSES, got {name!r}")
    return name, dataclasses.replace(source, data=place) if place else source


def load_task(config: Any, spec: str) -> Task:
    """Encode what the caches do not hold yet, and read them."""
    if spec.startswith("synthetic"):
        return synthetic(spec)
    name, source = source_of(spec)
    encoders = [
        vision.load_encoder(encoder, size=source.size or None)
        for encoder in (config.encoder, config.auxiliary)
    ]

    def encode(
        place: str, split: str, views: str, rows: str = "all"
    ) -> tuple[list[few_shot.Features], data.ImageSet]:
        images = data.load_image_set(place, split=split)
        chosen = few_shot.choose_rows(images, rows)
        found = []
        for encoder in encoders:
            cache = few_shot.extract_features(
                encoder,
                images,
                epath.Path(config.features)
                / _slug(place)
                / _slug(encoder.name)
                / f"{_slug(split)}_{_slug(views)}",
                views=few_shot.encoder_views(encoder, views, fit=source.fit),
                rows=chosen,
                batch_size=config.encode_batch,
            )
            found.append(cache.read(chosen))
        return found, images

    limited = source.test is not None and not source.train.endswith("]")
    rows = _PER_CLASS if limited else "all"
    pair, images = encode(source.data, source.train, "plain", rows)
    names = images.class_names
    weights = _class_weights(encoders[0], source, name, names)

    def inputs(pair: list[few_shot.Features]) -> few_shot.FewShotInputs:
        first, second = pair
        made = few_shot.FewShotInputs(
            zero_shot=_zero_shot(source, first, weights, names),
            features=few_shot.unit_rows(first.features),
            auxiliary=few_shot.unit_rows(second.features),
        )
        return jax.tree.map(lambda x: np.moveaxis(np.asarray(x, np.float32), 1, 0), made)

    plain = inputs(pair)
    train = plain
    if config.views != "plain":
        train = inputs(encode(source.data, source.train, config.views, rows)[0])

    def held_out(place: str, split: str) -> tuple[few_shot.FewShotInputs, np.ndarray]:
        pair, found = encode(place, split, "plain")
        if found.class_names != names:
            raise ValueError(f"{place}: its classes are not those of {source.data}")
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
        shifted={key: held_out(*place) for key, place in source.shifted.items()},
    )


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_")


def _class_weights(
    encoder: vision.Encoder, source: Source, name: str, class_names: tuple[str, ...]
) -> np.ndarray:
    """Mean of unit vectors, of length one again: of prompts, or of rows of the ImageNet head."""
    if encoder.tokenizer is not None:
        which = data.RECOGNITION_SETS.get(name)
        if which is not None:
            which.prompts(class_names)  # raises where they are numbers
        words = [one.replace("_", " ") for one in class_names]
        return np.asarray(vision.zero_shot_classifier(encoder, words, source.prompts), np.float32)
    if source.synsets is None or encoder.num_classes != 1000:
        raise ValueError(
            f"encoder: {encoder.name} has neither text nor an ImageNet head to name {name} with"
        )
    kernel = few_shot.unit_rows(jnp.asarray(encoder.model.head.kernel[...]).T)
    ids = few_shot_synsets.ids_of(source.synsets, class_names)
    means = jnp.stack([kernel[rows].mean(0) for rows in ids])
    return np.asarray(few_shot.unit_rows(means).T, np.float32)


def _zero_shot(
    source: Source, found: few_shot.Features, weights: np.ndarray, class_names: tuple[str, ...]
) -> Any:
    if source.synsets is None or source.cosine or found.logits is None:
        return few_shot.zero_shot_logits(found.features, weights, scale=source.scale)
    log_p = jax.nn.log_softmax(jnp.asarray(found.logits))
    ids = few_shot_synsets.ids_of(source.synsets, class_names)
    return jnp.stack([jax.nn.logsumexp(log_p[..., rows], axis=-1) for rows in ids], -1)


def synthetic(spec: str) -> Task:
    """Gaussian classes seen by two encoders, of which the first has names for them."""
    classes = int(spec.partition(":")[2] or 5)
    rng = np.random.default_rng(0)
    width, room = 32, 40
    weights = np.linalg.qr(rng.normal(size=(width, classes)))[0].astype(np.float32)
    others = rng.normal(size=(classes, 24))
    labels = np.repeat(np.arange(classes), room).astype(np.int32)
    # A classifier with noisy weights is better than chance and worse than the labels.
    noisy = np.asarray(few_shot.unit_rows((weights + 0.2 * rng.normal(size=weights.shape)).T).T)
    noisy = noisy.astype(np.float32)

    def pictures(noise: float) -> few_shot.FewShotInputs:
        features = weights.T[labels] + noise * rng.normal(size=(len(labels), width))
        auxiliary = others[labels] + 2.0 * rng.normal(size=(len(labels), 24))
        features, auxiliary = (
            few_shot.unit_rows(x.astype(np.float32)) for x in (features, auxiliary)
        )
        made = few_shot.FewShotInputs(
            zero_shot=few_shot.zero_shot_logits(features, noisy),
            features=features,
            auxiliary=auxiliary,
        )
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
