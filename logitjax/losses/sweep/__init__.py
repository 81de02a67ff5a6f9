"""Sweeps over the vocabulary: losses of hidden states and heads that never hold all logits.

The logits of a batch, `[*batch, vocab]`, are by far the largest array of a training step, and a
loss needs only a few numbers from each of its rows. So a sweep forms the logits of a block of
columns for a block of positions, passes them to a `Statistic`, which adds them to its state, and
discards them. Only a few numbers per position are kept for the backward pass, which forms the
logits of each block again, gets the gradient with respect to them from the statistic, and writes
the gradient of the block's head columns.

::

    logits_v = cap tanh((hidden . kernel_v + bias_v) / cap) / temperature,  v in the block
    state    = absorb(state, block)            for each block, then
    outputs, residuals = finish(state)         and backward, for each block
    d logits = gradient(residuals, d outputs, block)

`run` does this for any statistic; the functions `logitjax.losses.linear_...` call it. It composes
with `jit`, `grad`, `vmap` and `shard_map`. Positions are independent, so splitting a batch over
devices needs no communication; with a split vocabulary every shard sweeps its own columns and
`Statistic.reduce` combines their states, once per sweep. A statistic may take several passes if its
terms need a normaliser first. Heads of student and teacher are `Head`s.

This engine is `scan`. If the weights of the positions are known, `rows` computes the weighted sum
of the losses and its gradient in one sweep. For TPUs there is `pallas`, whose kernels call the
statistic. `Blocks` documents what each costs, and holds block sizes, engine, and the rule that
chooses them for a device and a memory budget.

A custom statistic: the entropy of the next token, with its gradient `-p (log p + H)`.

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
