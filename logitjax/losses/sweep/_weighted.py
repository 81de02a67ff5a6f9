"""The scalar form: with the weights of the positions known, one sweep gives value and gradients.

Unreduced losses cannot do this, because their cotangents arrive only with the backward pass. Here
the logits of a few positions are kept over the whole vocabulary, just long enough to turn them into
their gradient, so nothing is computed twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.losses.sweep._engine import (
    Block,
    Operands,
    Projection,
    Split,
    Sweep,
    accumulate,
    add_block,
    block_numbers,
    column_block,
    column_ids,
    compute_dtype,
    contract,
    drop_integers,
    first_shard,
    form_block,
    head_block,
    head_gradient,
    raw_gradient,
    split_operands,
)


def _value_only(sweep: Sweep, operands: Operands, weights):
    assert sweep.combine is not None
    split = Split(sweep.token_block, operands.student.hidden.shape[:-1])
    tokens, place = split_operands(operands, split)
    outputs, _ = split.join(accumulate(sweep, operands, split, tokens, place))
    losses = sweep.combine(outputs, operands.tokens)
    return first_shard(sweep, (_weighted_sum(losses, weights), outputs))


def _weighted_sum(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """A weight of zero silences even an infinite or undefined loss."""
    return jnp.sum(jnp.where(weights == 0, 0.0, losses * weights))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_weighted(sweep: Sweep, operands: Operands, weights: jax.Array) -> tuple[jax.Array, Any]:
    """``sum(weights * losses)``, and the statistic's outputs, which get no gradient.

    Under ``axis_name`` on the first shard only, zero elsewhere.
    """
    return _value_only(sweep, operands, weights)


def _forward(sweep: Sweep, operands: Operands, weights: jax.Array):
    student = operands.student
    split = Split(sweep.token_block, student.hidden.shape[:-1])
    tokens, place = split_operands(operands, split)
    wide = jnp.promote_types(compute_dtype(student), jnp.float32)

    def positions(carry, xs):
        here = place(xs[0])
        losses, outputs, *sums = _one_block(sweep, here, xs[1], *carry)
        d_hidden, d_head, d_bias = sums
        return (d_head, d_bias), (losses, outputs, d_hidden)

    start = sweep.vary(
        (
            jnp.zeros(student.head.shape, wide),
            None if student.bias is None else jnp.zeros(student.bias.shape, wide),
        )
    )
    (d_head, d_bias), per_token = split.each(positions, start, (tokens, split(weights)))
    losses, outputs, d_hidden = split.join(per_token)
    total = first_shard(sweep, (_weighted_sum(losses, weights), outputs))
    like = (student.hidden, student.head, student.bias)
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), (d_hidden, d_head, d_bias), like)
    return total, (grads, losses)


def _one_block(sweep: Sweep, operands: Operands, weights, d_head, d_bias):
    """Losses and gradients of one block of positions, added to the head's gradient so far."""
    statistic, axis = sweep.statistic, sweep.vocab_axes[0]
    assert sweep.combine is not None
    numbers = block_numbers(sweep, operands)
    batch = operands.student.hidden.shape[:-1]

    def first(state, index):
        columns = column_block(sweep, operands, index)
        block = form_block(sweep, operands, columns)
        return statistic.absorb(state, block, None), (block.student, block.teacher)

    def again(state, xs, passed):
        index, (student, teacher) = xs
        _, columns, first_column = column_ids(sweep, operands, index)
        block = Block(student, teacher, columns, first_column, operands.tokens)
        return statistic.absorb(state, block, passed), None

    logits = passed = outputs = residuals = None
    for number in range(statistic.passes):
        state = sweep.vary(statistic.start(batch, passed))
        if number == 0:
            state, logits = lax.scan(first, state, numbers)
        else:
            step = functools.partial(again, passed=passed)
            state, _ = lax.scan(step, state, (numbers, logits))
        if sweep.axis_name is not None:
            state = statistic.reduce(state, sweep.axis_name, passed)
        outputs, residuals = statistic.finish(state, passed)
        passed = residuals

    # The weights vary over the vocabulary's mesh axis by type, so the outputs have to as well.
    outputs, combine = sweep.vary(outputs), sweep.combine
    losses, pull = jax.vjp(lambda outputs: combine(outputs, operands.tokens), outputs)
    (cotangents,) = pull(weights.astype(losses.dtype))
    cotangents = drop_integers(cotangents)

    def backward(carry, xs):
        d_hidden, d_head, d_bias = carry
        index, (student, teacher) = xs
        start, columns, first_column = column_ids(sweep, operands, index)
        block = Block(student, teacher, columns, first_column, operands.tokens)
        head, _ = head_block(operands.student, axis, start, sweep.block)
        raw = statistic.gradient(residuals, cotangents, block)
        raw = raw_gradient(sweep, operands, block, raw)
        cast = raw.astype(head.dtype)
        d_hidden = d_hidden + contract(cast, (raw.ndim - 1,), head, (axis,))
        hidden = operands.student.hidden.astype(head.dtype)
        d_head = add_block(d_head, head_gradient(sweep, hidden, cast), start, axis)
        if d_bias is not None:
            bias = raw.sum(tuple(range(raw.ndim - 1)))
            d_bias = add_block(d_bias, bias, start, 0)
        return (d_hidden, d_head, d_bias), None

    d_hidden = sweep.vary(jnp.zeros(operands.student.hidden.shape, d_head.dtype))
    carry, _ = lax.scan(backward, (d_hidden, d_head, d_bias), (numbers, logits))
    return losses, outputs, *carry


def _backward(sweep: Sweep, saved, cotangents):
    (grads, losses), (cotangent, _) = saved, cotangents
    scaled = jax.tree.map(lambda g: g * cotangent.astype(g.dtype), grads)
    d_hidden, d_head, d_bias = scaled
    student = Projection(d_hidden, d_head, d_bias, None)
    return Operands(student, None, None, None), cotangent * losses


run_weighted.defvjp(_forward, _backward)
