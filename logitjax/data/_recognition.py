"""Data sets on which few-shot methods for CLIP are compared, and their prompts."""

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from logitjax.data._images import class_folders
from logitjax.storage import guard, package_file, read_json

_WORDNET = re.compile(r"n\d{8}")
_SPLITS = ("train", "val", "test")
_TEST_ONLY = {"test": "test"}
_TRAIN_TEST = {"train": "train", "test": "test"}
_TRAIN_VALIDATION = {"train": "train", "test": "validation"}
_ALL_THREE = _TRAIN_TEST | {"val": "validation"}
_PHOTO = ("a photo of a {}.",)
# The seven of CLIP's eighty that Tip-Adapter and its successors use.
_IMAGENET_TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecognitionSet:
    """A data set of the few-shot literature, in the layout of CoOp, and its name in tfds.

    Published numbers are for CoOp's splits; tfds has others, except for ImageNet and its variants.
    """

    num_classes: int
    # Tip-Adapter's templates, with {} in place of the class name.
    templates: tuple[str, ...] = _PHOTO
    # Below the folder of all data sets.
    folder: str
    images: str = "images"  # inside the folder
    # A JSON file; ImageNet and its variants have folders, FGVC-Aircraft has lists.
    split_file: str = ""
    # Folders in `images` by split.
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tfds: str | None = None
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # tfds and folders write names without spaces.
    camel_case: bool = False

    def readable(self, class_names: Sequence[str]) -> tuple[str, ...]:
        """Convert names to a form for use in sentences.

        >>> RECOGNITION_SETS["sun397"].readable(["/a/apse/indoor", "living_room"])
        ('indoor apse', 'living room')
        >>> RECOGNITION_SETS["eurosat"].readable(["AnnualCrop"])
        ('Annual Crop',)
        """
        items = []
        for name in class_names:
            # SUN397: a letter, the place, its kind.
            if re.match(r"/\w/", name):
                name = " ".join(reversed(name.split("/")[2:]))
            if self.camel_case:
                name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
            items.append(name.replace("_", " "))
        return tuple(items)

    def prompts(self, class_names: Sequence[str]) -> list[list[str]]:
        """Fill every template with every class's name: ``[classes][templates]``.

        >>> RECOGNITION_SETS["dtd"].prompts(["polka-dotted"])
        [['polka-dotted texture.']]
        """
        names = self.readable(class_names)
        number = next((name for name in names if _WORDNET.fullmatch(name)), None)
        if number is not None:
            raise ValueError(
                f"class_names: {number} is a WordNet id, not a name; install the package "
                "open_clip_torch (--no-deps is enough), or put CoOp's classnames.txt (lines like "
                f"'n01440764 tench') into {self.folder}, or into downloads/manual for tfds"
            )
        return [[template.format(name) for template in self.templates] for name in names]


def _zhou(folder: str, images: str, split: str, classes: int, **options: Any) -> RecognitionSet:
    file = f"split_zhou_{split}.json"
    return RecognitionSet(
        num_classes=classes, folder=folder, images=images, split_file=file, **options
    )


def _imagenet(folder: str, images: str, tfds: str, **options: Any) -> RecognitionSet:
    return RecognitionSet(
        num_classes=1000, folder=folder, images=images, tfds=tfds,
        templates=_IMAGENET_TEMPLATES, **options,
    )  # fmt: skip


# Eleven data sets with splits and folders of CoOp (Zhou et al., arXiv 2109.01134), and two that
# test distribution shifts. tfds counts caltech101's background and easy faces as classes too, 102
# in total, and has ucf101's videos, not their middle frames.
RECOGNITION_SETS: dict[str, RecognitionSet] = {
    "imagenet": _imagenet(
        "imagenet", "images", "imagenet2012", folders={"train": "train", "test": "val"},
        tfds_splits=_TRAIN_VALIDATION,
    ),
    "caltech101": _zhou(
        "caltech-101", "101_ObjectCategories", "Caltech101", 100,
        tfds="caltech101", tfds_splits=_TRAIN_TEST,
    ),
    "oxford_pets": _zhou(
        "oxford_pets", "images", "OxfordPets", 37, tfds="oxford_iiit_pet", tfds_splits=_TRAIN_TEST,
        templates=("a photo of a {}, a type of pet.",),
    ),
    "stanford_cars": _zhou(
        "stanford_cars", "", "StanfordCars", 196, tfds="cars196", tfds_splits=_TRAIN_TEST,
    ),
    "oxford_flowers": _zhou(
        "oxford_flowers", "jpg", "OxfordFlowers", 102,
        tfds="oxford_flowers102", tfds_splits=_ALL_THREE,
        templates=("a photo of a {}, a type of flower.",),
    ),
    "food101": _zhou(
        "food-101", "images", "Food101", 101, tfds="food101", tfds_splits=_TRAIN_VALIDATION,
        templates=("a photo of {}, a type of food.",),
    ),
    "fgvc_aircraft": RecognitionSet(
        num_classes=100, folder="fgvc_aircraft",
        templates=("a photo of a {}, a type of aircraft.",),
    ),
    "sun397": _zhou("sun397", "SUN397", "SUN397", 397, tfds="sun397:tfds", tfds_splits=_ALL_THREE),
    "dtd": _zhou(
        "dtd", "images", "DescribableTextures", 47, tfds="dtd", tfds_splits=_ALL_THREE,
        templates=("{} texture.",),
    ),
    "eurosat": _zhou(
        "eurosat", "2750", "EuroSAT", 10, tfds="eurosat:rgb",
        tfds_splits={"train": "train[:50%]", "val": "train[50%:70%]", "test": "train[70%:]"},
        templates=("a centered satellite photo of {}.",), camel_case=True,
    ),
    "ucf101": _zhou(
        "ucf101", "UCF-101-midframes", "UCF101", 101,
        templates=("a photo of a person doing {}.",), camel_case=True,
    ),
    "imagenet_v2": _imagenet(
        "imagenetv2", "imagenetv2-matched-frequency-format-val", "imagenet_v2:matched-frequency",
        folders={"test": ""}, tfds_splits=_TEST_ONLY,
    ),
    "imagenet_sketch": _imagenet(
        "imagenet-sketch", "images", "imagenet_sketch",
        folders={"test": ""}, tfds_splits=_TEST_ONLY,
    ),
}  # fmt: skip


