"""Labelled pictures of any size, read one at a time, for encoders."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from logitjax.data import _images as pictures
from logitjax.data._examples import parse_split, slice_of
from logitjax.data._places import fetched, manual_dir
from logitjax.data._recognition import class_names_of, files_of, recognition_set, tfds_source
from logitjax.storage import digest, read_json

# Folders of the Debian package with 14 drawings or more; the last component is the class.
STAMPS = (
    "animals/birds", "animals/insects", "animals/mammals", "clothes/hats", "food/fruit",
    "food/vegetables", "household/dishes", "household/tools", "plants/flowers", "space",
    "symbols/money", "town/houses", "town/roadsigns", "vehicles",
)  # fmt: skip
EMOJI_VENDORS = ("apple", "facebook", "google", "twitter")
_STAMPS_INSTALL = (
    "apt-get install tuxpaint-stamps-default, or in {manual}: "
    "apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb ."
)
# Pinned, because pictures differ between versions.
_EMOJI_INSTALL = (
    "in {{manual}}/emoji: npm pack {name}@16.0.0 && mkdir -p {name} && "
    "tar -xzf {name}-16.0.0.tgz -C {name}"
)


class ImageSet(Sequence):
    """Pictures, their classes and, if the source has them, captions.

    ``image_set[i]`` reads a picture, uint8 ``[height, width, 3]``, and its class.

    Attributes:
        class_names: by class number.
        captions: a sentence for each picture, or None.
        files: paths of the pictures, or None.
        fingerprint: changes with the choice of pictures, their names and their classes.
        source: the specification that they were read from.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[np.ndarray, int]],
        labels: Callable[[], np.ndarray],
        *,
        count: int,
        class_names: Sequence[str],
        fingerprint: str,
        source: str,
        captions: Sequence[str] | None = None,
        files: Sequence[epath.Path] | None = None,
    ):
        self.files = None if files is None else tuple(files)
        self._read, self._read_labels, self._count = read, labels, count
        self._labels: np.ndarray | None = None
        self.class_names = tuple(class_names)
        self.captions = None if captions is None else tuple(captions)
        self.fingerprint, self.source = fingerprint, source

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._read(int(index) % len(self))

    def __repr__(self) -> str:
        return f"ImageSet({self.source!r}, {len(self)} pictures of {len(self.class_names)} classes)"

    @property
    def labels(self) -> np.ndarray:
        """Class numbers, int32 ``[count]``; slow to gather from a large tfds dataset."""
        if self._labels is None:
            self._labels = np.asarray(self._read_labels(), np.int32)
        return self._labels

    def choose(self, spec: str, *, seed: int = 0) -> np.ndarray:
        """Return the numbers of pictures that a spec chooses, ascending.

        The spec is `all`, a number of pictures from the start, or `per_class:N`, at random by the
        seed.

        Raises:
            ValueError: The spec is none of these.
        """
        if spec == "all":
            return np.arange(len(self))
        kind, _, number = spec.rpartition(":")
        if kind not in ("", "per_class") or not number.isdigit() or int(number) < 1:
            raise ValueError(f"rows: expected all, a number or per_class:N, got {spec!r}")
        if not kind:
            return np.arange(min(int(number), len(self)))
        # The same order for every N, so that a larger choice contains a smaller one.
        order = np.random.default_rng(seed).permutation(len(self))
        labels = self.labels[order]
        classes = range(len(self.class_names))
        return np.sort(np.concatenate([order[labels == c][: int(number)] for c in classes]))

    def select(self, rows: Sequence[int] | Int[np.ndarray, " rows"]) -> "ImageSet":
        """Return a set of only these pictures, in this order.

        Raises:
            TypeError: rows that are not integers, such as a mask.
            ValueError: a row is out of range.
        """
        chosen = np.asarray(rows)
        pictures.check_numbers(chosen, len(self), "rows")
        chosen = chosen.astype(np.int64)
        captions = self.captions
        if captions is not None:
            captions = [captions[row] for row in chosen]
        return ImageSet(
            lambda index: self._read(int(chosen[index])),
            lambda: self.labels[chosen],
            count=len(chosen),
            class_names=self.class_names,
            # The selection and its order.
            fingerprint=digest(self.fingerprint, chosen),
            source=self.source,
            captions=captions,
            files=None if self.files is None else [self.files[row] for row in chosen],
        )

    def survey(self, rows: Any, seen: dict[str, str]) -> tuple[np.ndarray, dict[str, list[str]]]:
        """Find usable rows of files; return them, and notes on the others by reason.

        Files that cannot be read are left out, and so are copies (equal pixels, once upright), all
        copies of a picture in several classes, and pictures in `seen`: files by digest, to which
        these are added. Rotated and transparent pictures are kept. Every file is read once.
        """
        files, notes = [os.fspath(path) for path in self.files or ()], {}
        before, copies, good = dict(seen), {}, []

        def look(row: int) -> tuple[str, Iterable[str]]:
            try:
                picture, done = pictures.open_picture(epath.Path(files[row]))
            except ValueError as error:
                return "", [str(error)]
            return digest(np.asarray(picture)), done

        rows = np.asarray(rows).tolist()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for row, (key, done) in zip(rows, pool.map(look, rows)):
                if key:
                    copies.setdefault(key, []).append(row)
                for what in done:
                    line = (what, files[row]) if key else ("unreadable", what)
                    notes.setdefault(line[0], []).append(line[1])
        for key, group in copies.items():
            names = ", ".join(files[row] for row in group)
            if key in before:
                notes.setdefault("elsewhere", []).append(f"{names}, as {before[key]}")
                continue
            seen[key] = files[group[0]]
            if len(set(self.labels[group].tolist())) > 1:
                notes.setdefault("contradictory", []).append(names)
                continue
            good.append(group[0])
            if len(group) > 1:
                notes.setdefault("repeated", []).append(names)
        return np.sort(np.asarray(good, np.int64)), notes


