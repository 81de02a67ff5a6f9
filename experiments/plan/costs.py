"""Costs of a compiled program: floating-point work of its jaxpr, collectives of its HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

_BITS = {"pred": 8, "c64": 64, "c128": 128, "bf16": 16}
_BITS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%([^ ]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<kind>[a-z][a-z0-9-]*)\((?P<rest>.*)"
)
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO; `length` is the number of iterations of a loop, if it could be read."""

    name: str
    type: str
    kind: str
    rest: str
    length: int | None = None

    def called(self, *roles: str) -> list[str]:
        called = []
        for role in roles:
            called += re.findall(rf"\b{role}=%([^\s,)}}]+)", self.rest)
            for group in re.findall(rf"\b{role}=\{{([^}}]*)\}}", self.rest):
                called += [part.strip().lstrip("%") for part in group.split(",")]
        return called


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
    """Bytes that one device exchanges with others in one run of a program.

    Attributes:
        calls: Number of calls, by kind.
        apart: Calls, by kind, that start and end separately, so that work fits in between.
        collective_bytes: Bytes, by kind, of the arrays before they are split or once joined.
        unknown_loops: Loops whose length could not be read; their contents count once.
        received: Lower bound of the bytes that reach the device from its slice, for any algorithm.
        between_calls: Number of sends to other slices, by kind.
        between_bytes: Bytes of these.
    """

    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    apart: Mapping[str, int] = dataclasses.field(default_factory=dict)
    collective_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    received: float = 0.0
    between_calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    between_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)


def collectives(text: str) -> Collectives:
    """The collectives of compiled HLO, those in loops as often as they run.

    An all-gather or all-reduce counts its output, a reduce-scatter its input: the whole array, of
    which a ring moves nearly all past every device (an all-reduce twice).
    """
    calls, apart = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    sizes: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    between: dict[str, list[float]] = {}
    unknown, received = 0, 0.0
    for name, instruction, times, _, started in _executed(text):
        kind = instruction.kind.removesuffix("-start")
        # Between slices the compiler has the hosts send, whose runtime then sums or joins.
        if present := instruction.kind == "send" and _BETWEEN.search(instruction.rest):
            sent = between.setdefault(present[1].lower().replace("_", "-"), [0, 0.0])
            sent[0] += times
            sent[1] += times * _first_bytes(instruction)
        elif kind in KINDS:
            size = _result_bytes(instruction)
            # The TPU compiler writes a reduce-scatter as an all-reduce that a fusion cuts.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                size *= _group_size(instruction.rest)
            calls[kind] += times
            apart[kind] += times * (started or instruction.kind.endswith("-start"))
            sizes[kind] += times * size
            received += times * size * _received_share(kind, _group_size(instruction.rest))
        elif instruction.kind == "while":
            unknown += instruction.length is None
    return Collectives(
        calls={kind: count for kind, count in calls.items() if count},
        apart={kind: count for kind, count in apart.items() if count},
        collective_bytes={kind: sizes[kind] for kind, count in calls.items() if count},
        unknown_loops=unknown,
        received=received,
        between_calls={kind: int(sent[0]) for kind, sent in between.items()},
        between_bytes={kind: sent[1] for kind, sent in between.items()},
    )


def estimated_cycles(text: str) -> float:
    """Read the TPU compiler's estimate of a program's cycles, loops as often as they run.

    It writes its estimate beside each fusion; without a TPU compiler's estimate, 0 is returned.
    Parallel work is added up, and copies that it starts early are not counted. Good for comparing
    programs of one chip.
    """
    total = 0.0
    for _, instruction, times, fused, _ in _executed(text):
        result = None if fused else _CYCLES.search(instruction.rest)
        if result and instruction.kind != "while":
            total += times * float(result[1])
    return total


