"""Gromov-Wasserstein between graphs of logits: closed form and certificate against general solvers.

    python -m experiments.benchmark gromov_wasserstein

Graphs: ``rank`` (node r is the r-th largest logit) and ``token`` (the n tokens of largest mass)
from SmolLM2-135M and a copy of it without four layers, on packaged Wikipedia summaries, as
probabilities or z-scores; ``gaussian`` (dense Gaussian columns). All are scaled jointly. Peers:
ott-jax (entropic, epsilon annealed to 0.01, and low rank) and, where installed
(``pip install 'logitjax[benchmark]'``), POT's conditional gradient from several starts. ``gap`` is
the value over the best upper bound known for that pair. Seconds are compared at equal quality only:
a peer's with those of the fastest of our certificates whose value is no higher.
"""

import dataclasses
import functools
import importlib.util
import math
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared import figures, suite
from experiments.shared.report import markdown_table
from experiments.shared.scaling import closed_form_rows, timed
from logitjax import data, losses, models, transport
from logitjax.commands import gw
from logitjax.transport import FactoredGraph

_TOKENS = (4, 512)
_K = 10
_SIZES = (8, 32, 128, 512, 2048, 8192)
# Above these sizes the n x n solvers take minutes.
_LARGEST = 512
_SHARES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
_SCALING = (1_000, 5_000, 20_000, 50_000, 150_000)


class Pair(NamedTuple):
    """Two graphs: ours and the teacher's."""

    family: str
    n: int
    c: FactoredGraph
    d: FactoredGraph


def run(options: suite.Options) -> suite.Result:
    sizes = (8, 32) if options.smoke else _SIZES
    statistics = None if options.smoke else real_statistics(max(sizes))
    rows: list[dict[str, Any]] = []
    for n in sizes:
        for pair in pairs(n, statistics):
            result = measure(pair, options)
            rows += result
            print(markdown_table(result), flush=True)
    scaling, powers = measure_scaling((200, 2_000) if options.smoke else _SCALING, options.repeats)
    unlike = measure_unlikeness(*((8, 2) if options.smoke else (64, 2)))
    pictures = {} if options.smoke else {"gromov_wasserstein": picture(rows)}
    pictures |= {} if options.smoke else {"gromov_wasserstein_unlike": unlike_picture(unlike)}
    return suite.Result(rows=rows + scaling + unlike, bars=bars(rows) + powers, pictures=pictures)


def real_statistics(width: int) -> dict[str, losses.GraphStatistics]:
    """The top logits of teacher and student at 2,048 positions of real text."""
    tokenizer = models.load_tokenizer("smollm2")
    examples = data.load_examples("tfds:wiki_summaries")
    text = "\n\n".join(examples[i]["text"] for i in range(60))
    tokens = np.asarray(tokenizer.encode(text)[: math.prod(_TOKENS)], np.int32).reshape(_TOKENS)
    teacher = models.load_model("smollm2")
    layers = teacher.config.num_layers
    student = models.keep_layers(teacher, [i for i in range(layers) if i not in (12, 14, 16, 18)])
    entries = {}
    for name, model in (("student", student), ("teacher", teacher)):
        graph, state = nnx.split(model)

        @jax.jit
        def statistics(state, tokens, graph=graph):
            model = nnx.merge(graph, state)
            hidden, _ = model.hidden_states(tokens[None])
            return losses.graph_statistics(model.logits(hidden)[0], width)

        parts = [statistics(state, row) for row in tokens]
        entries[name] = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return entries


def pairs(n: int, statistics: dict[str, losses.GraphStatistics] | None) -> list[Pair]:
    rng = np.random.default_rng(n)
    z, w = rng.normal(size=(2, 256, n)).astype(np.float32)
    items = [Pair("gaussian", n, FactoredGraph(z), FactoredGraph(w))]
    if statistics is None:
        return items
    x, y = (standardized(statistics[name])[:512, :n] for name in ("student", "teacher"))
    items.append(Pair("rank", n, FactoredGraph(x), FactoredGraph(y)))
    items.append(token_pair("token", n, statistics, probabilities))
    items.append(token_pair("token, z-scores", n, statistics, standardized))
    return items


def standardized(s: losses.GraphStatistics) -> np.ndarray:
    return (np.asarray(s.values) - np.asarray(s.mean)[:, None]) / np.asarray(s.std)[:, None]