def load_image_set(
    spec: str, *, split: str = "all", data_dir: str | os.PathLike[str] | None = None
) -> ImageSet:
    """Load labelled pictures of any size.

    * ``tfds:NAME`` or ``tfds:NAME:CONFIG``: prepared, with one image and one label.
    * ``folder:DIR``: ``DIR/<split>/<class>/**``, or ``DIR/<class>/**`` for the split ``all``.
    * ``pictures:DIR``: all pictures below a folder, as one class, to be classified.
    * ``recognition:NAME`` or ``recognition:NAME:DIR``: one of `RECOGNITION_SETS`, in the layout of
      CoOp in ``DIR`` or among manual downloads, or else prepared by tfds; splits ``train``,
      ``val``, ``test``. ImageNet and its variants take names from CoOp's ``classnames.txt`` or else
      from the package open_clip_torch, if present.
    * ``stamps`` or ``stamps:DIR``: 435 drawings and photographs of 14 classes with captions, from
      the Debian package tuxpaint-stamps-default (GPL-2). Mirrored copies are left out.
    * ``emoji:VENDOR`` or ``emoji:VENDOR:DIR``: the emoji that apple, facebook, google and twitter
      all draw, in 9 categories and one order, from the npm package emoji-datasource-VENDOR.
    * ``synthetic:CLASSES``: noisy prototypes, for tests.

    Sources without splits have the single split ``all``.

    Args:
        split: a name, optionally with a slice: ``test[:2000]``.
        data_dir: directory of tfds; manual downloads are searched for in its ``downloads/manual``.

    Raises:
        FileNotFoundError: the data are missing; says how to get them.
        ValueError: an unknown source or split, or a package that is not installed.

    >>> digits = load_image_set("synthetic:10", split="test[:100]")
    >>> image, label = digits[0]
    >>> image.shape, len(digits), len(digits.class_names)
    ((16, 16, 3), 100, 10)
    """
    kind, _, location = spec.partition(":")
    name, start, stop = parse_split(split)
    if kind in ("stamps", "emoji") and name != "all":
        raise ValueError(f"{spec} has only the split 'all', got {name!r}")
    if kind == "tfds" and location:
        result = _tfds(location, name, data_dir)
    elif kind == "folder" and location:
        root = epath.Path(location).expanduser()
        if name == "all" and (splits := _splits_in(root)):
            raise ValueError(f"split: expected one of {', '.join(splits)}, the splits of {root}")
        files, classes = pictures.class_folders(root if name == "all" else root / name)
        result = _files(files, classes)
    elif kind == "pictures" and location and name == "all":
        files = pictures.pictures_below(epath.Path(location).expanduser())
        result = _files([(path, 0) for path in files], ["picture"])
    elif kind == "recognition" and location:
        result = _recognition(location, name, data_dir)
    elif kind == "stamps":
        result = _stamps(location, data_dir)
    elif kind == "emoji" and location:
        vendor, _, directory = location.partition(":")
        result = _emoji(vendor, directory, data_dir)
    elif kind == "synthetic" and location.isdigit():
        result = _synthetic(int(location), name)
    else:
        raise ValueError(
            f"unknown image source {spec!r}: expected tfds:NAME, folder:DIR, pictures:DIR, "
            "recognition:NAME, stamps, emoji:VENDOR or synthetic:CLASSES"
        )
    if start is not None or stop is not None:
        result = result[slice_of(start, stop, len(result))]
    result.source = f"{spec}[{split}]"
    return result


def _splits_in(root: epath.Path) -> list[str]:
    """Folders named like splits that contain folders but no pictures."""
    items = []
    for name in ("train", "val", "valid", "validation", "test"):
        inside = list((root / name).iterdir()) if (root / name).is_dir() else []
        inside = [path for path in inside if not path.name.startswith(".")]
        if any(path.is_dir() for path in inside) and all(path.is_dir() for path in inside):
            items.append(name)
    return items


