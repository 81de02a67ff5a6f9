"""The engine `scan`: blocks of columns, their logits, and the gradient of the sums."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from logitjax import ops
from logitjax.losses.sweep._head import Head
from logitjax.losses.sweep._statistic import LogitBlock, Statistic
from logitjax.ops import Array, AxisName


class Projection(NamedTuple):
    """Hidden states and the head that turns them into logits."""

    hidden: Array  # [*batch, hidden]
    # With known vocab_axis.
    head: Head
    # A scalar; None in a gradient.
    inverse_temperature: Any


class Operands(NamedTuple):
    """The arrays of a sweep; only `student` gets gradients."""

    student: Projection
    teacher: Projection | None
    vocab_where: Array | None  # [vocab], columns that exist
    tokens: Any  # [*batch, ...] arrays that the statistic reads

    @property
    def sides(self) -> tuple[Projection, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The static part of a sweep.

    Attributes:
        forward: function that replaces `swept`.
        gradients: function that replaces `blockwise_gradients`.
        on_accelerator: whether to compile for a TPU or a GPU, whose compiler needs more hints.
    """

    statistic: Statistic
    block: int
    token_block: int | None = None
    axis_name: AxisName | None = None
    varying: tuple[str, ...] = ()
    forward: Callable[..., Any] | None = None
    gradients: Callable[..., Any] | None = None
    on_accelerator: bool = False
    together: int = 0

    def vary(self, tree: Any) -> Any:
        """Mark loop carries as device-varying, as `shard_map` requires."""
        return jax.tree.map(lambda x: ops.mesh.vary(x, self.varying), tree)


def contract(a, a_dims, b, b_dims):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, ((a_dims, b_dims), ((), ())), preferred_element_type=wide)


def compute_dtype(projection: Projection):
    return projection.head.product_dtype(projection.hidden.dtype, projection.head.kernel.dtype)


def sum_dtype(projection: Projection):
    return jnp.promote_types(compute_dtype(projection), jnp.float32)


def head_block(projection: Projection, start, size: int) -> Head:
    """The head's columns `[start, start + size)` in the matmul's dtype."""
    head = projection.head
    kernel = lax.dynamic_slice_in_dim(head.kernel, start, size, head.axis)
    bias = head.bias
    if bias is not None:
        bias = lax.dynamic_slice_in_dim(bias, start, size)
    return dataclasses.replace(head, kernel=kernel.astype(compute_dtype(projection)), bias=bias)


def finished_logits(logits, head: Head, inverse_temperature, valid):
    """Turn `hidden @ kernel` into a statistic's input: bias, cap, temperature, then the mask."""
    if head.bias is not None:
        logits = logits + head.bias.astype(logits.dtype)
        # A cap would make an entry at -inf finite; the bias, a single row, reveals it.
        valid = valid & (head.bias != -jnp.inf)
    if head.soft_cap is not None:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    return jnp.where(valid, logits * inverse_temperature, -jnp.inf)


class Columns(NamedTuple):
    """Parts of a block of columns that do not depend on positions."""

    start: jax.Array
    columns: jax.Array
    first: jax.Array
    valid: jax.Array
    heads: tuple[Head, ...]


def column_ids(sweep: Sweep, operands: Operands, index):
    """A block's local start, its ids in the whole vocabulary, and the index of its first new id."""
    vocab = operands.student.head.vocab_size()
    # The last block is moved back to end with the vocabulary; columns it repeats do not count.
    start = jnp.minimum(index * sweep.block, vocab - sweep.block)
    shard = 0 if sweep.axis_name is None else lax.axis_index(sweep.axis_name)
    columns = shard * vocab + start + jnp.arange(sweep.block, dtype=jnp.int32)
    return start, columns, index * sweep.block - start