def probabilities(s: losses.GraphStatistics) -> np.ndarray:
    return np.exp(np.asarray(s.values) - np.asarray(s.log_z)[:, None])


def token_pair(
    family: str,
    n: int,
    statistics: dict[str, losses.GraphStatistics],
    transform: Callable[[losses.GraphStatistics], np.ndarray],
) -> Pair:
    (x, x_ids), (y, y_ids) = (
        (transform(statistics[name]), np.asarray(statistics[name].indices))
        for name in ("student", "teacher")
    )
    # The tokens with the largest mass over both models are the nodes; the rest are dropped.
    mass = np.zeros(1 + max(x_ids.max(), y_ids.max()))
    for values, ids in ((x, x_ids), (y, y_ids)):
        np.add.at(mass, ids[:, :_K], values[:, :_K])
    array = np.full(len(mass), n, np.int32)
    chosen = np.argsort(-mass)[:n]
    array[chosen] = np.arange(len(chosen))
    token = [
        FactoredGraph(values[:, :_K], array[ids[:, :_K]], n)
        for values, ids in ((x, x_ids), (y, y_ids))
    ]
    return Pair(family, n, *token)


def measure(pair: Pair, options: suite.Options) -> list[dict[str, Any]]:
    """Values in units of the teacher's mean squared entry; seconds without compilation."""
    n = pair.n
    row_rms = transport.graph_features(
        pair.d.values, pair.d.ids, feature="row_rms", num_nodes=pair.d.num_nodes
    )
    unit = float(jnp.mean(jnp.square(row_rms))) ** 0.25
    c, d = (dataclasses.replace(g, values=g.values / unit) for g in (pair.c, pair.d))
    ours: dict[str, Callable[..., Any]] = {
        "closed form": lambda c, d: jnp.square(transport.first_lower_bound(c, d, p=1)),
        "certificate": functools.partial(transport.certificate, scale="none"),
    }
    refinements: dict[str, Any] = {
        "exchanged": ("exchange", "cheap"),
        "refined": ("search", "third"),
    }
    for name, (kind, bounds) in refinements.items() if n <= _LARGEST else ():
        refine: Any = transport.Refinement(kind)
        ours[f"certificate, {name}"] = functools.partial(
            transport.certificate, scale="none", refine=refine, bounds=bounds
        )
    rows = []
    for name, function in ours.items():
        step = jax.jit(function).lower(c, d).compile()
        # Certificates as users call them, with arrays: in float64. Memory is that of float32.
        called = function if name.startswith("certificate") else step
        answer, seconds = timed(functools.partial(called, c, d), options.repeats)
        row: dict[str, Any] = {"graph": pair.family, "n": n, "method": name}
        if name.startswith("certificate"):
            row |= {"value": float(answer.upper), "lower": float(answer.lower)}
        else:
            row |= {"lower": float(answer)}
        analysis = step.memory_analysis()
        if analysis is not None:
            row["MiB"] = analysis.temp_size_in_bytes / 2**20
        rows.append(row | {"seconds": seconds})
    if n <= _LARGEST:
        # Dense: ott's own factors would have one column a position, more than there are nodes.
        dense = [matrix(g).astype(np.float32) for g in (c, d)]
        solve = functools.partial(gw.entropic_gw, *dense, max_iterations=30)
        rows.append(solved(pair, "ott entropic 0.01", solve))
        solve = functools.partial(low_rank_gw, *(small_factor(matrix(g)).T for g in (c, d)))
        rows.append(solved(pair, "ott low rank", solve))
    if n <= _LARGEST and importlib.util.find_spec("ot"):
        rows.append(pot(pair, c, d, starts=3 if n > 128 else 10))
    # A sound upper bound is the cost of a coupling; an unconverged solver has none.
    best = min(row["value"] for row in rows if "value" in row)
    for row in rows:
        value = row.get("value", row.get("lower"))
        row["gap"] = value / best if value is not None and best > 0 else None
    return rows


def matrix(graph: FactoredGraph) -> np.ndarray:
    values = np.asarray(graph.values, np.float64)
    if graph.ids is None:
        return values.T @ values
    nodes = int(graph.num_nodes or 0)
    z = np.zeros((len(values), nodes + 1))
    np.put_along_axis(z, np.minimum(np.asarray(graph.ids), nodes), values, -1)
    return z[:, :nodes].T @ z[:, :nodes]


