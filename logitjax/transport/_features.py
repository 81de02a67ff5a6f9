"""Node features of the graph C = Z^T Z, computed from Z: C is never formed at vocabulary scale."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax import ops
from logitjax.ops import Array
from logitjax.transport._rounding import Scalar, safe_sqrt

Feature = Literal["row_sum", "off_diagonal", "row_rms"]

# Entries of scratch memory that one block of positions may use.
_BLOCK_ENTRIES = 1 << 22


def graph_features(
    values: Float[Array, "*batch positions width"],
    ids: Int[Array, "*batch positions width"] | None = None,
    where: Bool[Array, "*batch positions"] | None = None,
    *,
    feature: Feature = "row_sum",
    num_nodes: int | None = None,
    sequence_axis_name: str | None = None,
) -> Float[Array, "*batch nodes"]:
    """One number for each node of the co-activation graph C = Z^T Z, without forming C.

    ``values`` are the rows of Z. Without ``ids`` a column is a node (rank nodes). With ``ids``
    row t holds ``values[t, j]`` at node ``ids[t, j]`` and zero elsewhere (token nodes)::

        row_sum       f = C 1 = Z^T (Z 1)                O(T k)
        off_diagonal  (C - diag C) 1                     O(T k)
        row_rms       f_u^2 = mean_w C_uw^2              O(T^2 k)

    Args:
        values: rows of Z, ``[*batch, positions, width]``.
        ids: node of each value, in ``[0, num_nodes)``; out-of-range ids are dropped.
        where: valid positions.
        num_nodes: number of nodes; needed with ``ids``, otherwise it is the width.
        sequence_axis_name: mesh axis of the positions in ``shard_map``; each shard gets all nodes.

    Returns:
        Float32 features ``[*batch, nodes]``.

    Raises:
        ValueError: for an unknown feature, or ids without ``num_nodes``.

    >>> import jax.numpy as jnp
    >>> z = jnp.array([[3.0, 1.0], [2.0, 1.0]])
    >>> graph_features(z)                                     # rows of [[13, 5], [5, 2]]
    Array([18.,  7.], dtype=float32)
    >>> graph_features(z, jnp.array([[2, 0], [2, 1]]), num_nodes=4)
    Array([ 4.,  3., 18.,  0.], dtype=float32)

    References:
        InfiGFusion (arXiv 2505.13893), framework figure: C = Z^T Z and one scalar a node. The
        paper builds C; f = Z^T (Z 1) is the same number.
    """
    if feature not in get_args(Feature):
        raise ValueError(f"feature: expected one of {get_args(Feature)}, got {feature!r}")
    if ids is not None and num_nodes is None:
        raise ValueError("num_nodes: expected the number of nodes beside ids, got None")
    ops.checks.shapes(
        values=(values, "number *batch positions width"),
        ids=(ids, "int *batch positions width"),
        where=(where, "bool *batch positions"),
    )
    z = jnp.asarray(values)
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    if where is not None:
        z = jnp.where(jnp.asarray(where)[..., None], z, 0.0)
    nodes = z.shape[-1]
    if ids is not None and num_nodes is not None:
        ids, nodes = drop_negative(ids), num_nodes
        # A value without a node is not part of its row's sum either.
        z = jnp.where(ids < nodes, z, 0.0)
    if feature == "row_rms":
        return safe_sqrt(_row_squares(z, ids, nodes, sequence_axis_name) / max(nodes, 1))
    sums = z.sum(-1, keepdims=True)
    weighted = z * (sums - z) if feature == "off_diagonal" else z * sums
    return ops.mesh.psum(scatter_columns(weighted, ids, nodes), sequence_axis_name)


def compact_nodes(
    ids: Int[Array, "*batch positions width"], sequence_axis_name: str | None = None
) -> Int[Array, "*batch positions width"]:
    """Renumber token ids to 0, 1, ... in order of id, so that T k nodes hold any vocabulary.

    The number of nodes stays static (positions times width); unused ones are isolated nodes with
    feature zero. A negative id, which belongs to no node, becomes -1.

    Args:
        ids: token ids, `[*batch, positions, width]`.
        sequence_axis_name: mesh axis that shards the positions, inside ``shard_map``: all shards
            number together, and each gets the numbers of its own positions.

    Raises:
        TypeError: ids are not integers.
        ValueError: they have fewer than two axes.

    >>> import jax, jax.numpy as jnp
    >>> jax.jit(compact_nodes)(jnp.array([[900, 7], [7, 31]]))
    Array([[2, 0],
           [0, 1]], dtype=int32)
    """
    ops.checks.shapes(ids=(ids, "int *batch positions width"))
    array = jnp.asarray(ids)
    axis = array.ndim - 2
    ids = gather_positions(array, axis, sequence_axis_name)
    # After all others, so that those are numbered as if there were none.
    flat = drop_negative(ids).reshape(*ids.shape[:-2], math.prod(ids.shape[-2:]))
    order = jnp.argsort(flat, axis=-1)
    ordered = jnp.take_along_axis(flat, order, axis=-1)
    new = jnp.concatenate(
        [jnp.zeros_like(ordered[..., :1]), ordered[..., 1:] != ordered[..., :-1]], axis=-1
    )
    # `[*batch, T k]`.
    rank = jnp.cumsum(new.astype(jnp.int32), axis=-1)
    # The inverse permutation, back to the order of `ids`.
    inverse = jnp.argsort(order, axis=-1)
    nodes = jnp.take_along_axis(rank, inverse, axis=-1).reshape(ids.shape)
    nodes = jnp.where(ids < 0, -1, nodes)
    if sequence_axis_name is None:
        return nodes
    start = jax.lax.axis_index(sequence_axis_name) * array.shape[axis]  # this shard's
    return jax.lax.dynamic_slice_in_dim(nodes, start, array.shape[axis], axis=axis)


def drop_negative(ids: Any) -> jax.Array:
    """Ids with negative ones moved out of range above, where scatters drop and gathers fill."""
    ids = jnp.asarray(ids)
    return jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)


def gather_positions(x: jax.Array, axis: int, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def scatter_columns(
    values: jax.Array, ids: Int[Array, "*batch positions width"] | None, num_nodes: int
) -> jax.Array:
    """Sum over positions, each value into its node: ``[*batch, T, k] -> [*batch, nodes]``."""
    if ids is None:
        return values.sum(-2)

    def one(v: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.zeros(num_nodes, v.dtype).at[i.reshape(-1)].add(v.reshape(-1), mode="drop")

    return over_batch(one, values, jnp.asarray(ids))


def over_batch(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Map a function of arrays `[positions, width]` over their leading axes."""
    for _ in range(arrays[0].ndim - 2):
        function = jax.vmap(function)
    return function(*arrays)


