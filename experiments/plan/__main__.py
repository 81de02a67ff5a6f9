"""Does a run fit? Compile a preset's programs for hardware you do not have, and count.

    python -m experiments.plan --experiment=graph_fusion --preset=paper --chip=v5p:4x4x8
    python -m experiments.plan --experiment=graph_fusion --preset=paper --chip=h100 \
        --mesh=data:1,fsdp:32,tensor:2
    python -m experiments.plan --experiment=graph_fusion --chip=v5p:4x4x8 --slices=2 \
        -- --accumulate=1
    python -m experiments.plan --command=convert-head --chip=v5e:2x2 -- --model=DIR --data=text:FILE

For TPUs the real compiler compiles ahead of time, on any machine (the extra `plan`, Python 3.12 or
newer). It gives bytes of a device, floating-point work, collectives by kind and bytes, and the
compiler's own verdict. No weights and no data are read. For GPUs the program is compiled for as
many CPU devices in the same mesh, and the result is marked as an estimate. Results are kept under
`--workdir`; `--report` prints all of them as the tables of docs/plans.md, and writes these with a
picture to WORKDIR/report.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from experiments.plan import chips, commands, costs, runs
from experiments.shared import figures
from experiments.shared.report import markdown_table, write_report
from logitjax import ops, training
from logitjax.commands import cli
from logitjax.commands.cli import field, nested

# The slice to plan for, by experiment, if no chip is named.
EXPERIMENTS = {
    "graph_fusion": "v5p:4x4x8",
    "vq_head": "v6e:2x2",
    "dual_head": "v5e:2x4",
    "few_shot": "v5e:2x2",
    "dynamic_fusion": "v5p:4x4x4",
    "replication": "v5e:2x2",
    "forgetting": "v5p:2x2x4",
    "leakage_audit": "v5e:2x2",
}
_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(costs.Collectives):
    """One program of one preset on one mesh, and its communication.

    Attributes:
        chip: The chip, as requested.
        estimate: Whether it was compiled for other devices than it is planned for.
        devices: Number of devices that share the work, without those that only repeat it.
        memory: Bytes of memory of a device; 0 if unknown.
        argument_bytes: Bytes of the arguments on one device, as are all bytes.
        output_bytes: Bytes of the outputs, including those stored in donated arguments.
        alias_bytes: Bytes of the arguments whose place outputs take.
        temp_bytes: Bytes that the program needs in addition.
        peak_bytes: Largest total of these at any time; 0 if the compiler does not report it.
        flops: Floating-point work of all matrix products, on all devices together.
        gradient: Bytes of the whole gradient of all trained arrays; 0 if there are none.
        cycles: The TPU compiler's own estimate, loops as often as they run; 0 of another compiler.
        seconds: Seconds of the compilation.
        times: Number of times a run calls the program; 0 if the run decides.
        stored: Bytes of outputs on disk at a run's end.
        error: The compiler's message if the program does not fit.
    """

    experiment: str
    preset: str
    program: str
    chip: str
    mesh: str
    estimate: bool
    devices: int
    memory: float
    flops: float
    slices: int = 1
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    peak_bytes: int = 0
    gradient: float = 0.0
    cycles: float = 0.0
    seconds: float = 0.0
    times: float = 0.0
    stored: float = 0.0
    error: str = ""
    versions: str = ""

    @property
    def needed(self) -> int:
        """Bytes of a device while the program runs."""
        stored = self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes
        return max(stored, self.peak_bytes)

    @property
    def crossing(self) -> float:
        """Bytes that one slice sends to the others."""
        return sum(self.between_bytes.values()) * self.devices / self.slices

    @property
    def verdict(self) -> str:
        if self.error:
            return f"does not fit: {self.error}"
        size = f"{self.needed / _GIB:.2f} GiB"
        if not self.memory:
            return f"needs {size}"
        fits = "fits" if self.needed <= self.memory else "does not fit"
        return f"{fits}: {size} of {self.memory / _GIB:.4g} GiB"


def make_plan(traced: Any, chip: chips.Chip, *, devices: int, mesh: str = "", **names: str) -> Plan:
    """Lower, compile and count one traced program."""
    existing: dict[str, Any] = dict(
        **names,
        chip=chip.topology or f"{chip.name}:{devices}",
        mesh=mesh,
        estimate=chip.kind == "gpu",
        slices=chip.slices,
        devices=devices,
        memory=chip.memory,
        flops=training.matmul_flops(traced.jaxpr),
        versions=_versions(chip),
    )
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused, _ = costs.out_of_memory(error)
        return Plan(**existing, error=refused, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    return Plan(
        **existing,
        argument_bytes=int(memory.argument_size_in_bytes),
        output_bytes=int(memory.output_size_in_bytes),
        alias_bytes=int(memory.alias_size_in_bytes),
        temp_bytes=int(memory.temp_size_in_bytes),
        peak_bytes=int(getattr(memory, "peak_memory_in_bytes", 0)),
        **vars(costs.collectives(text)),
        cycles=costs.estimated_cycles(text),
        seconds=seconds,
    )


def _versions(chip: chips.Chip) -> str:
    if chip.kind != "tpu":
        return f"jax {jax.__version__}"
    from importlib import metadata

    return f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}"


def plans(
    experiment: str,
    preset: str,
    chip: chips.Chip,
    *,
    arguments: Sequence[str] = (),
    mesh: str = "",
    every: bool = False,
) -> Iterator[Plan]:
    """The main program of a preset, or all that the experiment names, one after another.

    The arguments are flags of the experiment, which override the preset.
    """
    settings = importlib.import_module(f"experiments.{experiment}.config")
    module = importlib.import_module(f"experiments.{experiment}.programs")
    if preset not in settings.PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(settings.PRESETS)}, got {preset!r}")
    arguments = [f"--preset={preset}", *arguments]
    (config,) = cli.parse([settings.Config], settings.PRESETS, arguments)
    names = {"experiment": experiment, "preset": " ".join([preset, *arguments[1:]])}
    yield from _plans_of(module.programs, config, chip, mesh=mesh, every=every, **names)


def command_plans(
    command: str, arguments: Sequence[str], chip: chips.Chip, *, mesh: str = "", every: bool = False
) -> Iterator[Plan]:
    """The programs of a command that trains, with the flags that it would be run with."""
    if command not in commands.COMMANDS:
        raise ValueError(f"command: expected one that trains, got {command!r}")
    config_class, programs = commands.COMMANDS[command]
    (config,) = cli.parse([config_class], None, arguments)
    names = {"experiment": f"logitjax {command}", "preset": " ".join(arguments)}
    yield from _plans_of(programs, config, chip, mesh=mesh, every=every, **names)


def _plans_of(
    programs: Callable[..., Iterator[training.Program]],
    config: cli.Dataclass,
    chip: chips.Chip,
    *,
    mesh: str,
    every: bool,
    **names: str,
) -> Iterator[Plan]:
    has_mesh = "mesh" in {field.name for field in dataclasses.fields(config)}
    if mesh:
        if not has_mesh:
            raise ValueError(f"mesh: {names['experiment']} runs on one device")
        config = dataclasses.replace(config, mesh=mesh)
    devices = chips.devices_of(chip)
    if has_mesh:
        names["mesh"] = dataclasses.asdict(config)["mesh"]
        made = training.make_mesh(names["mesh"], devices=devices)
    else:
        made = training.make_mesh("data:1", devices=devices[:1])
    for program in programs(config, made):
        traced = program.trace()
        devices = costs.devices_at_work(traced.jaxpr, program.arguments)
        plan = make_plan(traced, chip, devices=devices, program=program.name, **names)
        outputs = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(traced.out_info))
        yield dataclasses.replace(
            plan,
            gradient=_gradient_bytes(program.arguments),
            times=program.calls,
            stored=outputs * program.kept,
        )
        if not every:
            return


def _gradient_bytes(arguments: Sequence[Any]) -> float:
    """Bytes of trained arrays: Adam's first moment has exactly these, in float32 as ours."""
    leaves = jax.tree_util.tree_flatten_with_path(arguments)[0]
    moments = [leaf for path, leaf in leaves if "/mu/" in ops.mesh.path_string(path) + "/"]
    return float(sum(4 * leaf.size for leaf in moments))


