"""A step of a loss over a large vocabulary: the forms that two benchmarks compare.

    python -P experiments/benchmarks/_vocabulary.py KIND FORM POSITIONS HIDDEN VOCABULARY

runs one step for each line of its input and answers with the CPU-seconds. It uses the losses of the
tree on its path, which may be another commit's, so it imports nothing else of this package.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import losses

KINDS = ("cross-entropy", "kl")
PEERS = ("dense", "chunked", "blocked scalar", "blocked unreduced")
CHUNK = 256
Shape = tuple[int, int, int]
Inputs = Mapping[str, Any]
Loss = Callable[[Inputs], jax.Array]


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The shape of each input by name, given positions, hidden size and vocabulary."""
    tokens, width, vocab = shape
    sides = {"hidden": (tokens, width), "head": (width, vocab)}
    return sides | {f"teacher_{name}": size for name, size in sides.items()} | {"labels": (tokens,)}


def inputs(shape: Shape) -> dict[str, jax.Array]:
    """Arrays of a seed."""
    tokens, width, vocab = shape
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int, scale: float) -> jax.Array:
        # A million draws, repeated: every process makes its own, and large heads take minutes.
        few = rng.standard_normal(min(rows * columns, 1_000_003), np.float32) * np.float32(scale)
        return jnp.asarray(np.resize(few, (rows, columns)))

    sides = {
        name: normal(*size, scale=2 * width**-0.5 if name.endswith("head") else 1.0)
        for name, size in sizes(shape).items()
        if name != "labels"
    }
    return sides | {"labels": jnp.asarray(rng.integers(0, vocab, tokens))}


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


def form_step(kind: str, form: str) -> Callable[[Inputs], Any]:
    """The step of one of `PEERS`."""
    named = {
        "dense": functools.partial(dense, kind),
        "chunked": functools.partial(chunked, kind, size=CHUNK),
    }
    blocked = functools.partial(ours, kind, weighted=form == "blocked scalar")
    return step(named.get(form, blocked))


def main(kind: str, form: str, *shape: str) -> None:
    tokens, width, vocab = map(int, shape)
    run, given = jax.jit(form_step(kind, form)), inputs((tokens, width, vocab))
    # The first step compiles.
    jax.block_until_ready(run(given))
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        jax.block_until_ready(run(given))
        print(time.process_time() - started, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