def column_block(sweep: Sweep, operands: Operands, index) -> Columns:
    start, columns, first = column_ids(sweep, operands, index)
    valid = jnp.arange(sweep.block) >= first
    if operands.vocab_where is not None:
        valid &= lax.dynamic_slice_in_dim(operands.vocab_where, start, sweep.block)
    heads = tuple(head_block(side, start, sweep.block) for side in operands.sides)
    if sweep.on_accelerator:
        # Slice once: inside each product it costs a fifth of the product's time.
        kernels = lax.optimization_barrier([head.kernel for head in heads])
        pairs = zip(heads, kernels, strict=True)
        heads = tuple(dataclasses.replace(head, kernel=kernel) for head, kernel in pairs)
    return Columns(start, columns, first, valid, heads)


def form_block(sweep: Sweep, operands: Operands, columns: Columns) -> LogitBlock:
    logits = []
    for side, head in zip(operands.sides, columns.heads, strict=True):
        hidden = side.hidden.astype(head.kernel.dtype)
        product = contract(hidden, (hidden.ndim - 1,), head.kernel, (1 - head.axis,))
        logits.append(finished_logits(product, head, side.inverse_temperature, columns.valid))
    teacher = logits[1] if len(logits) == 2 else None
    location = (columns.columns, columns.first)
    return LogitBlock(logits[0], teacher, *location, operands.tokens, sweep.together)


def raw_gradient(student: Projection, block: LogitBlock, gradient, counts):
    """Gradient of `hidden @ kernel + bias`; zero where a position does not count."""
    exists = block.student != -jnp.inf
    slope = student.inverse_temperature
    cap = student.head.soft_cap
    if cap is not None:
        # Mask first: the square of -inf would make second derivatives nan.
        capped = jnp.where(exists, block.student, 0.0) / student.inverse_temperature
        slope = slope * (1 - jnp.square(capped / cap))
    return jnp.where(exists & counts, gradient * slope, 0.0)


def any_of(tree: Any, batch_ndim: int) -> jax.Array:
    """Whether any number of a position is not zero, `[*batch]`; nan is not zero."""
    leaves = [(x != 0).any(tuple(range(batch_ndim, x.ndim))) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_or, leaves)


def silenced(operands: Operands, counts: jax.Array) -> Operands:
    """Zero the hidden states of unused positions, because zero times their values may be nan."""
    hidden = operands.student.hidden
    hidden = jnp.where(counts[..., None], hidden, jnp.zeros((), hidden.dtype))
    return operands._replace(student=operands.student._replace(hidden=hidden))


def kernel_gradient(head: Head, hidden, gradient):
    """`hidden^T gradient` over all positions, in the layout of the kernel."""
    positions = tuple(range(hidden.ndim - 1))
    if head.axis == 1:
        return contract(hidden, positions, gradient, positions)
    return contract(gradient, positions, hidden, positions)


def add_block(total, block, start, axis: int):
    size = block.shape[axis]
    old = lax.dynamic_slice_in_dim(total, start, size, axis)
    return lax.dynamic_update_slice_in_dim(total, old + block.astype(total.dtype), start, axis)


def add_to_head(total: Head, block: Head, start) -> Head:
    """Add the gradient of the columns from `start` on to the head's gradient."""
    kernel = add_block(total.kernel, block.kernel, start, total.axis)
    bias = None if total.bias is None else add_block(total.bias, block.bias, start, 0)
    return dataclasses.replace(total, kernel=kernel, bias=bias)


def put_in_head(sweep: Sweep, total: Head, block: Head, start) -> Head:
    """Overwrite the head's gradient at the columns from `start` on."""

    def put(total, block, axis: int):
        block = block.astype(total.dtype)
        return lax.dynamic_update_slice_in_dim(total, block, start, axis)

    bias = None if total.bias is None else put(total.bias, block.bias, 0)
    kernel = put(total.kernel, block.kernel, total.axis)
    if sweep.on_accelerator:
        # The compiler would store [hidden, vocab] transposed, and copy it in the end.
        kernel = with_layout_constraint(kernel, Layout((0, 1)))
    return dataclasses.replace(total, kernel=kernel, bias=bias)


