"""What every arm scores, from what the models' heads see: one product with each head a position."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._dynamic_fusion_models import Scored
from logitjax.fusion import DynamicFusion, ProxyTuning
from logitjax.ops import log_softmax

#: One expert. ``static`` is proxy-tuning with the alpha that was best on validation data.
SINGLE: dict[str, Any] = {
    "proxy": ProxyTuning(),
    "dlf grid": DynamicFusion(method="grid"),
    "newton": DynamicFusion(method="newton"),
    "jeffreys": DynamicFusion(method="jeffreys"),
    "budget": DynamicFusion(method="budget"),
    "project": DynamicFusion(method="project"),
}
#: Several experts at once.
SEVERAL: dict[str, Any] = {
    "proxy": ProxyTuning(),
    "dlf grid, one a token": DynamicFusion(method="grid", multi="single"),
    "jeffreys, each alone": DynamicFusion(method="jeffreys", multi="per_expert"),
    "jeffreys, joint": DynamicFusion(method="jeffreys", multi="joint"),
    "project": DynamicFusion(multi="project"),
}
SUMS = ("nll", "accuracy", "alpha", "at_bound", "unconverged")


class Block:
    """Logits of a few positions of all models, float32 on the device."""

    def __init__(self, logits: Sequence[jax.Array], labels: np.ndarray, where: np.ndarray):
        self.large, self.base, *experts = logits
        self.experts = jnp.stack(experts)
        self.labels, self.where = jnp.asarray(labels), jnp.asarray(where)


def blocks(scored: Sequence[Scored], heads: Sequence[np.ndarray], size: int) -> Any:
    """Blocks of ``size`` positions; the last one is filled up with positions that do not count.

    Args:
      scored: of the large model, the base and the experts.
      heads: theirs, ``[vocab, width]``; one array where they share it.
      size: positions.
    """
    on_device: dict[int, jax.Array] = {}
    placed = [on_device.setdefault(id(head), jnp.asarray(head)) for head in heads]
    labels = scored[0].labels
    vocab = min(head.shape[0] for head in placed)
    for start in range(0, len(labels), size):
        rows = np.arange(start, start + size)
        where = rows < len(labels)
        rows = np.minimum(rows, len(labels) - 1)
        logits = [
            _logits(head, one.hidden[rows])[:, :vocab]
            for head, one in zip(placed, scored, strict=True)
        ]
        yield Block(logits, labels[rows], where)


@jax.jit
def _logits(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head.T


def _sums(
    logits: jax.Array, info: Mapping[str, Any], labels: jax.Array, where: jax.Array, options: Any
) -> dict[str, jax.Array]:
    """Sums over the positions that count."""
    nll = -jnp.take_along_axis(log_softmax(logits), labels[:, None], -1)[:, 0]
    if options is None:
        best = logits.argmax(-1)
    else:
        best = options[logits[:, options].argmax(-1)]
    values = {"nll": nll, "accuracy": best == labels}
    if "alpha" in info:
        values |= {
            "alpha": info["alpha"].sum(0),
            "at_bound": info["at_bound"],
            "unconverged": ~info["converged"],
        }
    return {name: jnp.where(where, value, 0).sum() for name, value in values.items()}


@functools.partial(jax.jit, static_argnames="strategy")
def _fused_sums(
    large: Any, experts: Any, base: Any, labels: Any, where: Any, options: Any, *, strategy: Any
) -> dict[str, jax.Array]:
    fused, info = strategy(large, experts, base)
    return _sums(fused, info, labels, where, options)


@jax.jit
def _alone_sums(logits: Any, labels: Any, where: Any, options: Any) -> dict[str, jax.Array]:
    return _sums(logits, {}, labels, where, options)


@jax.jit
def _static_sums(
    large: Any, experts: Any, base: Any, labels: Any, where: Any, options: Any, alphas: Any
) -> dict[str, jax.Array]:
    """As the others, with a leading axis of alphas ``[num]``, all experts by the same."""

    def one(alpha: jax.Array) -> dict[str, jax.Array]:
        return _sums(large + alpha * (experts - base).sum(0), {}, labels, where, options)

    return jax.lax.map(one, alphas)


class Totals:
    """Means by arm, collected block by block."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Any]] = {}
        self.count = 0

    def add(self, arm: str, sums: Mapping[str, Any]) -> None:
        held = self.sums.setdefault(arm, {})
        for name, value in jax.device_get(dict(sums)).items():
            held[name] = held.get(name, 0.0) + np.asarray(value, np.float64)

    def means(self, arm: str) -> dict[str, Any]:
        return {name: value / self.count for name, value in self.sums[arm].items()}


