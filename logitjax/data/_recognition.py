"""Data sets on which few-shot methods for CLIP are compared, and their prompts."""

import ast
import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources

from etils import epath

from logitjax.data._images import class_folders
from logitjax.storage import guard, package_file, read_json

_WORDNET = re.compile(r"n\d{8}")
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecognitionSet:
    """A data set of the few-shot literature, in the layout of CoOp, and its name in tfds.

    Published numbers are for CoOp's splits; tfds has others, except for ImageNet and its variants.
    """

    num_classes: int
    # With {} in place of the class name.
    templates: tuple[str, ...]
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


RECOGNITION_SETS: dict[str, RecognitionSet] = {
    name: RecognitionSet(**fields | {"templates": tuple(fields["templates"])})
    for name, fields in tomllib.loads(
        (resources.files("logitjax.data") / "recognition.toml").read_text()
    ).items()
}


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
