"""Scores of every arm from the models' hidden states: one product with each head a position."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.dynamic_fusion.train import Scored
from logitjax.fusion import DynamicFusion, ProxyTuning
from logitjax.ops import log_softmax

#: One expert. `static` is proxy-tuning with the alpha that was best on validation data.
SINGLE: dict[str, Any] = {
    "proxy": ProxyTuning(),
    "dlf grid": DynamicFusion(method="grid"),
    "jeffreys": DynamicFusion(method="jeffreys"),
    "project": DynamicFusion(method="project"),
}
#: Several experts at once.
SEVERAL: dict[str, Any] = {
    "proxy": ProxyTuning(),
    "dlf grid, one a token": DynamicFusion(method="grid", multi="single"),
    "jeffreys, joint": DynamicFusion(method="jeffreys", multi="joint"),
}


class Block:
    """Logits of a few positions of all models, float32 on the device."""

    def __init__(self, logits: Sequence[jax.Array], labels: np.ndarray, where: np.ndarray):
        self.large, self.base, *experts = logits
        self.experts = jnp.stack(experts)
        self.labels, self.where = labels, where


def blocks(scored: Sequence[Scored], heads: Sequence[np.ndarray], size: int) -> Any:
    """Blocks of `size` positions; the last is filled up with positions that do not count.

    Heads are `[vocab, width]`, one array if models share it.
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


@jax.jit
def _sums(
    logits: jax.Array, info: Mapping[str, Any], labels: jax.Array, where: jax.Array, options: Any
) -> dict[str, jax.Array]:
    nll = -jnp.take_along_axis(log_softmax(logits), labels[:, None], -1)[:, 0]
    if options is None:
        best = logits.argmax(-1)
    else:
        best = options[logits[:, options].argmax(-1)]
    values = {"nll": nll, "accuracy": best == labels}
    if "alpha" in info:
        values |= {"alpha": info["alpha"].sum(0), "at_bound": info["at_bound"]}
    return {name: jnp.where(where, value, 0).sum() for name, value in values.items()}


@functools.partial(jax.jit, static_argnames="strategy")
def _fused(large: Any, experts: Any, base: Any, *, strategy: Any) -> tuple[jax.Array, Any]:
    return strategy(large, experts, base)


@jax.jit
def _static_sums(
    large: Any, experts: Any, base: Any, labels: Any, where: Any, options: Any, alphas: Any
) -> dict[str, jax.Array]:
    """Like the other arms, with a leading axis of alphas `[num]`; all experts use the same one."""

    def one(alpha: jax.Array) -> dict[str, jax.Array]:
        return _sums(large + alpha * (experts - base).sum(0), {}, labels, where, options)

    return jax.lax.map(one, alphas)


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
        static: alphas of `static ALPHA` arms.
        options: token ids among which accuracy looks for the answer; the whole vocabulary if None.
    """
    totals: dict[str, dict[str, Any]] = {}
    count = 0

    def add(arm: str, sums: Mapping[str, Any]) -> None:
        stored = totals.setdefault(arm, {})
        for name, value in jax.device_get(dict(sums)).items():
            stored[name] = stored.get(name, 0.0) + np.asarray(value, np.float64)

    choices = None if options is None else jnp.asarray(options)
    for block in blocks(scored, heads, block_size):
        count += int(block.where.sum())
        rest = (block.labels, block.where, choices)
        alone = {"large": block.large, "base": block.base}
        alone |= {f"expert {i}": logits for i, logits in enumerate(block.experts)}
        for name, logits in alone.items():
            add(name, _sums(logits, {}, *rest))
        inputs = (block.large, block.experts, block.base)
        for name, strategy in arms.items():
            add(name, _sums(*_fused(*inputs, strategy=strategy), *rest))
        if static:
            alphas = jnp.asarray(static, jnp.float32)
            values = jax.device_get(_static_sums(*inputs, *rest, alphas))
            for i, alpha in enumerate(static):
                one = {name: value[i] for name, value in values.items()}
                add(static_name(alpha), one | {"alpha": alpha * block.where.sum()})
    return {
        name: {key: float(value / count) for key, value in sums.items()}
        for name, sums in totals.items()
    }


def static_name(alpha: float) -> str:
    return f"static {alpha:g}"


def best_static(means: Mapping[str, Mapping[str, float]], alphas: Sequence[float]) -> float:
    """The alpha with the smallest NLL."""
    return min(alphas, key=lambda alpha: means[static_name(alpha)]["nll"])


def best_search(means: Mapping[str, Mapping[str, float]]) -> str:
    """The dynamic arm with the smallest NLL."""
    searches = [name for name, arm in SINGLE.items() if isinstance(arm, DynamicFusion)]
    return min(searches, key=lambda name: means[name]["nll"])


def traces(
    scored: Sequence[Scored],
    heads: Sequence[np.ndarray],
    arms: Mapping[str, Any],
    *,
    positions: int,
    block_size: int,
) -> dict[str, list[list[float]]]:
    """Alphas `[T][positions]` of the dynamic arms on the first positions."""
    dynamic = {name: s for name, s in arms.items() if isinstance(s, DynamicFusion)}
    entries: dict[str, list[np.ndarray]] = {name: [] for name in dynamic}
    few = [Scored(one.hidden[:positions], one.labels[:positions]) for one in scored]
    for block in blocks(few, heads, block_size):
        for name, strategy in dynamic.items():
            _, info = _fused(block.large, block.experts, block.base, strategy=strategy)
            entries[name].append(np.asarray(info["alpha"])[:, np.asarray(block.where)])
    return {name: np.concatenate(parts, 1).tolist() for name, parts in entries.items()}