def report(plan: Plan) -> str:
    """A plan in words."""
    lines = [
        f"{plan.experiment}, preset {plan.preset}: {plan.program}",
        f"  on {plan.devices} devices of "
        + (f"{plan.slices} slices of " if plan.slices > 1 else "")
        + plan.chip
        + (f", mesh {plan.mesh}" if plan.devices > 1 else ""),
        f"  {'ESTIMATE: ' if plan.estimate else ''}{plan.verdict}",
    ]
    if not plan.error:
        parts = (("arguments", plan.argument_bytes), ("temporary", plan.temp_bytes))
        parts += (("outputs beside", plan.output_bytes - plan.alias_bytes),)
        sizes = ", ".join(f"{name} {size / _GIB:.3f} GiB" for name, size in parts)
        lines.append(f"  a device holds {sizes}")
    lines.append(f"  matrix products: {plan.flops / 1e12:.4g} TFLOP in all")
    chip = chips.parse_chip(plan.chip)
    if chip.flops:
        seconds = plan.flops / plan.devices / chip.flops
        lines.append(f"  at the chips' bfloat16 peak that is {seconds:.3g} s, so no run takes less")
    if chip.hbm and not plan.error:
        seconds = (plan.argument_bytes + plan.output_bytes) / chip.hbm
        lines.append(f"  reading the arguments and writing the outputs once takes {seconds:.3g} s")
    if plan.cycles:
        estimate = f"{plan.cycles / 1e6:.4g} Mcycles"
        if chip.clock:
            estimate += f", {plan.cycles / chip.clock:.3g} s"
        lines.append(f"  the compiler's estimate, collectives left out: {estimate}")
    if chip.bandwidth and plan.received:
        seconds = plan.received / chip.bandwidth
        lines.append(
            f"  at least {plan.received / _GIB:.4g} GiB reach a device from its slice: "
            f"{seconds:.3g} s at the links' peak"
        )
    for kind, calls in plan.calls.items():
        size = plan.collective_bytes[kind] / _GIB
        apart = f", {plan.apart[kind]} start and end apart" if kind in plan.apart else ""
        lines.append(f"  {kind}: {calls} calls, {size:.4g} GiB a device{apart}")
    for kind, calls in plan.between_calls.items():
        size = plan.between_bytes[kind] * plan.devices / plan.slices / _GIB
        lines.append(f"  between slices, {kind}: {calls} calls, {size:.4g} GiB of a whole slice")
    if plan.between_calls:
        seconds = sum(plan.between_bytes.values()) / chip.between
        lines.append(f"  at the network's peak that is {seconds:.3g} s")
        if plan.gradient:
            lines.append(
                f"  the gradient has {plan.gradient / _GIB:.4g} GiB: "
                f"{plan.crossing / plan.gradient:.3f} times that leaves a slice"
            )
    if plan.unknown_loops:
        lines.append(f"  (what is in {plan.unknown_loops} loops of unknown length counts once)")
    lines.append(f"  compiled in {plan.seconds:.0f} s ({plan.versions})")
    return "\n".join(lines)


