"""Where the few-shot experiment finds pictures, and how a zero-shot classifier names them."""

import dataclasses
from collections.abc import Mapping

from experiments.few_shot import synsets as few_shot_synsets
from logitjax import data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures come from and how the zero-shot classifier names them.

    Attributes:
        data: What :func:`logitjax.data.load_image_set` reads.
        train: Split that is sampled from.
        test: Split to score on; None where the rest of `train` is.
        fit: What a square loses or gains, `'crop'` or `'pad'`.
        size: Pixels of the views; 0 takes each encoder's own.
        synsets: ImageNet classes of every class, for encoders with an ImageNet head.
        cosine: Score by cosines with the mean weights of those classes, not by their probability.
        scale: Scale of cosines: CLIP's, or one for a head that was never trained on cosines.
        prompts: Texts with `{}` for the name of a class, for encoders with a text tower.
        shifted: Further pictures of the same classes to score on: data and split by name.
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
    synsets=few_shot_synsets.FASHION,
    cosine=True,
    # Where the likelihood of the 500 is highest; the head is 33% right and 78% sure at 100.
    scale=20.0,
)

SOURCES: dict[str, Source] = {
    "stamps": Source(data="stamps", fit="pad", size=160, synsets=few_shot_synsets.STAMPS),
    "fashion": _FASHION,
    # So many that samples hardly share any.
    "fashion_wide": dataclasses.replace(_FASHION, train="train[:6000]"),
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


def source_of(spec: str) -> tuple[str, Source]:
    """`NAME`, or `NAME=DATA` for pictures that lie elsewhere."""
    name, _, location = spec.partition("=")
    source = SOURCES.get(name) or CLIP_SOURCES.get(name)
    if source is None:
        existing = ", ".join([*SOURCES, *CLIP_SOURCES])
        raise ValueError(f"data: expected one of {existing} or synthetic:CLASSES, got {name!r}")
    return name, dataclasses.replace(source, data=location) if location else source
