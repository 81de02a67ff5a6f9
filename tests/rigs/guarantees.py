"""Everything that is called a bound, against float64: violations, NaNs, the cost of rounding.

    python -m tests.rigs guarantees
    python -m tests.rigs guarantees --scale=smoke --only=transport

Areas are modules `_guarantees_AREA`, each with `KINDS`, the kinds of case it makes, and
`run(kind, count, seed)`, which returns a row a case. Cases are drawn from a seed. Finished parts
lie in WORKDIR/guarantees/parts, and the same command goes on with those that are missing.
"""

import functools
import importlib
import zlib
from typing import Any

from etils import epath

from experiments.shared import suite
from experiments.shared.records import kept

AREAS = ("transport", "fusion", "leakage")
# Cases in a part, which is what a kill can cost.
_PART = 100


def run(options: suite.Options) -> suite.Result:
    """Runs the areas asked for, all if none is named."""
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    for name in options.parts(AREAS):
        area = importlib.import_module(f"tests.rigs._guarantees_{name}")
        cases = []
        for kind, (smoke, full) in area.KINDS.items():
            cases += _cases(area, name, kind, smoke if options.smoke else full, options)
        table, promised = area.report(cases)
        rows += table
        bars += promised
    return suite.Result(rows=rows, bars=bars)


def _cases(
    area: Any, name: str, kind: str, count: int, options: suite.Options
) -> list[dict[str, Any]]:
    cases = []
    letters = "".join(letter if letter.isalnum() else "_" for letter in kind)
    for start in range(0, count, _PART):
        size = min(_PART, count - start)
        path = options.directory / "parts" / f"{name}-{letters}-{start}-{size}.json"
        # Of the names, so that parts may run in any order and new kinds change no old ones.
        seed = zlib.crc32(path.stem.encode())
        part = kept(epath.Path(path), functools.partial(area.run, kind, size, seed))
        print(f"{name}, {kind}: {start + size} of {count} cases", flush=True)
        cases += [case | {"kind": kind} for case in part]
    return cases
