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


#: Values of every position, by arm and metric.
Values = dict[str, dict[str, np.ndarray]]


@functools.partial(jax.jit, static_argnames="arms")
def _block(heads: Any, hidden: Any, labels: Any, options: Any, alphas: Any, *, arms: Any) -> Any:
    """Values of models and strategies, and those of given alphas, stacked."""
    vocab = min(len(head) for head in heads)
    large, base, *several = (
        (one @ head.T)[:, :vocab] for head, one in zip(heads, hidden, strict=True)
    )
    experts = jnp.stack(several)

    def values(logits: jax.Array, info: Mapping[str, Any] = {}) -> dict[str, jax.Array]:
        nll = -jnp.take_along_axis(log_softmax(logits), labels[:, None], -1)[:, 0]
        if options is None:
            best = logits.argmax(-1)
        else:
            best = options[logits[:, options].argmax(-1)]
        scores = {"nll": nll, "accuracy": best == labels}
        if "alpha" in info:
            scores |= {"alpha": info["alpha"].sum(0), "at_bound": info["at_bound"]}
            scores |= {"alphas": info["alpha"].T}
        return scores

    def fixed(alpha: jax.Array) -> dict[str, jax.Array]:
        return values(large + alpha[:, None] * (experts - base).sum(0)) | {"alpha": alpha}

    scores = {"large": values(large), "base": values(base)}
    scores |= {f"expert {i}": values(one) for i, one in enumerate(several)}
    scores |= {name: values(*strategy(large, experts, base)) for name, strategy in arms}
    return scores, jax.lax.map(fixed, alphas)


def by_position(
    scored: Sequence[Scored],
    heads: Sequence[np.ndarray],
    arms: Mapping[str, Any],
    *,
    block_size: int,
    static: Mapping[str, Any] = {},
    options: Sequence[int] | None = None,
) -> Values:
    """NLL and accuracy of every arm, of the models alone, and of given alphas.

    Args:
        scored: of the large model, the base and the experts.
        heads: `[vocab, width]`, one array if models share it.
        static: alphas by name of their arms, each a number or one for each position; all experts
            use the same one.
        options: token ids among which accuracy looks for the answer; the whole vocabulary if None.
    """
    on_device = {id(head): jnp.asarray(head) for head in heads}
    placed = [on_device[id(head)] for head in heads]
    choices = None if options is None else jnp.asarray(options)
    count = len(scored[0].labels)
    given = np.zeros((len(static), count), np.float32)
    for row, alpha in zip(given, static.values()):
        row[:] = alpha
    parts = []
    for start in range(0, count, block_size):
        # The last block is filled up with positions that do not count.
        rows = np.minimum(np.arange(start, start + block_size), count - 1)
        hidden, labels = [one.hidden[rows] for one in scored], scored[0].labels[rows]
        inputs = (placed, hidden, labels, choices, given[:, rows])
        values, fixed = _block(*inputs, arms=tuple(arms.items()))
        for i, name in enumerate(static):
            values[name] = {key: value[i] for key, value in fixed.items()}
        here = slice(count - start)
        parts.append(jax.tree.map(lambda x, here=here: np.asarray(x, np.float64)[here], values))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def score(
    scored: Sequence[Scored],
    heads: Sequence[np.ndarray],
    arms: Mapping[str, Any],
    *,
    static: Sequence[float] = (),
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Means of `by_position` for arms, models and `static ALPHA`."""
    named = {static_name(alpha): alpha for alpha in static}
    values = by_position(scored, heads, arms, static=named, **options)
    return {
        name: {key: float(value.mean()) for key, value in one.items()}
        for name, one in values.items()
    }


def static_name(alpha: float) -> str:
    return f"static {alpha:g}"


def best_static(means: Mapping[str, Mapping[str, float]], alphas: Sequence[float]) -> float:
    """The alpha with the smallest NLL."""
    return min(alphas, key=lambda alpha: means[static_name(alpha)]["nll"])
