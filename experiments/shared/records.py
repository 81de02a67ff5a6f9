"""What was measured lies on disk as JSON: a run that is started again measures what is missing."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from logitjax import processes

Record = dict[str, Any]


def kept(path: epath.Path, make: Callable[[], Any]) -> Any:
    """A record from disk, measured and written first if it is not there.

    Args:
        path: File of the record.
        make: Measures it; every process calls it.

    Returns:
        What JSON makes of the record, the same on every process.
    """
    if not processes.broadcast_from_first(path.exists):
        processes.write_json(path, make())
    return processes.broadcast_from_first(lambda: json.loads(path.read_text()))


def tuned_seeds(
    path: Callable[[int], epath.Path],
    seeds: int,
    rates: Sequence[float],
    run: Callable[[int, float], Record],
) -> list[Record]:
    """Runs of an arm: the first seed tries every learning rate, the others take its best.

    Args:
        path: File of a seed's record.
        seeds: Number of runs.
        rates: Learning rates to choose from.
        run: `(seed, rate)` to a record with `validation_nll` and `lr`.

    Returns:
        A record a seed.
    """
    records: list[Record] = []
    for seed in range(seeds):
        tried = (records[0]["lr"],) if records else rates

        def best(seed: int = seed, tried: Sequence[float] = tried) -> Record:
            runs = [run(seed, rate) for rate in tried]
            return min(runs, key=lambda record: record["validation_nll"])

        records.append(kept(path(seed), best))
    return records


def by_key(records: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Records in groups, in the order in which the groups begin."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups
