"""A step of a loss over a large vocabulary: the forms that two benchmarks compare."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from logitjax import losses

KINDS = ("cross-entropy", "kl")
Shape = tuple[int, int, int]
Inputs = Mapping[str, Any]
Loss = Callable[[Inputs], jax.Array]


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """By name the shape of each input, of positions, hidden size and vocabulary."""
    tokens, width, vocab = shape
    sides = {"hidden": (tokens, width), "head": (width, vocab)}
    return sides | {f"teacher_{name}": size for name, size in sides.items()} | {"labels": (tokens,)}


def dense(kind: str, x: Inputs) -> jax.Array:
    logits = x["hidden"] @ x["head"]
    if kind == "cross-entropy":
        return losses.cross_entropy(logits, x["labels"])
    teacher = jax.lax.stop_gradient(x["teacher_hidden"] @ x["teacher_head"])
    return losses.kl_divergence(logits, teacher)


def chunked(kind: str, x: Inputs, *, size: int) -> jax.Array:
    """The mean by a scan over chunks of positions under `jax.checkpoint`, as other trainers do."""
    rows = {name: x[name] for name in ("hidden", "teacher_hidden", "labels")}
    heads = {name: x[name] for name in ("head", "teacher_head")}

    @jax.checkpoint
    def chunk(total: jax.Array, some: Inputs) -> Any:
        return total + dense(kind, {**heads, **some}).sum(), None

    chunks = jax.tree.map(lambda a: a.reshape(-1, min(size, len(a)), *a.shape[1:]), rows)
    return jax.lax.scan(chunk, jnp.float32(0), chunks)[0] / len(x["hidden"])


def ours(kind: str, x: Inputs, *, weighted: bool, **options: Any) -> jax.Array:
    """The sweep in blocks; `weighted` is the scalar form, which a training step uses."""
    hidden, head = x["hidden"], x["head"]
    if weighted:
        options["weights"] = jnp.full(len(hidden), 1 / len(hidden), jnp.float32)
    if kind == "cross-entropy":
        return losses.linear_cross_entropy(hidden, head, x["labels"], **options)
    teacher = (x["teacher_hidden"], x["teacher_head"])
    return losses.linear_kl_divergence(hidden, head, *teacher, **options)


def step(loss: Loss) -> Callable[[Inputs], Any]:
    """Mean loss with its gradients by the hidden states and the head."""

    def run(inputs: Inputs) -> Any:
        def mean(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return loss({**inputs, "hidden": hidden, "head": head}).mean()

        return jax.value_and_grad(mean, (0, 1))(inputs["hidden"], inputs["head"])

    return run
