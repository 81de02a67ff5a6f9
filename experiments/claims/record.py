"""Records of a run for a verdict: the value of every unit, and the run's settings."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pydantic

from experiments.claims.claim import ROOT, Setting, digest
from experiments.shared.report import environment

RECORDS = ROOT / "docs" / "results" / "claims"
#: Written with the first record: the thresholds promised before any result was seen.
THRESHOLDS = "thresholds.json"


class Record(pydantic.BaseModel):
    """One arm with one seed.

    Attributes:
        role: A `trial` chooses; a `report` is judged.
        setting: `claim.digest` of the setting it was made for.
        environment: Versions and device.
        validation: Validation score of every trial, larger is better; a trial has its own alone.
        chosen: The trial that this run used.
        edge: Whether that trial is at the edge of a grid.
        examples: Number of examples or tokens that it saw.
        cpu_seconds: CPU time that the run took.
        units: Digest of the units' names in their order.
        values: By metric: numbers, or bits in hexadecimal.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    arm: str
    seed: int
    role: Literal["trial", "report"]
    setting: str
    environment: dict[str, str]
    validation: list[float] = []
    chosen: int
    edge: bool
    trials: int
    updates: int
    examples: int
    cpu_seconds: float | None = None
    units: str
    count: int
    values: dict[str, list[float] | str]

    def of(self, metric: str) -> np.ndarray:
        """The value of every unit.

        Raises:
            ValueError: The record lacks the metric, or a unit.
        """
        values = self.values.get(metric)
        if values is None:
            raise ValueError(f"{self.arm}-{self.seed}: expected values of {metric}, got none")
        if isinstance(values, str):
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(values), np.uint8))
            if len(bits) - self.count not in range(8) or bits[self.count :].any():
                raise ValueError(
                    f"{self.arm}-{self.seed}: {metric}: expected {self.count} units, "
                    f"got {len(bits)} bits"
                )
            return bits[: self.count].astype(np.float64)
        if len(values) != self.count:
            raise ValueError(
                f"{self.arm}-{self.seed}: {metric}: expected {self.count} units, got {len(values)}"
            )
        return np.array(values, np.float64)


def make(
    setting: Setting,
    arm: str,
    seed: int,
    values: Mapping[str, Sequence[float] | str],
    *,
    units: Sequence[Any],
    examples: int,
    updates: int | None = None,
    tried: Sequence[float] = (),
    chosen: int = 0,
    edge: bool = False,
) -> Record:
    """A record of a setting; if `tried` has validation scores, the first seeds chose by them.

    Raises:
        ValueError: values of a metric that are not one for each unit.
    """
    chooses = len(tried) > 0 and seed < setting.choosers
    numbers = {n: v if isinstance(v, str) else digits(v) for n, v in values.items()}
    record = Record(
        arm=arm,
        seed=seed,
        role="trial" if chooses else "report",
        setting=digest(setting),
        environment=environment(),
        validation=digits(tried) if chooses else [],
        chosen=chosen,
        edge=edge,
        trials=len(tried) or 1,
        updates=setting.updates if updates is None else updates,
        examples=examples,
        units=names_digest(units),
        count=len(units),
        values=numbers,
    )
    for metric in record.values:
        record.of(metric)
    return record


def names_digest(names: Sequence[Any]) -> str:
    """A digest of units' names in their order."""
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()[:16]


def digits(values: Sequence[float]) -> list[float]:
    """Values rounded to the six digits that records keep."""
    return [float(f"{value:.6g}") for value in values]


def write(record: Record, folder: pathlib.Path) -> None:
    """Writes a record with one line a field, so that changes are easy to see."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = record.model_dump(mode="json", exclude_defaults=True)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(v)}" for name, v in fields.items())
    (folder / f"{record.arm}-{record.seed}.json").write_text(f"{{\n{lines}\n}}\n")


def made(folder: pathlib.Path, setting: Setting) -> bool:
    """Whether there are records, of all arms where each is a part; thresholds are only promised."""
    arms = {path.stem.rpartition("-")[0] for path in folder.glob("*-*.json")}
    return bool(arms) and (not setting.arm_flag or arms >= {*setting.arms})


def read(folder: pathlib.Path) -> Mapping[str, list[Record]]:
    """Records by arm, in the order of seeds.

    Raises:
        ValueError: A file is not a record, or not the one that its name says.
    """
    arms: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name == THRESHOLDS:
            continue
        try:
            record = Record.model_validate_json(path.read_text())
        except pydantic.ValidationError as error:
            raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
        if f"{record.arm}-{record.seed}" != path.stem:
            raise ValueError(f"{path.name}: expected {path.stem}, got {record.arm}-{record.seed}")
        arms.setdefault(record.arm, []).append(record)
    return {arm: sorted(records, key=lambda one: one.seed) for arm, records in arms.items()}