def tables(plans: Sequence[Plan]) -> dict[str, list[dict[str, Any]]]:
    """Rows of memory and of work, one a program."""
    memory, work = [], []
    for plan in plans:
        name = {"experiment": plan.experiment, "program": plan.program, "chip": plan.chip}
        failed = bool(plan.error)
        memory.append(
            name
            | {
                "mesh": plan.mesh if plan.devices > 1 else "one device",
                "arguments, GiB": None if failed else plan.argument_bytes / _GIB,
                "temporary, GiB": None if failed else plan.temp_bytes / _GIB,
                "verdict": ("estimate: " if plan.estimate else "") + plan.verdict,
            }
        )
        kinds = (
            f"{kind} {size / _GIB:.3g} in {plan.calls[kind]}"
            for kind, size in plan.collective_bytes.items()
        )
        work.append(
            name
            | {
                "devices": plan.devices,
                "TFLOP": plan.flops / 1e12,
                "seconds, at least": _seconds(plan),
                "leaves a slice": f"{plan.crossing / _GIB:.3g} GiB" if plan.between_calls else "-",
                "collectives of a device: GiB in calls": ", ".join(kinds) or "none",
            }
        )
    return {"memory": memory, "work": work}


def markdown(plans: Sequence[Plan]) -> str:
    """Both tables as text."""
    versions = sorted({plan.versions for plan in plans})
    shown = map(markdown_table, tables(plans).values())
    return "\n\n".join([*shown, f"Compiled with {'; '.join(versions)}."])


