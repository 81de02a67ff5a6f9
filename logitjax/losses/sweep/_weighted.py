"""The engine `rows`: with known weights of positions, one sweep gives value and gradients.

Unreduced losses cannot do this, because their cotangents only arrive in the backward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep import _engine as engine
from logitjax.losses.sweep._engine import Operands, Projection, Split, Sweep
from logitjax.losses.sweep._statistic import LogitBlock


@jax.custom_vjp
def weighted_sum(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum(weights * losses)`; a weight of zero silences even an infinite or undefined loss."""
    return jnp.sum(jnp.where(weights == 0, 0.0, losses * weights))


def _weighted_sum_forward(losses: jax.Array, weights: jax.Array) -> Any:
    return weighted_sum(losses, weights), (losses, weights)


def _weighted_sum_backward(saved: Any, cotangent: jax.Array) -> Any:
    losses, weights = saved
    return cotangent * weights, cotangent * _slope_of_weights(losses, weights)


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


def _slope_of_weights(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the losses, with those of unused positions only if they are finite."""
    return jnp.where((weights != 0) | jnp.isfinite(losses), losses, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_weighted(sweep: Sweep, operands: Operands, weights: jax.Array) -> tuple[jax.Array, Any]:
    """Like `run_unreduced`, but return `sum(weights * losses)`, and outputs without a gradient."""
    outputs, _ = engine.swept(sweep, operands)
    losses = sweep.statistic.losses(outputs, operands.tokens)
    return engine.first_shard(sweep, (weighted_sum(losses, weights), outputs))


def _forward(sweep: Sweep, operands: Operands, weights: jax.Array):
    student = operands.student
    split = Split(sweep.token_block, student.hidden.shape[:-1])
    tokens, location = engine.split_operands(operands, split)
    wide = engine.sum_dtype(student)

    def positions(d_head, xs):
        losses, outputs, d_hidden, d_head = _one_block(sweep, location(xs[0]), xs[1], d_head)
        # Cast here, so that only a block of gradients is ever held in float32.
        return d_head, (losses, outputs, d_hidden.astype(student.hidden.dtype))

    start = sweep.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, wide), student.head))
    d_head, per_token = split.each(positions, start, (tokens, split(weights)))
    losses, outputs, d_hidden = split.join(per_token)
    total = engine.first_shard(sweep, (weighted_sum(losses, weights), outputs))
    d_head = jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, student.head)
    return total, ((d_hidden, d_head), _slope_of_weights(losses, weights))


def _one_block(sweep: Sweep, operands: Operands, weights, d_head):
    """Losses and gradients of one block of positions, added to the head's gradient so far."""
    statistic, dtype = sweep.statistic, engine.sum_dtype(operands.student)
    numbers = engine.block_numbers(sweep, operands)
    batch = operands.student.hidden.shape[:-1]

    def first(state, index):
        columns = engine.column_block(sweep, operands, index)
        block = engine.form_block(sweep, operands, columns)
        return statistic.absorb(state, block, None), (block.student, block.teacher)

    def again(state, xs, passed):
        return statistic.absorb(state, kept_block(sweep, operands, *xs)[1], passed), None

    logits = passed = outputs = residuals = None
    for number in range(statistic.passes):
        state = sweep.vary(statistic.start(batch, dtype, passed))
        if number == 0:
            state, logits = lax.scan(first, state, numbers)
        else:
            step = functools.partial(again, passed=passed)
            state, _ = lax.scan(step, state, (numbers, logits))
        if sweep.axis_name is not None:
            state = statistic.reduce(state, sweep.axis_name, passed)
        outputs, residuals = statistic.finish(state, passed)
        passed = residuals

    # By type the weights vary over the vocabulary's mesh axis, so the outputs must too.
    outputs = sweep.vary(outputs)
    losses, pull = jax.vjp(lambda outputs: statistic.losses(outputs, operands.tokens), outputs)
    (cotangents,) = pull(weights.astype(losses.dtype))
    cotangents = engine.drop_integers(cotangents)
    counts = weights != 0
    operands = engine.silenced(operands, counts)

    def backward(carry, xs):
        d_hidden, d_head = carry
        start, block = kept_block(sweep, operands, *xs)
        head = engine.head_block(operands.student, start, sweep.block)
        raw = statistic.gradient(residuals, cotangents, block)
        raw = engine.raw_gradient(operands.student, block, raw, counts[..., None])
        d_hidden, block_head = engine.head_and_hidden_gradient(sweep, operands, head, raw, d_hidden)
        return (d_hidden, engine.add_to_head(d_head, block_head, start)), None

    d_hidden = sweep.vary(jnp.zeros(operands.student.hidden.shape, dtype))
    (d_hidden, d_head), _ = lax.scan(backward, (d_hidden, d_head), (numbers, logits))
    return losses, outputs, d_hidden, d_head


def kept_block(sweep: Sweep, operands: Operands, index, logits):
    """Return a block whose logits were kept, and its first column."""
    student, teacher = logits
    start, columns, first = engine.column_ids(sweep, operands, index)
    block = LogitBlock(student, teacher, columns, first, operands.tokens, sweep.together)
    return start, block


def _backward(sweep: Sweep, saved, cotangents):
    # Forward formed the gradients for a cotangent of 1; this only scales them.
    (grads, losses), (cotangent, _) = saved, cotangents
    d_hidden, d_head = jax.tree.map(lambda g: (g * cotangent).astype(g.dtype), grads)
    student = Projection(d_hidden, d_head, None)
    # Every shard has all losses, and the transpose adds shards.
    return Operands(student, None, None, None), engine.first_shard(sweep, cotangent * losses)


run_weighted.defvjp(_forward, _backward)
