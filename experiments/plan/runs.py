"""A whole run, from the plans of its programs: hours, chips, disk and money."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import yaml

from experiments.plan import chips
from experiments.shared.report import markdown_table

_PRICES = pathlib.Path(__file__).with_name("prices.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions that no compiler can replace.

    Attributes:
        utilisation: Share of the chips' bfloat16 peak that products reach. Measure it with the
            FLOP/s that a training run logs.
        failure_hours: Chip-hours between two failures. The default is that of Llama 3 (arXiv
            2407.21783, section 3.3.4): 419 in 54 days of 16,384 GPUs.
        restart_minutes: From a failure to the next update: a new machine, compilation, loading.
        checkpoint_minutes: Between two checkpoints. Half of it is lost with each failure.
        prices: Dollars for an hour of one chip, by chip.
    """

    utilisation: float = 0.4
    failure_hours: float = 50_000.0
    restart_minutes: float = 15.0
    checkpoint_minutes: float = 30.0
    prices: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation: expected above 0 and at most 1, got {self.utilisation}")
        for name in ("failure_hours", "restart_minutes", "checkpoint_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected above 0, got {getattr(self, name)}")


def read_prices(path: str) -> dict[str, float]:
    """Dollars of an hour of one chip, by chip, from a YAML file; by default the one beside this."""
    try:
        prices = yaml.safe_load(pathlib.Path(path or _PRICES).read_text())
        return {str(chip): float(price) for chip, price in prices.items()}
    except (OSError, AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"prices: {path}: {str(error).splitlines()[0]}") from None


def call_seconds(plan: Any, assumed: Assumptions) -> float:
    """Seconds of one call: of its products at that utilisation, or of its transfers."""
    chip = chips.parse_chip(plan.chip, plan.slices)
    if not chip.flops:
        raise ValueError(f"run: the peak of {chip.name} is not known, so no hours can be said")
    seconds = [plan.flops / plan.devices / (chip.flops * assumed.utilisation)]
    if chip.bandwidth:
        seconds.append(plan.received / chip.bandwidth)
    if chip.between:
        seconds.append(sum(plan.between_bytes.values()) / chip.between)
    return max(seconds)


def table(plans: Sequence[Any], assumed: Assumptions) -> list[dict[str, Any]]:
    """A row for each program of one run, then restarts, then the sum."""
    chip = chips.parse_chip(plans[0].chip, plans[0].slices)
    count, price = max(plan.devices for plan in plans), assumed.prices.get(chip.name)

    def row(name: str, hours: float, stored: float, **more: Any) -> dict[str, Any]:
        money = None if price is None else hours * count * price
        sizes = {"hours": hours, "chip-hours": hours * count, "disk, GB": stored / 1e9}
        return {"part": name, "calls": None, "PFLOP a call": None} | more | sizes | {"$": money}

    rows = []
    for plan in plans:
        work = {"calls": round(plan.times), "PFLOP a call": plan.flops / 1e15}
        hours = plan.times * call_seconds(plan, assumed) / 3600
        # Arms are trained one after another; each run keeps its own checkpoints.
        rows.append(row(plan.program, hours, plan.stored, **work))
    hours = sum(row["hours"] for row in rows)
    failures = hours * count / assumed.failure_hours
    lost = failures * (assumed.restart_minutes + assumed.checkpoint_minutes / 2) / 60
    rows.append(row(f"{failures:.2g} restarts", lost, 0.0))
    stored = sum(row["disk, GB"] for row in rows) * 1e9
    return [*rows, row("all", hours + lost, stored)]


def report(plans: Sequence[Any], assumed: Assumptions) -> str:
    """The table, and its assumptions."""
    if any(plan.error for plan in plans):
        return "A program does not fit, so no run is planned."
    if unknown := [plan.program for plan in plans if not plan.times]:
        return f"How often a run calls {unknown[0]} is not known, so no run is planned."
    first = plans[0]
    chip = chips.parse_chip(first.chip, first.slices)
    price = assumed.prices.get(chip.name)
    return (
        f"A run of {first.experiment}, preset {first.preset}, on "
        f"{max(plan.devices for plan in plans)} chips of {first.chip}:\n\n"
        f"{markdown_table(table(plans, assumed))}\n\n"
        f"At {assumed.utilisation:.0%} of the peak, or at the links' peak where that is slower; "
        f"a failure every {assumed.failure_hours:,.0f} chip-hours, {assumed.restart_minutes:g} "
        f"minutes a restart and a checkpoint every {assumed.checkpoint_minutes:g}; "
        + (f"${price:.2f} an hour of a chip" if price else "no price is known")
        + ". Evaluation and tokenisation are not in it."
    )


def fit_mesh(mesh: str, devices: int) -> str:
    """The mesh with as much `fsdp` as the devices allow; `data` takes the rest.

    >>> fit_mesh("data:-1,fsdp:32,tensor:2", 16)
    'data:-1,fsdp:8,tensor:2'
    """
    sizes = {name: int(size) for name, _, size in (part.partition(":") for part in mesh.split(","))}
    others = 1
    for name, size in sizes.items():
        others *= 1 if name in ("data", "fsdp") else size
    if devices % others:
        raise ValueError(f"mesh: {mesh} does not divide {devices} devices")
    if "fsdp" in sizes:
        sizes["fsdp"] = min(sizes["fsdp"], devices // others)
        # A slice has a power of two of chips.
        while devices // others % sizes["fsdp"]:
            sizes["fsdp"] -= 1
    if "data" in sizes:
        sizes["data"] = -1
    return ",".join(f"{name}:{size}" for name, size in sizes.items())