def _files(
    files: Sequence[tuple[epath.Path, int]],
    classes: Sequence[str],
    captions: Sequence[str] | None = None,
) -> ImageSet:
    # Names and sizes identify the contents, so that no picture has to be read.
    described = [(path.name, path.stat().length, label) for path, label in files]

    def read(index: int) -> tuple[np.ndarray, int]:
        path, label = files[index]
        return np.asarray(pictures.read_picture(path)), label

    return ImageSet(
        read,
        lambda: np.array([label for _, label in files], np.int32),
        count=len(files),
        class_names=classes,
        fingerprint=digest(classes, described),
        source="files",
        captions=captions,
        files=[path for path, _ in files],
    )


def _arrays(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> ImageSet:
    if len(images) != len(labels):
        raise ValueError(
            f"labels: expected one for each of {len(images)} images, got {len(labels)}"
        )
    pictures.check_numbers(labels, len(classes), "labels")
    return ImageSet(
        lambda index: (_three_channels(images[index]), int(labels[index])),
        lambda: labels,
        count=len(labels),
        class_names=classes,
        fingerprint=digest(classes, images, labels),
        source="arrays",
    )


def _three_channels(image: np.ndarray) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    return np.repeat(image, 3, -1) if image.shape[-1] == 1 else image[..., :3]  # no alpha


def _tfds(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    builder, picture, label = pictures.open_labelled_images(name, split, data_dir)
    import tensorflow_datasets as tfds

    from logitjax.data._tfds import fingerprint_of

    rows: Any = builder.as_data_source(split=split)

    def read(index: int) -> tuple[np.ndarray, int]:
        row = rows[index]
        return _three_channels(pictures.as_bytes(row[picture])), int(row[label])

    def labels() -> np.ndarray:
        # Only labels, without decoding pixels.
        skipping = {picture: tfds.decode.SkipDecoding()}
        undecoded = builder.as_data_source(split=split, decoders=skipping)
        return np.array([row[label] for row in undecoded], np.int32)

    return ImageSet(
        read,
        labels,
        count=len(rows),
        class_names=builder.info.features[label].names,
        fingerprint=fingerprint_of(builder, split),
        source=name,
    )


def _recognition(location: str, split: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    name, _, directory = location.partition(":")
    root = epath.Path(directory).expanduser() if directory else manual_dir(data_dir)
    home = root / recognition_set(name).folder
    if directory or home.exists():
        recognition = _files(*files_of(name, root, split))
    else:
        spec, part = tfds_source(name, split, root)
        recognition, home = load_image_set(spec, split=part, data_dir=data_dir), root
    recognition.class_names = class_names_of(name, recognition.class_names, home)
    return recognition


def _stamps(directory: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    shared = "usr/share/tuxpaint/stamps"
    places = [directory] if directory else [shared, f"/{shared}"]
    root = fetched(places, data_dir=data_dir, what="stamps", install=_STAMPS_INSTALL)
    files, captions = [], []
    for number, folder in enumerate(STAMPS):
        for path in pictures.pictures_below(root / folder):
            text = path.with_suffix(".txt")
            # Mirrored copies have none.
            if text.exists():
                files.append((path, number))
                captions.append(text.read_bytes().decode(errors="replace").split("\n")[0].strip())
    if not files:
        raise FileNotFoundError(f"{root} has no stamps with captions")
    return _files(files, [folder.rpartition("/")[2] for folder in STAMPS], captions)


def _emoji(vendor: str, directory: str, data_dir: str | os.PathLike[str] | None) -> ImageSet:
    if vendor not in EMOJI_VENDORS:
        raise ValueError(f"emoji: expected one of {', '.join(EMOJI_VENDORS)}, got {vendor!r}")
    name = f"emoji-datasource-{vendor}"
    places = [directory] if directory else [f"emoji/{name}/package"]
    install = _EMOJI_INSTALL.format(name=name)
    root = fetched(places, data_dir=data_dir, what=name, install=install)
    entries = read_json(root / "emoji.json", form=list)
    # Only emoji that all vendors draw, so that their sets have the same entries.
    entries = [e for e in entries if all(e[f"has_img_{v}"] for v in EMOJI_VENDORS)]
    # Drop swatches of skin and hair, and sort, because each vendor has its own order.
    entries = [e for e in entries if e["category"] != "Component"]
    entries.sort(key=lambda entry: (entry["sort_order"], entry["unified"]))
    classes = sorted({entry["category"] for entry in entries})
    number = {category: i for i, category in enumerate(classes)}
    folder = root / "img" / vendor / "64"  # in pixels
    files = [(folder / entry["image"], number[entry["category"]]) for entry in entries]
    captions = [str(entry["name"] or entry["short_name"]).lower() for entry in entries]
    return _files(files, classes, captions)


def _synthetic(classes: int, split: str) -> ImageSet:
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (classes, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    rng = np.random.default_rng({"train": 1, "validation": 2}.get(split, 3))
    labels = rng.integers(classes, size=2048 if split == "train" else 512)
    noise = rng.normal(scale=60, size=(len(labels), 16, 16, 3))
    images = np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8)
    return _arrays(images, labels.astype(np.int32), [str(i) for i in range(classes)])