def out_of_memory(error: jax.errors.JaxRuntimeError) -> tuple[str, float | None]:
    """The sentence with the numbers from a page of allocations, and the bytes requested.

    Raises:
        JaxRuntimeError: `error`, if it is about something else.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        raise error
    match = re.search(
        r"(?:required|Used).*?([\d.]+)([KMGT])\)? (?:exceeds|of) .*?[\d.]+[KMGT]\)?", text
    )
    if not match:
        return text.splitlines()[0][:200], None
    return match[0], float(match[1]) * 1024 ** (1 + "KMGT".index(match[2]))


_Executed = tuple[str, Instruction, int, bool, bool]


def _executed(text: str) -> Iterator[_Executed]:
    """Every instruction that runs: its computation, itself, how often, whether fused or started."""
    computations, entry = _parse(text)

    def visit(name: str, times: int, fused: bool, started: bool) -> Iterator[_Executed]:
        for instruction in computations.get(name, ()):
            if instruction.kind == "while":
                length = _trip_count(instruction, computations)
                instruction = dataclasses.replace(instruction, length=length)
            yield name, instruction, times, fused, started
            if instruction.kind == "while":
                for body in instruction.called("body"):
                    rounds = 1 if length is None else length
                    yield from visit(body, times * rounds, fused, started)
                continue
            roles = ("calls", "branch_computations", "true_computation", "false_computation")
            # Of those that start and end separately, the ones that sparse cores run.
            begins = instruction.kind in ("call-start", "async-start")
            if instruction.kind == "call" or begins:
                roles += ("to_apply",)
            for inner in instruction.called(*roles):
                both = fused or instruction.kind == "fusion"
                yield from visit(inner, times, both, started or begins)

    yield from visit(entry, 1, False, False)


def _received_share(kind: str, group: int) -> float:
    """The bytes of a collective that must reach a device of its group from the others."""
    if kind == "collective-permute":
        return 1.0
    if kind == "all-to-all":
        # It counts one device's share already, of which the device keeps a part.
        return 1.0 - 1.0 / group
    # Each device has a part of the sum to make, and in an all-reduce gets the other parts too.
    return (2.0 if kind == "all-reduce" else 1.0) * (1.0 - 1.0 / group)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            computations[name].append(
                Instruction(match["name"], match["type"], match["kind"], match["rest"])
            )
    return computations, entry


def _array_bytes(kind: str, sides: str) -> float:
    return _BITS.get(kind, 32) / 8 * math.prod(map(int, filter(None, sides.split(","))))


def _result_bytes(instruction: Instruction) -> float:
    arrays = _ARRAY.findall(instruction.type)
    sizes = [_array_bytes(*array) for array in arrays]
    if instruction.kind == "all-reduce-start" or not instruction.kind.endswith("-start"):
        return sum(sizes)
    # A pair of input and output, and marks of its progress.
    pairs = zip(sizes, arrays, strict=True)
    sizes = [size for size, (t, d) in pairs if d or t not in ("u32", "s32")]
    return sum(sizes[len(sizes) // 2 :])


def _first_bytes(instruction: Instruction) -> float:
    """The first array of a tuple: the data sent, without the marks beside it."""
    return _array_bytes(*_ARRAY.findall(instruction.type)[0])


def _group_size(rest: str) -> int:
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    # By axes of a mesh, or a part of one: mesh['fsdp'=4,'data'=2] {'fsdp','data':(1)2}.
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return 1


def _trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    (condition,) = loop.called("condition") or [""]
    inside = computations.get(condition, ())
    limits = [i.rest.split(")")[0] for i in inside if i.kind == "constant"]
    compared = [i for i in inside if i.kind == "compare" and "direction=LT" in i.rest]
    # Loops over a fixed range count up from zero.
    if len(limits) == 1 and len(compared) == 1 and limits[0].isdigit():
        return int(limits[0])
    return None


def devices_at_work(jaxpr: Any, arguments: Any) -> int:
    """Number of devices that share a program's work, without those that repeat others' work.

    An axis of the mesh counts if an argument or a constraint in the program is split over it, or if
    `shard_map` takes it.
    """
    sizes: dict[str, int] = {}

    def note(sharding: Any) -> None:
        if isinstance(sharding, jax.sharding.NamedSharding):
            for axes in sharding.spec:
                for axis in (axes,) if isinstance(axes, str) else axes or ():
                    sizes[axis] = sharding.mesh.shape[axis]

    def visit(jaxpr: Any) -> None:
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            name, params = equation.primitive.name, equation.params
            if name == "sharding_constraint":
                note(params["sharding"])
            elif name == "shard_map":
                sizes.update({a: params["mesh"].shape[a] for a in params["newly_manual_axes"]})
            for value in params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                        visit(inner)

    for leaf in jax.tree.leaves(arguments):
        note(getattr(leaf, "sharding", None))
    visit(jaxpr)
    return math.prod(sizes.values())
