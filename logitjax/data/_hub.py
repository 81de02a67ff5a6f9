"""Datasets of the Hugging Face hub, through the package `datasets`."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from logitjax.data._examples import Examples, parse_split
from logitjax.data._files import Report, normalised, part_of
from logitjax.storage import guard, require


def _parsed(name: str) -> tuple[list[str], str]:
    """`ORG/NAME[/CONFIG][:SPLIT]` as the arguments of `datasets`, and the split."""
    path, _, split = name.partition(":")
    parts = path.split("/")
    return ["/".join(parts[:2]), *parts[2:3]], split


@contextlib.contextmanager
def _naming(spec: str) -> Iterator[None]:
    """A line in place of the errors of `datasets`, whose kinds are many."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{spec}: {guard.one_line(error)}") from error


def hub_splits(name: str, spec: str) -> set[str]:
    """The splits of a dataset; none where the source names one."""
    arguments, split = _parsed(name)
    if split:
        return set()
    datasets = require("datasets", extra="datasets")
    with _naming(spec):
        return set(datasets.get_dataset_split_names(*arguments))


def load_hub(
    name: str, *, split: str, on_error: str, spec: str, columns: Mapping[str, str] | None
) -> Examples:
    """The rows of a split, which `datasets` maps from its files and does not hold."""
    arguments, own = _parsed(name)
    datasets = require("datasets", extra="datasets")
    wanted, _, _ = parse_split(split)
    if own and wanted != "train":
        raise ValueError(f"{spec}: expected a slice of 'train', which is {own}, got {split!r}")
    with _naming(spec):
        rows = datasets.load_dataset(*arguments, split=own or wanted)

    def read(report: Report) -> Iterator[dict[str, Any]]:
        yield from normalised(enumerate(rows), f"{spec}, row", arguments[0], report, columns)

    return part_of(read, split=split, on_error=on_error, spec=spec)