class Split:
    """Cut the last batch axis into blocks, so that a sharded first axis is not cut."""

    def __init__(self, size: int | None, batch: tuple[int, ...]):
        self.axis = len(batch) - 1
        self.length = batch[-1] if batch else 1
        self.whole = size is None or not batch or size >= self.length
        self.size = self.length if size is None else size
        self.count = -(-self.length // self.size)
        self.batch = batch if self.whole else (self.count, *batch[:-1], self.size)

    def __call__(self, tree: Any) -> Any:
        return tree if self.whole else jax.tree.map(self._split, tree)

    def _split(self, x):
        pad = self.count * self.size - self.length
        if pad:
            x = jnp.pad(x, [(0, pad if a == self.axis else 0) for a in range(x.ndim)])
        shape = (*x.shape[: self.axis], self.count, self.size, *x.shape[self.axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), self.axis, 0)

    def join(self, tree: Any) -> Any:
        return tree if self.whole else jax.tree.map(self._join, tree)

    def _join(self, x):
        x = jnp.moveaxis(x, 0, self.axis)
        shape = (*x.shape[: self.axis], self.count * self.size, *x.shape[self.axis + 2 :])
        return lax.slice_in_dim(x.reshape(shape), 0, self.length, axis=self.axis)

    def each(self, step: Callable, carry: Any, xs: Any) -> tuple[Any, Any]:
        """Run `lax.scan` over blocks of positions, or one call if there is only one."""
        return step(carry, xs) if self.whole else lax.scan(step, carry, xs)


def split_operands(operands: Operands, split: Split):
    """Return tokens of every block, and a function that makes operands of one block's tokens."""
    teacher = operands.teacher
    tokens = (operands.student.hidden, teacher and teacher.hidden, operands.tokens)

    def place(tokens) -> Operands:
        hidden, teacher_hidden, extra = tokens
        placed = operands._replace(student=operands.student._replace(hidden=hidden), tokens=extra)
        if teacher is not None:
            placed = placed._replace(teacher=teacher._replace(hidden=teacher_hidden))
        return placed

    return split(tokens), place


def block_numbers(sweep: Sweep, operands: Operands):
    count = -(-operands.student.head.vocab_size() // sweep.block)
    return jnp.arange(count, dtype=jnp.int32)


def swept(sweep: Sweep, operands: Operands) -> tuple[Any, Any]:
    """Compute outputs and residuals of all positions by all passes of the statistic, in blocks."""
    statistic, outputs, passed = sweep.statistic, None, None
    dtype = sum_dtype(operands.student)
    split = Split(sweep.token_block, operands.student.hidden.shape[:-1])
    tokens, location = split_operands(operands, split)
    for _ in range(statistic.passes):

        def step(state, index, passed=passed):
            columns = column_block(sweep, operands, index)

            def absorb(carry, xs):
                block = form_block(sweep, location(xs[0]), columns)
                return carry, statistic.absorb(xs[1], block, xs[2])

            return split.each(absorb, (), (tokens, state, passed))[1], None

        state = sweep.vary(statistic.start(split.batch, dtype, passed))
        state, _ = lax.scan(step, state, block_numbers(sweep, operands))
        if sweep.axis_name is not None:
            state = statistic.reduce(state, sweep.axis_name, passed)
        outputs, passed = statistic.finish(state, passed)
    return split.join((outputs, passed))


def first_shard(sweep: Sweep, tree: Any) -> Any:
    """Zero all vocabulary shards but the first, so that the caller's `psum` restores the value."""
    # Its transpose gives every shard the whole cotangent under either setting of `check_vma`.
    if sweep.axis_name is None:
        return tree
    first = lax.axis_index(sweep.axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree)


def _forward(sweep: Sweep, operands: Operands):
    outputs, residuals = (sweep.forward or swept)(sweep, operands)
    return first_shard(sweep, outputs), (operands, residuals)


def _backward(sweep: Sweep, saved, cotangents):
    operands, residuals = saved
    cotangents = drop_integers(cotangents)
    counts = any_of(cotangents, operands.student.hidden.ndim - 1)
    gradients = sweep.gradients or blockwise_gradients
    d_hidden, d_head = gradients(sweep, operands, residuals, cotangents, counts)
    return (Operands(Projection(d_hidden, d_head, None), None, None, None),)


def blockwise_gradients(
    sweep: Sweep, operands: Operands, residuals, cotangents, counts
) -> tuple[jax.Array, Head]:
    """Gradients of hidden states and head, given those of the outputs and the used positions."""
    operands, student = silenced(operands, counts), operands.student
    split = Split(sweep.token_block, student.hidden.shape[:-1])
    tokens, location = split_operands(operands, split)
    residuals, cotangents, counts = split((residuals, cotangents, counts))
    wide = sum_dtype(student)

    def step(carry, index):
        d_hidden, d_head = carry
        columns = column_block(sweep, operands, index)
        head = columns.heads[0]

        def differentiate(total, xs):
            tokens, residuals, cotangents, counts, d_hidden = xs
            here = location(tokens)
            block = form_block(sweep, here, columns)
            raw = sweep.statistic.gradient(residuals, cotangents, block)
            raw = raw_gradient(here.student, block, raw, counts[..., None])
            d_hidden, d_head = head_and_hidden_gradient(sweep, here, head, raw, d_hidden)
            return jax.tree.map(jnp.add, total, d_head), d_hidden

        zeros = sweep.vary(jax.tree.map(lambda x: jnp.zeros(x.shape, wide), head))
        xs = (tokens, residuals, cotangents, counts, d_hidden)
        block_head, d_hidden = split.each(differentiate, zeros, xs)
        d_head = put_in_head(sweep, d_head, block_head, columns.start)
        return (d_hidden, d_head), None

    start = sweep.vary(
        (
            jnp.zeros((*split.batch, student.hidden.shape[-1]), wide),
            jax.tree.map(lambda x: lax.empty(x.shape, x.dtype), student.head),
        )
    )
    # In reverse, so that columns repeated in the last block are overwritten by the one before it.
    numbers = block_numbers(sweep, operands)
    (d_hidden, d_head), _ = lax.scan(step, start, numbers, reverse=True)
    return split.join(d_hidden).astype(student.hidden.dtype), d_head


def head_and_hidden_gradient(sweep: Sweep, operands: Operands, head: Head, raw, d_hidden):
    """Add one block of columns to `d_hidden`, and return it and the gradient of the block."""
    cast = raw.astype(head.kernel.dtype)
    if sweep.on_accelerator:
        # Written once; otherwise it would be formed again inside each product, at half the speed.
        cast = lax.optimization_barrier(cast)
    d_hidden = d_hidden + contract(cast, (raw.ndim - 1,), head.kernel, (head.axis,))
    if sweep.on_accelerator:
        # This sum first: concurrently with the head's it takes 1.5 times as long on a v5p.
        d_hidden, cast = lax.optimization_barrier((d_hidden, cast))
    hidden = operands.student.hidden.astype(head.kernel.dtype)
    bias = None if head.bias is None else raw.sum(tuple(range(raw.ndim - 1)))
    kernel = kernel_gradient(head, hidden, cast)
    return d_hidden, dataclasses.replace(head, kernel=kernel, bias=bias)


def drop_integers(tree: Any) -> Any:
    return jax.tree.map(lambda x: None if x.dtype == jax.dtypes.float0 else x, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_unreduced(sweep: Sweep, operands: Operands) -> Any:
    """Return the statistic's outputs; with `axis_name`, only the first shard has nonzero ones."""
    return _forward(sweep, operands)[0]


run_unreduced.defvjp(_forward, _backward)