def picture(plans: Sequence[Plan]) -> figures.Picture:
    """Draw each device's need and memory, a row a plan; a program that does not fit has no need."""
    rows = list(reversed(plans))

    def name(plan: Plan) -> str:
        slices = f"{plan.slices} slices of " if plan.slices > 1 else ""
        mesh = f"\n{plan.mesh}" if plan.devices > 1 else ""
        return f"{plan.experiment}, {slices}{plan.chip}{mesh}"

    def series(what: str, size: Callable[[Plan], float]) -> figures.Series:
        points = [(size(plan) / _GIB, float(row)) for row, plan in enumerate(rows) if size(plan)]
        return figures.Series(name=what, runs=[points], line=False)

    panel = figures.Panel(
        x="memory of a device, GiB",
        y="program",
        log="x",
        series=[
            series("arguments", lambda plan: plan.argument_bytes),
            series("needed", lambda plan: plan.needed),
            series("there is", lambda plan: plan.memory),
        ],
        y_ticks={name(plan): float(row) for row, plan in enumerate(rows)},
        names="beside",
        height=1.0 + 0.3 * len(rows),
    )
    return figures.Picture(panels=[panel])


def _seconds(plan: Plan) -> str:
    """Lower bounds of the time of products, of the links of a slice and of those between slices."""
    chip = chips.parse_chip(plan.chip)
    if not chip.flops:
        return "-"
    bounds = [("products", plan.flops / plan.devices / chip.flops)]
    bounds += [("links", plan.received / chip.bandwidth)] if plan.received else []
    sent = sum(plan.between_bytes.values())
    bounds += [("network", sent / chip.between)] if sent else []
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in bounds)


def read(workdir: epath.Path) -> list[Plan]:
    """All stored plans, in the order of the experiments."""
    items = [Plan(**json.loads(path.read_text())) for path in sorted(workdir.glob("*.json"))]
    order = {name: location for location, name in enumerate(EXPERIMENTS)}
    return sorted(items, key=lambda plan: (order.get(plan.experiment, len(order)), plan.estimate))