def small_factor(gram: np.ndarray) -> np.ndarray:
    """A factor with at most n rows, the fewest that ott can multiply by."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    return (np.sqrt(np.maximum(eigenvalues, 0)) * vectors).T


def low_rank_gw(z: np.ndarray, w: np.ndarray) -> tuple[Any, float, str]:
    """ott's low-rank plan for Z Z^T and W W^T, like `gw.entropic_gw`'s entropic one."""
    from ott.geometry.low_rank import LRCGeometry
    from ott.problems.quadratic.quadratic_problem import QuadraticProblem
    from ott.solvers.quadratic.gromov_wasserstein_lr import LRGromovWasserstein

    first, second = (LRCGeometry(jnp.asarray(side), jnp.asarray(side)) for side in (z, w))
    problem = QuadraticProblem(first, second)
    solver = LRGromovWasserstein(
        rank=10, min_iterations=0, max_iterations=2000, inner_iterations=10
    )
    output = jax.jit(solver)(problem)
    reason = "" if bool(output.converged) else "not converged"
    return output.matrix, float(output.primal_cost), reason


def solved(pair: Pair, name: str, solve: Callable[[], Any]) -> dict[str, Any]:
    answer: Any = None
    row: dict[str, Any] = {"graph": pair.family, "n": pair.n, "method": name}
    for _ in range(2):
        start = time.perf_counter()
        answer = solve()
        row["seconds"] = time.perf_counter() - start
        # The first call compiles, which is negligible beside such a long solve.
        if row["seconds"] > 60:
            break
    _, cost, reason = answer
    return row | ({"note": reason} if reason else {"value": cost})


def pot(pair: Pair, c: Any, d: Any, *, starts: int) -> dict[str, Any]:
    """The best of POT's conditional gradients: from the product, two sorted and random plans."""
    import ot

    n = pair.n
    x, y = (matrix(g) for g in (c, d))
    uniform = np.full(n, 1.0 / n)
    plans: list[Any] = [None]
    for f, g in ((x.sum(1), y.sum(1)), (np.square(x).sum(1), np.square(y).sum(1))):
        plans.append(np.zeros((n, n)))
        plans[-1][np.argsort(-f), np.argsort(-g)] = 1.0 / n
    rng = np.random.default_rng(0)
    while len(plans) < starts:
        plans.append(np.zeros((n, n)))
        plans[-1][np.arange(n), rng.permutation(n)] = 1.0 / n
    values, seconds = [], []
    tracemalloc.start()
    for plan in plans:
        start = time.perf_counter()
        _, log = ot.gromov.gromov_wasserstein(
            x, y, uniform, uniform, loss_fun="square_loss", G0=plan, log=True
        )
        seconds.append(time.perf_counter() - start)
        values.append(float(np.asarray(log["gw_dist"])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    row = {"graph": pair.family, "n": n, "method": f"POT, best of {len(values)}"}
    row |= {"value": min(values), "seconds": float(np.median(seconds)), "MiB": peak / 2**20}
    return row


def measure_scaling(
    sizes: Sequence[int], repeats: int
) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """The closed form on n token nodes, ten a position and n / 10 positions; no n x n anywhere."""

    rows = closed_form_rows(sizes, repeats)
    # Small sizes measure the call, so the slope is that of the larger ones.
    large = rows[1:] if len(rows) > 2 else rows
    logs = np.log([[row["n"], row["seconds"], row["MiB"]] for row in large])
    time_slope, memory_slope = (np.polyfit(logs[:, 0], logs[:, i], 1)[0] for i in (1, 2))
    return rows, [
        suite.at_most("closed form: exponent of time in n", float(time_slope), 1.2),
        suite.at_most("closed form: exponent of memory in n", float(memory_slope), 1.05),
    ]


def measure_unlikeness(n: int, pairs: int) -> list[dict[str, Any]]:
    """Upper over lower bound, by the share of the second graph's logits that come from elsewhere.

    Graphs of all n tokens at 64 positions; the logits are Gaussian, of deviation 3.
    """
    rows = []
    for share in _SHARES:
        rng = np.random.default_rng(0)
        logits, others = 3 * rng.normal(size=(2, pairs, 64, n))
        mixed = math.sqrt(1 - share**2) * logits + share * others
        order = rng.permutation(n)
        for name, transform in (("probabilities", jax.nn.softmax), ("z-scores", _z_scores)):
            z, w = (np.asarray(transform(x), np.float64) for x in (logits, mixed[..., order]))
            graphs = [(FactoredGraph(a), FactoredGraph(b)) for a, b in zip(z, w, strict=True)]
            refine = transport.Refinement("search", restarts=2)
            third = transport.certificate_many(graphs, bounds="third", refine=refine)
            # Both lower bounds beside one upper bound, the best.
            bounds = {"cheap": transport.certificate_many(graphs).lower, "third": third.lower}
            row = {"graph": f"unlike, {name}", "n": n, "share": share}
            for method, lower in bounds.items():
                gap = float(np.median(np.asarray(third.upper) / np.asarray(lower)))
                rows.append(row | {"method": method, "gap": gap})
    return rows


def _z_scores(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)


def unlike_picture(rows: Sequence[dict[str, Any]]) -> figures.Picture:
    def panel(kind: str) -> figures.Panel:
        points = {
            bounds: [
                (row["share"], row["gap"])
                for row in rows
                if row["graph"] == f"unlike, {kind}" and row["method"] == bounds
            ]
            for bounds in ("cheap", "third")
        }
        series = [figures.Series(name=name, runs=[result]) for name, result in points.items()]
        return figures.Panel(
            x=f"share of other logits, {kind}", y="upper / lower", log="xy", series=series
        )

    return figures.Picture(panels=[panel("probabilities"), panel("z-scores")])


def bars(rows: Sequence[dict[str, Any]]) -> list[suite.Bar]:
    table = {(row["graph"], row["n"], row["method"].partition(", best")[0]): row for row in rows}

    def peers(graph: str, n: int) -> float:
        names = ("ott entropic 0.01", "POT")
        solved = [table.get((graph, n, name), {}).get("value", math.inf) for name in names]
        return min(solved)

    items = []

    def bar(name: str, value: float, limit: float, sense: str = "<=") -> None:
        if math.isfinite(value):
            items.append(suite.Bar(name=name, value=value, limit=limit, sense=sense))

    for graph in ("token", "token, z-scores"):
        refined = table.get((graph, 512, "certificate, refined"))
        if refined is None:
            continue
        cheap = table[graph, 512, "certificate"]
        upper = refined["value"]
        bar(f"{graph}, n = 512: upper / best of POT and ott", upper / peers(graph, 512), 1.01)
        bar(f"{graph}, n = 512: upper / lower, cheap bounds", upper / cheap["lower"], 1.2)
        bar(f"{graph}, n = 512: upper / lower, opt-in bounds", upper / refined["lower"], 1.1)
    for graph, n in dict.fromkeys((row["graph"], row["n"]) for row in rows):
        for peer in ("ott entropic 0.01", "POT"):
            ratio = seconds_at_equal_quality(table, graph, n, peer)
            if n >= 512:
                bar(f"{graph}, n = {n}: seconds of {peer} / ours at its value", ratio, 1.0, ">=")
    refined = table.get(("gaussian", 128, "certificate, refined"))
    if refined is not None:
        ratio = refined["value"] / peers("gaussian", 128)
        bar("gaussian, n = 128: refined upper / best of POT and ott", ratio, 1.05)
    return items


def seconds_at_equal_quality(
    table: Mapping[tuple[str, int, str], dict[str, Any]], graph: str, n: int, peer: str
) -> float:
    """A peer's seconds over those of our fastest certificate of no higher value; NaN if none is."""
    other = table.get((graph, n, peer), {})
    ours = [
        row["seconds"]
        for (family, size, method), row in table.items()
        if (family, size) == (graph, n)
        and method.startswith("certificate")
        and row["value"] <= other.get("value", -math.inf)
    ]
    return other["seconds"] / min(ours) if ours else math.nan


def picture(rows: Sequence[dict[str, Any]]) -> figures.Picture:
    """Time and value of every method on token graphs, by nodes."""
    token = [row for row in rows if row["graph"] == "token"]

    def series(column: str) -> list[figures.Series]:
        points: dict[str, list[tuple[float, float]]] = {}
        for row in token:
            if row.get(column):
                name = row["method"].partition(", best")[0]
                points.setdefault(name, []).append((row["n"], row[column]))
        return [figures.Series(name=name, runs=[result]) for name, result in points.items()]

    named: dict[str, Any] = {"x": "nodes of each graph", "log": "xy"}
    return figures.Picture(
        panels=[
            figures.Panel(y="seconds", series=series("seconds"), **named),
            figures.Panel(y="value / best known value", series=series("gap"), **named),
        ]
    )
