"""Sources of the few-shot experiment's pictures, and the zero-shot classifier's names for them."""

import dataclasses
from collections.abc import Mapping

from experiments.few_shot import synsets as few_shot_synsets
from logitjax import data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A source of pictures and the zero-shot classifier's names for its classes.

    Attributes:
        data: Specification for :func:`logitjax.data.load_image_set`.
        train: Split that samples are drawn from.
        test: Split to score on; None if the rest of `train` is the test.
        fit: How pictures become square, `'crop'` or `'pad'`.
        size: Pixels of the views; 0 uses each encoder's own size.
        synsets: ImageNet classes of every class, for encoders with an ImageNet head.
        cosine: Score by cosines with the mean weights of those classes, not by their probability.
        scale: Scale of cosines: CLIP's, or one for a head that was not trained on cosines.
        prompts: Texts with `{}` for the name of a class, for encoders with a text tower.
        shifted: More pictures of the same classes to score on: data and split, by name.
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


_FASHION = Source(
    data="tfds:fashion_mnist_png",
    train="train[:500]",
    test="test[:2000]",
    size=96,
    synsets=few_shot_synsets.TABLES["fashion"],
    cosine=True,
    # The likelihood of the 500 is highest here; at 100 the head is 33% right and 78% sure.
    scale=20.0,
)

SOURCES: dict[str, Source] = {
    "stamps": Source(data="stamps", fit="pad", size=160, synsets=few_shot_synsets.TABLES["stamps"]),
    "fashion": _FASHION,
    # Enough that samples hardly overlap.
    "fashion_wide": dataclasses.replace(_FASHION, train="train[:6000]"),
    # Learned from one vendor's drawings, scored on three others' of the same emoji.
    "emoji": Source(
        data="emoji:apple",
        fit="pad",
        size=96,
        synsets=few_shot_synsets.TABLES["emoji"],
        shifted={v: (f"emoji:{v}", "all") for v in ("facebook", "google", "twitter")},
    ),
}
# CLIP's eleven, as tfds or folders have them, and sets that test a shift from ImageNet.
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


def source_of(spec: str) -> tuple[str, Source]:
    """`NAME`, or `NAME=DATA` for pictures in another place."""
    name, _, location = spec.partition("=")
    source = SOURCES.get(name) or CLIP_SOURCES.get(name)
    if source is None:
        existing = ", ".join([*SOURCES, *CLIP_SOURCES])
        raise ValueError(f"data: expected one of {existing} or synthetic:CLASSES, got {name!r}")
    return name, dataclasses.replace(source, data=location) if location else source