def keep(plan: Plan, workdir: epath.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    words = (plan.experiment, plan.preset, plan.program, plan.chip, plan.mesh)
    name = re.sub(r"[^\w.]+", "-", "-".join(words))
    if len(name) > 200:
        # The preset and mesh of a command include all its flags, and a file's name has 255 bytes.
        name = f"{name[:160]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    (workdir / f"{name}.json").write_text(json.dumps(dataclasses.asdict(plan), indent=1) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to plan, and for which hardware."""

    experiment: str | None = field(
        None, "Experiment whose programs to plan.", choices=tuple(EXPERIMENTS)
    )
    command: str | None = field(
        None, "Training command, such as convert-head; its flags follow --."
    )
    preset: str = field("paper", "Preset of the experiment; its own flags, after --, override it.")
    arguments: tuple[str, ...] = field(
        (), "Flags of the experiment or the command, after --.", positional=True
    )
    mesh: str = field("", "Axes and sizes of the mesh, in place of the preset's.")
    chip: str | None = field(
        None,
        "Chips to plan for: v5p:4x4x8, v5e:..., v6e:..., h100[:COUNT], h200[:COUNT] or cpu:COUNT.",
    )
    slices: int = field(
        1, "Number of such TPU slices; each has the mesh, joined by dcn_data.", minimum=1
    )
    all: bool = field(False, "Plan every program of the experiment, not only the main one.")
    run: bool = field(False, "Print the cost of a whole run: hours, chips, disk and money.")
    smallest: bool = field(False, "Look for the smallest slice in which the run fits.")
    assumed: runs.Assumptions = nested(without=("prices",))
    prices: str = field(
        "", "YAML file: dollars of an hour of each chip. By default experiments/plan/prices.yaml."
    )
    workdir: str = field("runs/plans", "Folder in which plans are kept.")
    report: bool = field(False, "Report the stored plans in WORKDIR/report, and stop.")


def run(config: Config) -> None:
    """Plan, print and keep programs, or report those that are kept."""
    # A plan says how long its compilation took.
    jax.config.update("jax_enable_compilation_cache", False)
    workdir = epath.Path(config.workdir)
    if config.report:
        items = read(workdir)
        compiled = sorted({plan.versions for plan in items})
        text = write_report(
            workdir / "report",
            f"# Plans\n\n{markdown(items)}\n\n![memory of a device](memory.png)",
            tables=tables(items) | {"compiled with": [{"versions": v} for v in compiled]},
            pictures={"memory": picture(items)},
        )
        print(text)
        return
    if (config.experiment is None) == (config.command is None):
        raise ValueError(
            f"experiment: expected one of {', '.join(EXPERIMENTS)}, or a --command that trains"
        )
    own, mesh = _mesh_of(config.experiment, config.preset), config.mesh
    chip = chips.parse_chip(
        config.chip or EXPERIMENTS.get(config.experiment or "", "v5e:2x2"), config.slices
    )
    if config.slices > 1 and "dcn_data" not in mesh:
        # Each slice gets the preset's mesh.
        mesh = f"dcn_data:{config.slices},{mesh or own}"
    chips.prepare(chip, mesh or own)
    assumed = config.assumed
    if config.run:
        assumed = dataclasses.replace(assumed, prices=runs.read_prices(config.prices))
    if config.command:
        plan = functools.partial(command_plans, config.command, config.arguments)
    else:
        assert config.experiment is not None
        plan = functools.partial(
            plans, config.experiment, config.preset, arguments=config.arguments
        )
    if config.smallest:
        chip, mesh = _smallest(plan, chip, mesh or own)
    items = []
    for one in plan(chip, mesh=mesh, every=config.all or config.run):
        print(report(one), flush=True)
        keep(one, workdir)
        items.append(one)
    if config.run:
        print(runs.report(items, assumed))


def _smallest(
    plan: Callable[..., Iterator[Plan]], chip: chips.Chip, mesh: str
) -> tuple[chips.Chip, str]:
    for topology in chips.SLICES[chip.name]:
        smaller = chips.parse_chip(f"{chip.name}:{topology}")
        fitted = runs.fit_mesh(mesh, math.prod(map(int, topology.split("x"))))
        (result,) = plan(smaller, mesh=fitted)
        print(f"{smaller.topology}, mesh {fitted}: {result.verdict}", flush=True)
        if not result.error and result.needed <= result.memory:
            return smaller, fitted
    raise ValueError(f"smallest: no slice of {chip.name} holds the program")


def _mesh_of(experiment: str | None, preset: str) -> str:
    if experiment is None:
        return "data:1"
    module = importlib.import_module(f"experiments.{experiment}.config")
    return module.PRESETS.get(preset, {}).get("mesh", "data:1")


if __name__ == "__main__":
    cli.main(Config, None, run)
