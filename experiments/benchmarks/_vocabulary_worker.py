"""Times a step of a vocabulary loss whenever a line asks for it, with whatever logitjax there is.

`python _vocabulary_worker.py T H V`, then lines such as `kl bfloat16 scalar`: seconds of a call.
Of a commit long ago only what every commit has is called.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import losses


def _inputs(tokens, width, vocab):
    rng = np.random.default_rng(0)

    def normal(rows, columns, scale=1.0):
        return rng.normal(size=(rows, columns)).astype(np.float32) * np.float32(scale)

    sides = [(normal(tokens, width), normal(width, vocab, 2 * width**-0.5)) for _ in range(2)]
    return [*sides[0], *sides[1], rng.integers(0, vocab, tokens).astype(np.int32)]


# One at a time, for the heads are large.
@functools.lru_cache(maxsize=1)
def _step(kind, dtype, form, shape):
    *sides, labels = _inputs(*shape)
    arrays = [*(jnp.asarray(x, dtype) for x in sides), jnp.asarray(labels)]
    weights = jnp.full(shape[0], 1 / shape[0]) if form == "scalar" else None

    def loss(hidden, head, teacher, teacher_head, labels):
        if kind == "cross-entropy":
            found = losses.linear_cross_entropy(hidden, head, labels, weights=weights)
        else:
            found = losses.linear_kl_divergence(
                hidden, head, teacher, teacher_head, weights=weights
            )
        return found.mean()

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    jax.block_until_ready(run(*arrays))
    return lambda: run(*arrays)


def main(argv):
    shape = tuple(map(int, argv[1:]))
    for line in sys.stdin:
        step = _step(*line.split(), shape)
        start = time.perf_counter()
        jax.block_until_ready(step())
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv)
