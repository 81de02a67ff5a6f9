"""Jane Austen's six novels: from the Debian package r-cran-janeaustenr, without R, or from text."""

import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from logitjax.data.builders._base import Builder, find, manual_dir

_INSTALL = (
    "apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb {manual_dir}"
)
_DATABASE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_TEXTS = "austen"
_NOVELS = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
_CHAPTER = re.compile(r"\s*chapter\s+([ivxlc]+|\d+)\.?\s*", re.IGNORECASE)
# Headings between chapters, endings, and an editor's note: not the novel's prose.
_HEADING = re.compile(
    r"volume [ivx]+|finis|the end|end of (volume \w+|the \w+ volume)", re.IGNORECASE
)
_NOTE = "A NOTE ON THE TEXT"
_HELD_OUT_PERCENT = 5
_STRING_VECTOR, _STRING = 16, 9


class Austen(Builder):
    """One example a chapter; the last 10% of every novel's chapters are held out, in order."""

    INSTALL = _INSTALL
    INFO: ClassVar = dict(
        description="Jane Austen's six novels, a chapter an example, lines unwrapped.",
        features={
            "text": tfds.features.Text(),
            "novel": tfds.features.ClassLabel(names=list(_NOVELS)),
            "chapter": tfds.features.Tensor(shape=(), dtype=np.int32),
        },
        supervised_keys=("text", "novel"),
        homepage="https://cran.r-project.org/package=janeaustenr",
        license="public domain (the package is MIT)",
    )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        manual = manual_dir(dl_manager)
        folder = epath.Path(manual) / _TEXTS if manual else None
        if folder is not None and folder.is_dir():
            novels = read_texts(folder)
        else:
            novels = read_novels(find_database(manual))
        return {
            name: self._generate_examples(novels, name) for name in ("train", "validation", "test")
        }

    def _generate_examples(
        self, novels: dict[str, list[str]], split: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for novel, chapters in novels.items():
            for number in _chapters_of(split, len(chapters)):
                yield (
                    f"{novel}/{number:03d}",
                    {"text": chapters[number], "novel": novel, "chapter": number + 1},
                )


def _chapters_of(split: str, count: int) -> range:
    held_out = max(1, round(count * _HELD_OUT_PERCENT / 100))
    bounds = (0, count - 2 * held_out, count - held_out, count)
    index = ("train", "validation", "test").index(split)
    return range(bounds[index], bounds[index + 1])


def find_database(manual_dir: str | os.PathLike[str] | None = None) -> epath.Path:
    """``Rdata.rdb``: where the .deb was unpacked, or where R packages are installed."""
    return find(
        (_DATABASE, "Rdata.rdb", f"/{_DATABASE}"),
        manual_dir,
        holds=lambda place: place.exists(),
        missing=f"austen is made from a Debian package that is missing: {_INSTALL}; or put the six "
        f"novels as text (Project Gutenberg has them) into {_TEXTS}/ there, named after their "
        "titles: 'Emma.txt', 'Mansfield Park.txt', ...",
    )


def read_texts(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Novel to its chapters' texts, from one plain text file a novel."""
    found = {}
    for path in epath.Path(folder).iterdir():
        title = re.sub(r"[\W_]+", " ", path.name.removesuffix(".txt")).lower()
        for name in _NOVELS:
            if name.lower() == title:
                found[name] = split_chapters(path.read_text().splitlines())
    missing = [name for name in _NOVELS if not found.get(name)]
    if missing:
        raise ValueError(f"{folder} has no chapters of {', '.join(missing)}")
    return {name: found[name] for name in _NOVELS}


def read_novels(database: epath.Path) -> dict[str, list[str]]:
    """Novel to its chapters' texts."""
    novels = {}
    for lines in read_string_vectors(database):
        title = next((name for name in _NOVELS if name.lower() == lines[0].strip().lower()), None)
        if title is not None:
            novels[title] = split_chapters(lines)
    missing = [name for name in _NOVELS if not novels.get(name)]
    if missing:
        raise ValueError(f"{database} has no text of {', '.join(missing)}")
    return {name: novels[name] for name in _NOVELS}


def split_chapters(lines: Sequence[str]) -> list[str]:
    """Chapters with their hard-wrapped paragraphs joined; what precedes the first is left out."""
    starts = [i for i, line in enumerate(lines) if _CHAPTER.fullmatch(line)]
    chapters = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        chapter = "\n".join(lines[start + 1 : stop]).partition(_NOTE)[0]
        blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", chapter)]
        kept = [block for block in blocks if block and not _HEADING.fullmatch(block.strip("()."))]
        chapters.append("\n\n".join(kept))
    return [chapter for chapter in chapters if chapter]


def read_string_vectors(database: epath.Path) -> list[list[str]]:
    """All objects of an R lazy-load database, each of which has to be a character vector.

    A database is a run of chunks: the unpacked length in 4 bytes, then a zlib stream holding R's
    serialisation in XDR.
    """
    data = database.read_bytes()
    vectors, position = [], 0
    while position < len(data):
        stream = zlib.decompressobj()
        try:
            raw = stream.decompress(data[position + 4 :])
            (length,) = struct.unpack_from(">I", data, position)
            if not stream.eof or len(raw) != length:
                raise ValueError("a chunk is cut short")
            vectors.append(_read_strings(raw))
        except (struct.error, ValueError, zlib.error) as error:
            raise ValueError(f"{database} is corrupt at byte {position}: {error}") from None
        position = len(data) - len(stream.unused_data)
    return vectors


def _read_strings(raw: bytes) -> list[str]:
    if raw[:2] != b"X\n":
        raise ValueError("not R's XDR serialisation")
    (version,) = struct.unpack_from(">i", raw, 2)
    position = 14
    if version >= 3:  # followed by the native encoding's name
        position += 4 + struct.unpack_from(">i", raw, position)[0]
    kind, count = struct.unpack_from(">ii", raw, position)
    if kind & 0xFF != _STRING_VECTOR:
        raise ValueError(f"expected a character vector, found R type {kind & 0xFF}")
    position += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", raw, position)
        if flags & 0xFF != _STRING:
            raise ValueError(f"expected a string, found R type {flags & 0xFF}")
        position += 8
        strings.append(raw[position : position + max(length, 0)].decode())
        position += max(length, 0)
    return strings
