"""Cost of the graph loss beside a head's own matrix products, with the teacher's top-k given.

Both steps multiply forward and backward, one with the loss's gradient and one with a given one, so
that the gradient's memory is counted as in training.
"""

import jax
import numpy as np

from experiments.shared import suite, timing
from logitjax import distillation, losses

K = 10
HIDDEN = 1024


def run(options: suite.Options) -> suite.Result:
    positions, vocab = (64, 4_096) if options.smoke else (4096, 152_064)
    keys = jax.random.split(jax.random.key(0), 2)
    h = jax.random.normal(keys[0], (positions, HIDDEN))
    kernel = jax.random.normal(keys[1], (vocab, HIDDEN)) / HIDDEN**0.5
    shorter = jax.jit(lambda h, kernel: losses.graph_statistics(h @ kernel.T, K))
    teacher = shorter(h[: positions // 2], kernel)

    def step(gradient):
        def both(h, kernel):
            logits, vjp = jax.vjp(lambda h, kernel: h @ kernel.T, h, kernel)
            return vjp(gradient(logits))

        return jax.jit(both)

    head = step(lambda logits: logits)
    loss = step(jax.grad(lambda logits: distillation.graph_on_logits(logits, teacher)[0]))
    seconds = timing.paired_seconds(
        {"head": lambda: head(h, kernel), "loss": lambda: loss(h, kernel)}, repeats=options.repeats
    )
    added = timing.paired_ratio(seconds["loss"], seconds["head"]) - 1.0
    names = {"head": "head, forward + backward", "loss": "the same with graph_on_logits"}
    sizes = {"T": positions, "V": vocab, "k": K}
    rows = [
        {"step": name, **sizes, "seconds": float(np.median(seconds[key]))}
        for key, name in names.items()
    ]
    bar = suite.at_most("graph_on_logits: seconds added to the head", added, 0.05)
    return suite.Result(rows=rows, bars=[] if options.smoke else [bar])
