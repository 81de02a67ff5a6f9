"""Measurements on disk as JSON: a restarted run makes only the missing ones."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from logitjax import processes

Record = dict[str, Any]
kept = processes.kept


def tuned_seeds(
    path: Callable[[int], epath.Path],
    seeds: int,
    rates: Sequence[float],
    run: Callable[[int, Sequence[float]], Record],
) -> list[Record]:
    """Runs of an arm: the first seed tries every learning rate, the others use its best.

    Args:
        run: `(seed, rates)` to the record of the best of the rates, which it holds as `lr`.
    """
    records: list[Record] = []
    for seed in range(seeds):
        tried = (records[0]["lr"],) if records else rates
        records.append(kept(path(seed), functools.partial(run, seed, tried)))
    return records


def best_of(run: Callable[[float], Record], rates: Sequence[float]) -> Record:
    """The run with the smallest `validation_nll`; `tried` has those of all rates."""
    records = [run(rate) for rate in rates]
    tried = {str(rate): one["validation_nll"] for rate, one in zip(rates, records)}
    return min(records, key=lambda record: record["validation_nll"]) | {"tried": tried}


def by_key(records: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Records in groups, in order of each group's first record."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups


def remove_directory(directory: epath.Path) -> None:
    """Process 0 removes a folder if it is there; the others wait until it is gone."""
    processes.run_on_first(
        f"remove {directory.name}", lambda: directory.exists() and directory.rmtree()
    )