def score(
    scored: Sequence[Scored],
    heads: Sequence[np.ndarray],
    arms: Mapping[str, Any],
    *,
    block_size: int,
    static: Sequence[float] = (),
    options: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """Mean NLL and accuracy of every arm, of the models alone, and of static alphas.

    Args:
      scored: of the large model, the base and the experts.
      heads: theirs.
      arms: strategies.
      block_size: positions at a time.
      static: alphas of ``static ALPHA`` arms.
      options: token ids among which accuracy looks for the answer; the whole vocabulary if None.
    """
    totals = Totals()
    choices = None if options is None else jnp.asarray(options)
    for block in blocks(scored, heads, block_size):
        totals.count += int(block.where.sum())
        rest = (block.labels, block.where, choices)
        alone = {"large": block.large, "base": block.base}
        alone |= {f"expert {i}": logits for i, logits in enumerate(block.experts)}
        for name, logits in alone.items():
            totals.add(name, _alone_sums(logits, *rest))
        inputs = (block.large, block.experts, block.base, *rest)
        for name, strategy in arms.items():
            totals.add(name, _fused_sums(*inputs, strategy=strategy))
        if static:
            found = jax.device_get(_static_sums(*inputs, jnp.asarray(static, jnp.float32)))
            for i, alpha in enumerate(static):
                one = {name: value[i] for name, value in found.items()}
                totals.add(static_name(alpha), one | {"alpha": alpha * block.where.sum()})
    return {
        name: {key: float(value) for key, value in totals.means(name).items()}
        for name in totals.sums
    }


def score_alone(
    scored: Scored, head: np.ndarray, *, block_size: int, options: Sequence[int] | None = None
) -> dict[str, float]:
    """Mean NLL and accuracy of one model."""
    totals = Totals()
    choices = None if options is None else jnp.asarray(options)
    for block in blocks([scored, scored, scored], [head] * 3, block_size):
        totals.count += int(block.where.sum())
        totals.add("model", _alone_sums(block.large, block.labels, block.where, choices))
    return {key: float(value) for key, value in totals.means("model").items()}


def static_name(alpha: float) -> str:
    return f"static {alpha:g}"


def best_static(means: Mapping[str, Mapping[str, float]], alphas: Sequence[float]) -> float:
    """The alpha of the least NLL."""
    return min(alphas, key=lambda alpha: means[static_name(alpha)]["nll"])


@functools.partial(jax.jit, static_argnames="strategy")
def _trace(large: Any, experts: Any, base: Any, *, strategy: Any) -> jax.Array:
    return strategy(large, experts, base)[1]["alpha"]


def traces(
    scored: Sequence[Scored], heads: Sequence[np.ndarray], arms: Mapping[str, Any], size: int
) -> dict[str, list[list[float]]]:
    """Alphas ``[T][positions]`` of the dynamic arms on the first positions."""
    block = next(iter(blocks(scored, heads, size)))
    count = int(block.where.sum())
    return {
        name: np.asarray(_trace(block.large, block.experts, block.base, strategy=strategy))[
            :, :count
        ].tolist()
        for name, strategy in arms.items()
        if isinstance(strategy, DynamicFusion)
    }


def certify(
    scored: Sequence[Scored], heads: Sequence[np.ndarray], *, rows: int, block_size: int
) -> dict[str, dict[str, float]]:
    """How near each search comes to the global minimum of what it minimises, in float64.

    The reference scans 201 alphas and polishes its three best; the objective of `jeffreys` is
    ``(J - target)^2``, that of the others the paper's.
    """
    from scipy import optimize

    excess: dict[str, list[float]] = {}
    flagged: dict[str, list[bool]] = {}
    searches = {name: SINGLE[name] for name in ("dlf grid", "newton", "jeffreys")}
    for block in itertools.islice(blocks(scored, heads, block_size), -(-rows // block_size)):
        found = {
            name: jax.device_get(
                jax.jit(lambda *x, s=strategy: s(*x)[1])(block.large, block.experts[0], block.base)
            )
            for name, strategy in searches.items()
        }
        logits = (np.asarray(x, np.float64) for x in (block.large, block.experts[0], block.base))
        for i, row in enumerate(zip(*logits, strict=True)):
            if not block.where[i] or len(excess.get("newton", ())) >= rows:
                break
            divergences = _reference(*row)
            targets = divergences(None)
            values = np.linspace(0, 2, 201)
            scan = [divergences(a) for a in values]

            def paper(at: Any, targets: Any = targets) -> float:
                return sum((x - y) ** 2 for x, y in zip(at, targets, strict=True))

            def jeffreys(at: Any, targets: Any = targets) -> float:
                return (sum(at) - sum(targets)) ** 2

            for objective in (paper, jeffreys):
                seen = np.array([objective(at) for at in scan])
                best = seen.min()
                for k in np.argsort(seen)[:3]:
                    ends = max(values[k] - 0.01, 0), min(values[k] + 0.01, 2)
                    polished = optimize.minimize_scalar(
                        lambda a, objective=objective, at=divergences: objective(at(a)),
                        bounds=ends,
                        method="bounded",
                        options={"xatol": 1e-9},
                    )
                    best = min(best, polished.fun)
                for name, info in found.items():
                    if (name == "jeffreys") != (objective is jeffreys):
                        continue
                    alpha = float(info["alpha"][0, i])
                    excess.setdefault(name, []).append(objective(divergences(alpha)) - best)
                    flagged.setdefault(name, []).append(not bool(info["converged"][i]))
    table = {}
    for name, values in excess.items():
        good = np.array(values) <= 1e-6
        table[name] = {
            "rows": len(values),
            "within 1e-6 %": 100 * float(good.mean()),
            "flagged %": 100 * float(np.mean(flagged[name])),
            "others unflagged": int((~good & ~np.array(flagged[name])).sum()),
            "largest excess": float(max(values)),
        }
    return table


def _reference(large: np.ndarray, expert: np.ndarray, base: np.ndarray) -> Any:
    """Alpha to the two divergences; None to those of expert and base."""

    def normal(x: np.ndarray) -> np.ndarray:
        x = x - x.max()
        return x - np.log(np.exp(x).sum())

    p, q, r = normal(large), normal(expert), normal(base)
    d = q - r
    targets = float((np.exp(q) * d).sum()), float(-(np.exp(r) * d).sum())
    lead = float((np.exp(p) * d).sum())
    # The rest is below 1e-12 of the probability at any alpha.
    kept = np.maximum(p, p + 2 * (d - lead)) > -38
    p, d = p[kept], d[kept]

    def divergences(alpha: float | None) -> tuple[float, float]:
        if alpha is None:
            return targets
        x = p + alpha * d
        peak = x.max()
        weight = np.exp(x - peak)
        total = weight.sum()
        log_z = peak + np.log(total)
        return float(alpha * (weight @ d) / total - log_z), float(log_z - alpha * lead)

    return divergences
