"""Bound the Gromov-Wasserstein distance of two graphs, with proofs, beside a general solver.

    logitjax gw A.npy B.npy
    logitjax gw A.npy B.npy --solver=ott --bounds=third

A and B are square matrices, or with `--factors` the factors Z `[positions, nodes]` of graphs Z^T Z,
in numpy's .npy format. Nodes have equal weights. The values are Gromov-Wasserstein costs with p =
2, in units of the mean squared entry of B. `gap` is the value over the lower bound: no solution can
be better than the one shown by more than that factor. A solver's value is the cost of its plan once
its marginals are repaired. `--solver=pot` needs `pip install 'logitjax[benchmark]'`.
"""

import dataclasses
import importlib
import time
from typing import Any, Literal

import numpy as np

from logitjax import transport
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.tables import markdown_table
from logitjax.storage.weights import read_npy
from logitjax.transport import reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The two graphs, the bounds and the solver."""

    graphs: tuple[str, ...] = field(REQUIRED, "The two graphs, as .npy files.", positional=True)
    factors: bool = field(False, "Read the files as factors Z rather than matrices.")
    bounds: Literal["cheap", "sorted_rows", "third"] = field(
        "cheap", "Work for the lower bound: n^2 (cheap), n^2 log n (sorted_rows) or n^3 (third)."
    )
    refine: Literal["none", "exchange", "assignment", "search"] = field(
        "exchange", "How the coupling is improved, if both graphs have equally many nodes."
    )
    solver: Literal["none", "ott", "pot"] = field("none", "General solver to compare with.")


def run(config: Config) -> None:
    """Prints a table: closed form, certificate and, if asked for, the solver's value."""
    if len(config.graphs) != 2:
        raise ValueError(f"graphs: expected two files, got {len(config.graphs)}")
    if config.solver == "pot":
        _pot()  # Refused before the certificate is made, not after.
    matrices = [_read(path, config.factors) for path in config.graphs]
    c, d = (transport.FactoredGraph(x) if config.factors else x for x in matrices)
    sizes = [x.shape[-1] for x in matrices]
    refine = None
    if config.refine != "none" and sizes[0] == sizes[1]:
        refine = transport.Refinement(config.refine)
    start = time.perf_counter()
    answer = transport.certificate(c, d, bounds=config.bounds, refine=refine)
    seconds = time.perf_counter() - start
    unit = float(answer.units[1]) ** 2
    start = time.perf_counter()
    closed_form = float(transport.first_lower_bound(c, d, p=2)) / unit
    rows: list[dict[str, Any]] = [
        {"method": "closed form", "lower": closed_form, "seconds": time.perf_counter() - start},
        {
            "method": "certificate",
            "lower": float(answer.lower),
            "value": float(answer.upper),
            "gap": float(answer.gap),
            "seconds": seconds,
        },
    ]
    if config.solver != "none":
        wide = [x.astype(np.float64) for x in matrices]
        first, second = (x.T @ x if config.factors else x for x in wide)
        row, plan = _solve(config.solver, first, second)
        if plan is not None:
            judged = transport.certificate(first, second, candidates=[plan])
            value = float(judged.costs[0])
            lower = float(answer.lower)
            row |= {"value": value, "gap": value / lower if lower > 0 else float("inf")}
        rows.append(row)
    print(f"{sizes[0]} and {sizes[1]} nodes\n\n{markdown_table(rows)}")


def _read(path: str, factors: bool) -> np.ndarray:
    array = read_npy(path)
    if array.ndim != 2 or not (factors or array.shape[0] == array.shape[1]):
        wanted = "a factor [positions, nodes]" if factors else "a square matrix"
        raise ValueError(f"graphs: expected {wanted} in {path}, got shape {array.shape}")
    return array.astype(np.float32)


def _pot() -> Any:
    try:
        return importlib.import_module("ot")
    except ImportError:
        raise ImportError(
            "package ot is not installed: pip install 'logitjax[benchmark]'"
        ) from None


def _solve(solver: str, c: np.ndarray, d: np.ndarray) -> tuple[dict[str, Any], Any]:
    start = time.perf_counter()
    if solver == "ott":
        solution = reference.entropic_gw(c.astype(np.float32), d.astype(np.float32))
        row: dict[str, Any] = {"method": "ott, entropic", "seconds": time.perf_counter() - start}
        if not solution.converged:
            return row | {"note": solution.reason}, None
        return row, solution.plan
    ot = _pot()
    a, b = (np.full(len(x), 1 / len(x)) for x in (c, d))
    unit = np.sqrt(np.square(d).mean()) or 1.0
    plan = ot.gromov.gromov_wasserstein(c / unit, d / unit, a, b, loss_fun="square_loss")
    return {"method": "POT", "seconds": time.perf_counter() - start}, plan