def _blocks(entries: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays ``[blocks, block, width]``: `entries` a row fit into scratch memory, zeros fill up."""
    positions = len(arrays[0])
    block = max(1, min(positions, _BLOCK_ENTRIES // max(entries, 1)))
    padded = (jnp.pad(x, ((0, -positions % block), (0, 0))) for x in arrays)
    return tuple(x.reshape(-1, block, x.shape[1]) for x in padded)


def _row_squares(
    z: Float[jax.Array, "*batch positions width"],
    ids: Array | None,
    num_nodes: int,
    axis_name: str | None,
) -> Float[jax.Array, "*batch nodes"]:
    """r_u = sum_w C_uw^2 = sum_{t,s} Z_tu (Z Z^T)_ts Z_su."""
    if ids is None:
        if z.shape[-1] <= z.shape[-2]:
            c = ops.mesh.psum(jnp.einsum("...tu,...tw->...uw", z, z), axis_name)
            return jnp.square(c).sum(-1)
        every = gather_positions(z, z.ndim - 2, axis_name)
        gram = jnp.einsum("...tu,...su->...ts", z, every)
        return ops.mesh.psum(
            jnp.sum(z * jnp.einsum("...ts,...su->...tu", gram, every), -2), axis_name
        )
    ids = jnp.asarray(ids)
    every_z = gather_positions(z, z.ndim - 2, axis_name)
    every_ids = gather_positions(ids, ids.ndim - 2, axis_name)

    def one(v: jax.Array, i: jax.Array, all_v: jax.Array, all_i: jax.Array) -> jax.Array:
        _, products = sparse_products(v, i, all_v, all_i, num_nodes)
        return scatter_columns(v * products, i, num_nodes)

    return ops.mesh.psum(over_batch(one, z, ids, every_z, every_ids), axis_name)


def sparse_products(
    values: jax.Array,
    ids: jax.Array,
    others: jax.Array,
    other_ids: jax.Array,
    num_nodes: int,
    *,
    left: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Blockwise ``(||Z W^T||_F^2, Z W^T W at ids)`` of sparse Z (values, ids) and W (others).

    ``left`` replaces Z within Z W^T (if nodes have weights). O(T_z T_w k), block by block.
    """
    pieces = _blocks(max(num_nodes, values.size), others, other_ids)
    block = pieces[0].shape[1]
    rows = jnp.arange(block)[:, None]
    left = values if left is None else left

    @jax.checkpoint
    def step(carry: Any, piece: Any) -> tuple[Any, None]:
        norm, products = carry
        w, w_ids = piece
        dense = jnp.zeros((block, num_nodes), w.dtype).at[rows, w_ids].add(w, mode="drop")
        at_ids = dense.at[:, ids].get(mode="fill", fill_value=0.0)  # [block, T, k]
        gram = jnp.einsum("tk,stk->st", left, at_ids)
        products = products + jnp.einsum("st,stk->tk", gram, at_ids)
        return (norm + jnp.sum(jnp.square(gram)), products), None

    # Zeros derived from the inputs, so that they vary over the same mesh axes in shard_map.
    zero = (values * 0.0) + jnp.sum(others) * 0.0
    (norm, products), _ = jax.lax.scan(step, (jnp.sum(zero), zero), pieces)
    return norm, products


def merged_rows(
    values: Float[Array, "*batch s k"], ids: Any, others: Float[Array, "*batch t j"], other_ids: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of Z - W and of Z + W at common ids: ``([*batch, T, k], [*batch, T, k], ids)``.

    Rows are subtracted before multiplication, so nearly equal ones lose no digits.
    """
    positions = max(values.shape[-2], others.shape[-2])

    def pad(x: Array, fill: float | int) -> jax.Array:
        widths = [(0, 0)] * (x.ndim - 2) + [(0, positions - x.shape[-2]), (0, 0)]
        return jnp.pad(x, widths, constant_values=fill)

    z, w = pad(values, 0.0), pad(others, 0.0)
    ids, other_ids = (pad(drop_negative(x), jnp.iinfo(jnp.int32).max) for x in (ids, other_ids))
    same = ids[..., :, None] == other_ids[..., None, :]
    partner = jnp.sum(jnp.where(same, w[..., None, :], 0.0), axis=-1)
    alone = jnp.where(same.any(-2), 0.0, w)
    return (
        jnp.concatenate([z - partner, -alone], axis=-1),
        jnp.concatenate([z + partner, alone], axis=-1),
        jnp.concatenate([ids, other_ids], axis=-1),
    )


def sparse_difference(
    a: Float[jax.Array, "t k"],
    b: Float[jax.Array, "t k"],
    ids: Int[jax.Array, "t k"],
    every_a: Float[jax.Array, "s k"],
    every_b: Float[jax.Array, "s k"],
    every_ids: Int[jax.Array, "s k"],
    num_nodes: int,
) -> Scalar:
    """Half of ``<A A^T, B B^T> + <A B^T, B A^T>``, these rows against all rows, blockwise."""
    pieces = _blocks(2 * max(num_nodes, a.size), every_a, every_b, every_ids)
    block = pieces[0].shape[1]
    rows = jnp.arange(block)[:, None]

    @jax.checkpoint
    def step(total: jax.Array, piece: Any) -> tuple[jax.Array, None]:
        piece_a, piece_b, piece_ids = piece

        def at_ids(values: jax.Array) -> jax.Array:
            dense = jnp.zeros((block, num_nodes), values.dtype)
            dense = dense.at[rows, piece_ids].add(values, mode="drop")
            return dense.at[:, ids].get(mode="fill", fill_value=0.0)  # [block, T, k]

        of_a, of_b = at_ids(piece_a), at_ids(piece_b)
        aa, ab = (jnp.einsum("tk,stk->st", left, of_a) for left in (a, b))
        ba, bb = (jnp.einsum("tk,stk->st", left, of_b) for left in (a, b))
        return total + jnp.sum(jnp.sum(aa * bb + ab * ba, axis=1)), None

    zero = jnp.sum(a * 0.0) + jnp.sum(every_a * 0.0)
    return 0.5 * jax.lax.scan(step, zero, pieces)[0]
