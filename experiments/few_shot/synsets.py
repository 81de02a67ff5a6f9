"""ImageNet classes that stand for the classes of another data set, chosen by name alone.

They make a network with an ImageNet head a zero-shot classifier of the other data set. Unlike CLIP,
it cannot read a new name.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# By data set, the ImageNet classes of each of its own.
TABLES: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_name("synsets.toml").read_text()
)


def ids_of(table: Mapping[str, str], class_names: Sequence[str]) -> list[np.ndarray]:
    """ImageNet classes of every name, in the order of the names.

    Raises:
        ValueError: A name is not in the table.
    """
    unknown = [name for name in class_names if name not in table]
    if unknown:
        raise ValueError(f"class_names: no ImageNet classes are known for {unknown[0]!r}")
    return [np.unique(np.concatenate([_span(s) for s in table[n].split()])) for n in class_names]


def _span(text: str) -> np.ndarray:
    first, _, last = text.partition("-")
    return np.arange(int(first), int(last or first) + 1)
