"""Data sets of the Hugging Face hub, through the package `datasets`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from logitjax.data._examples import Examples, parse_split
from logitjax.data._files import Report, normalised, part_of
from logitjax.storage import guard, require


@contextlib.contextmanager
def _opened(name: str, spec: str) -> Iterator[tuple[Any, list[str], str]]:
    """Yield `datasets`, its arguments and the split of `ORG/NAME[/CONFIG][:SPLIT]`."""
    path, _, split = name.partition(":")
    parts = path.split("/")
    datasets = require("datasets", extra="datasets")
    try:
        yield datasets, ["/".join(parts[:2]), *parts[2:3]], split
    except Exception as error:  # of many kinds
        raise ValueError(f"{spec}: {guard.one_line(error)}") from error


def hub_splits(name: str, spec: str) -> set[str]:
    with _opened(name, spec) as (datasets, arguments, split):
        return set() if split else set(datasets.get_dataset_split_names(*arguments))


def load_hub(
    name: str, *, split: str, on_error: str, spec: str, columns: Mapping[str, str] | None
) -> Examples:
    expected, _, _ = parse_split(split)
    with _opened(name, spec) as (datasets, arguments, local):
        if local and expected != "train":
            raise ValueError(f"split: expected a slice of 'train', which is {local}, got {split!r}")
        rows = datasets.load_dataset(*arguments, split=local or expected)

    def read(report: Report) -> Iterator[dict[str, Any]]:
        yield from normalised(enumerate(rows), f"{spec}, row", arguments[0], report, columns)

    return part_of(read, split=split, on_error=on_error, spec=spec)
