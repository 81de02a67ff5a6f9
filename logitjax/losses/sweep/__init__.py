"""The sweep over the vocabulary: losses of hidden states and heads that never hold the logits.

The logits of a batch, `[*batch, vocab]`, are by far the largest array of a training step, and a
loss needs only a few numbers from each row. So a sweep forms the logits of a block of columns for a
block of positions, passes them to a `Statistic`, which adds them to its state, and drops them. Only
a few numbers per position are kept for the backward pass, which forms the logits of each block
again, asks the statistic for the gradient with respect to them, and writes the head's gradient in
place.

::

    logits_v = cap tanh((hidden . kernel_v + bias_v) / cap) / temperature,  v in the block
    state    = absorb(state, block)            for each block, then
    outputs, residuals = finish(state)         and backward, for each block
    d logits = gradient(residuals, d outputs, block)

`run` does this for any statistic, and `logitjax.losses.linear_...` are such calls. It composes with
`jit`, `grad`, `vmap` and `shard_map`. Nothing crosses positions, so a batch split over devices
costs nothing; with a split vocabulary every shard sweeps its own columns and `Statistic.reduce`
joins their states, once a sweep. A statistic may use several passes if its terms need a normaliser
first. The head and its teacher's are `Head`s.

That engine is `scan`. With known weights of the positions there is also `rows`, which forms the
weighted sum of the losses and its gradient in one sweep, and for TPUs there is `pallas`, whose
kernels call the statistic. `Blocks` describes the cost of each, and sets the sizes of the blocks,
the engine, and the rule that chooses them for a device and a budget of memory.

A statistic of your own: the entropy of the next token, with its gradient `-p (log p + H)`.

>>> import dataclasses
>>> import jax, jax.numpy as jnp, numpy as np
>>> from logitjax.losses import sweep
>>> @dataclasses.dataclass(frozen=True)
... class Entropy(sweep.Statistic):
...     def start(self, batch, dtype, passed):
...         return sweep.OnlineSums.start(batch, dtype, terms=1)
...
...     def absorb(self, state, block, passed):
...         exists = block.student != -jnp.inf
...         return state.add(block.student, jnp.where(exists, block.student, 0.0))
...
...     def reduce(self, state, axis_name, passed):
...         return state.reduce(axis_name)
...
...     def finish(self, state, passed):
...         total, weighted = state.sums
...         entropy = state.log_z - weighted / total
...         return entropy, (state.log_z, entropy)
...
...     def gradient(self, residuals, cotangents, block):
...         log_z, entropy = (x[..., None] for x in residuals)
...         log_p = block.student - log_z
...         exists = log_p != -jnp.inf
...         slope = jnp.exp(log_p) * (jnp.where(exists, log_p, 0.0) + entropy)
...         return -cotangents[..., None] * slope

It equals the dense one, value and gradient, in blocks of 64 columns and 4 positions:

>>> hidden, kernel = (np.random.default_rng(0).normal(size=(8, n)) for n in (8, 300))
>>> def blocked(kernel):
...     return sweep.run(Entropy(), hidden, kernel, blocks=sweep.Blocks(64, 4)).mean()
>>> def dense(kernel):
...     log_p = jax.nn.log_softmax(hidden @ kernel)
...     return -(jnp.exp(log_p) * log_p).sum(-1).mean()
>>> value, gradient = jax.jit(jax.value_and_grad(blocked))(kernel)
>>> expected, expected_gradient = jax.jit(jax.value_and_grad(dense))(kernel)
>>> np.allclose(value, expected, rtol=1e-5), np.allclose(gradient, expected_gradient, atol=1e-5)
(True, True)

References:
    Wijmans et al., Cut your losses in large-vocabulary language models, 2024 (arXiv 2411.09009).
    Milakov, Gimelshein, Online normalizer calculation for softmax, 2018 (arXiv 1805.02867).
"""

from logitjax.losses.sweep._blocks import Blocks as Blocks
from logitjax.losses.sweep._head import Head as Head
from logitjax.losses.sweep._kl import KLStatistic as KLStatistic
from logitjax.losses.sweep._kl import TeacherStatistic as TeacherStatistic
from logitjax.losses.sweep._mixture import MixtureStatistic as MixtureStatistic
from logitjax.losses.sweep._readout import ReadoutStatistic as ReadoutStatistic
from logitjax.losses.sweep._run import run as run
from logitjax.losses.sweep._several import LossOf as LossOf
from logitjax.losses.sweep._several import Several as Several
from logitjax.losses.sweep._several import Tempered as Tempered
from logitjax.losses.sweep._statistic import LogitBlock as LogitBlock
from logitjax.losses.sweep._statistic import OnlineSums as OnlineSums
from logitjax.losses.sweep._statistic import Statistic as Statistic