def recognition_set(name: str) -> RecognitionSet:
    if name not in RECOGNITION_SETS:
        raise ValueError(
            f"recognition set: expected one of {', '.join(RECOGNITION_SETS)}, got {name!r}"
        )
    return RECOGNITION_SETS[name]


def tfds_source(name: str, split: str, manual: epath.Path) -> tuple[str, str]:
    """The tfds source and split of one of `RECOGNITION_SETS` that is not in ``manual``."""
    which = recognition_set(name)
    if which.tfds is None:
        raise ValueError(
            f"recognition:{name} is not in tfds: put {which.folder} as CoOp has it into {manual}, "
            f"or name the directory where it is, recognition:{name}:DIR"
        )
    if split not in which.tfds_splits:
        raise ValueError(
            f"recognition:{name} has the splits {', '.join(which.tfds_splits)} in tfds, not "
            f"{split!r}"
        )
    return f"tfds:{which.tfds}", which.tfds_splits[split]


def files_of(
    name: str, root: epath.Path, split: str
) -> tuple[list[tuple[epath.Path, int]], list[str]]:
    """Pictures with class numbers, and class names, from files in the layout of CoOp."""
    which = recognition_set(name)
    present = tuple(which.folders) or _SPLITS
    if split not in present:
        raise ValueError(f"recognition:{name} has the splits {', '.join(present)}, not {split!r}")
    home = root / which.folder
    if which.folders:
        return class_folders(home / which.images / which.folders[split])
    if not which.split_file:
        return _aircraft(home, split)
    path = home / which.split_file
    if not path.exists():
        raise FileNotFoundError(f"recognition:{name} is split by {path}, which is missing")
    content = read_json(path, form=dict)
    with guard.naming(path, "a split"):
        entries = content[split]
        names_of = {label: name for part in _SPLITS for _, label, name in content[part]}
        if sorted(names_of) != list(range(len(names_of))):
            raise ValueError(f"{path} does not number its classes from 0 on")
        files = [(home / which.images / file, int(label)) for file, label, _ in entries]
    return files, [names_of[label] for label in sorted(names_of)]


def _aircraft(home: epath.Path, split: str) -> tuple[list[tuple[epath.Path, int]], list[str]]:
    lists = (home / "variants.txt", home / f"images_variant_{split}.txt")
    for path in lists:
        if not path.exists():
            raise FileNotFoundError(f"recognition:fgvc_aircraft needs {path}, which is missing")
    classes = [line.strip() for line in lists[0].read_text().splitlines() if line.strip()]
    number = {variant: i for i, variant in enumerate(classes)}
    files = []
    for line in lists[1].read_text().splitlines():
        file, _, variant = line.strip().partition(" ")
        if file:
            files.append((home / "images" / f"{file}.jpg", number[variant]))
    return files, classes


def class_names_of(name: str, classes: Sequence[str], directory: epath.Path) -> tuple[str, ...]:
    """Human-readable class names, for prompts."""
    which = recognition_set(name)
    # Classes of ImageNet and its variants are numbers. Names come from CoOp's `classnames.txt`, or
    # else from the package open_clip_torch; without either, numbers remain.
    if which.num_classes != 1000:
        return which.readable(classes)
    path = directory / "classnames.txt"
    if path.exists():
        lines = [line.strip().partition(" ") for line in path.read_text().splitlines()]
        names = {key: rest.strip() for key, _, rest in lines if _WORDNET.fullmatch(key)}
        ordered = [names[key] for key in sorted(names)]
    else:
        names, ordered = {}, _open_clip_names()
        if _WORDNET.fullmatch(classes[0]) and len(classes) == len(ordered):
            names = dict(zip(sorted(classes), ordered, strict=True))
        elif not classes[0].isdecimal() or not ordered:
            return tuple(classes)
    items = []
    for number in classes:
        if number in names:
            items.append(names[number])
        elif number.isdecimal() and int(number) < len(ordered):
            items.append(ordered[int(number)])
        else:
            raise ValueError(f"{path} does not name the class {number}")
    return tuple(items)


def _open_clip_names() -> list[str]:
    """Read OpenAI's thousand names from a file that is parsed, not executed."""
    try:
        path = package_file(
            "open_clip", "zero_shot_metadata.py", what="names", install="open_clip_torch==3.3.0"
        )
    except ValueError:
        return []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "IMAGENET_CLASSNAMES":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []
