"""WikiText-103 from its raw text files: the language modelling benchmark, an example an article."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from experiments.shared.builder import Builder

_FILES = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}
_INSTALL = (
    "put wiki.train.raw, wiki.valid.raw and wiki.test.raw (from wikitext-103-raw-v1.zip) into "
    "{manual_dir}"
)
# " = Title = " starts an article, " = = Section = = " does not.
_TITLE = re.compile(r" = ([^=\s].*?) = ")


class Wikitext103(Builder):
    """The published splits; the text as distributed, with its `` @-@ `` and `` @,@ ``."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTALL
    FEATURES: ClassVar = {"title": tfds.features.Text(), "text": tfds.features.Text()}
    PLACES = (".", "wikitext-103-raw")
    FILE = _FILES["train"]

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        folder = self.folder(dl_manager)
        return {split: self._generate_examples(folder / name) for split, name in _FILES.items()}

    def _generate_examples(self, path: epath.Path) -> Iterator[tuple[int, dict[str, str]]]:
        with path.open("r", encoding="utf-8") as file:
            for number, (title, text) in enumerate(split_articles(file)):
                yield number, {"title": title, "text": text}


def split_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Title and text of each article; a title stands between empty lines and opens its text."""
    title, empty_before = "", True
    kept: list[str] = []
    pending: str | None = None
    for line in lines:
        line = line.rstrip("\n")
        if pending is not None and not line.strip():
            if title:
                yield title, "\n".join(kept).strip()
            match = _TITLE.fullmatch(pending)
            title, kept = match[1] if match else "", [pending]
        elif pending is not None:
            kept.append(pending)
        pending = line if empty_before and _TITLE.fullmatch(line) else None
        empty_before = not line.strip()
        if pending is None:
            kept.append(line)
    if pending is not None:
        kept.append(pending)
    if title:
        yield title, "\n".join(kept).strip()
