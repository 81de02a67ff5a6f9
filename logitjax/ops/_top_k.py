"""An exact top-k in two stages, several times faster than a direct one over a large vocabulary."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, Shaped

from logitjax.kernels import native
from logitjax.ops import checks
from logitjax.ops._log_softmax import logsumexp
from logitjax.ops._mesh import over_batch
from logitjax.ops._types import Array, AxisName

#: Number of entries from which the CPU kernel is worth a call.
_LONG = 1024


def top_k(
    values: Shaped[Array, "*batch vocab"],
    k: int,
    *,
    axis_name: AxisName | None = None,
    group_size: int = 128,
) -> tuple[Shaped[jax.Array, "*batch k"], Int[jax.Array, "*batch k"]]:
    """The k largest entries along the last axis, largest first, and their indices.

    It returns what `jax.lax.top_k` returns; of equal values the lowest index comes first. The k
    largest entries lie in the k groups with the largest maxima. So it takes the maximum of each
    group of `group_size` neighbours, then the top k groups, then the top k of their entries. Where
    that saves nothing (small vocabulary, large k) it calls `jax.lax.top_k` itself.

    Args:
        values: `[*batch, vocab]`. `-inf` entries come last. The two stages in XLA may miss a nan,
            and may take a -0.0 where a 0.0 of another group should come first. A single stage and
            `logitjax.kernels` order these too as `jax.lax.top_k` does.
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.
            Each shard then sends its own k candidates, and indices refer to the whole vocabulary.

    Returns:
        `(values, indices)`, both `[*batch, k]`: the dtype of `values`, and int32. Differentiable in
        the values.

    Raises:
        ValueError: `k` is not in 1..vocab, or the vocabulary is sharded over an Explicit mesh axis
            and `axis_name` is not given.

    >>> import jax.numpy as jnp
    >>> top_k(jnp.array([1.0, 7.0, 3.0, 7.0]), 3)
    (Array([7., 7., 3.], dtype=float32), Array([1, 3, 2], dtype=int32))
    """
    values = jnp.asarray(values)
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    vocab = values.shape[-1] if values.ndim else 0
    if not 1 <= k <= vocab * shards:
        raise ValueError(f"k: expected 1 to the size of the vocabulary, {vocab * shards}, got {k}")
    if group_size < 1:
        raise ValueError(f"group_size: expected a positive number, got {group_size}")
    if axis_name is None:
        checks.vocabulary_unsharded(values, "values", "top-k")
        return _local_top_k(values, k, group_size)
    top_values, ids = _local_top_k(values, min(k, vocab), group_size)
    ids = ids + lax.axis_index(axis_name) * vocab
    # Shards lie in the order of their ids, so position still breaks ties by id.
    axis = values.ndim - 1
    top_values = lax.all_gather(top_values, axis_name, axis=axis, tiled=True, to="invarying")
    ids = lax.all_gather(ids, axis_name, axis=axis, tiled=True, to="invarying")
    top_values, places = _local_top_k(top_values, k, group_size)
    return top_values, gather_at(ids, places)


def gather_at(
    values: Shaped[Array, "*batch vocab"],
    ids: Int[Array, "*batch k"],
    *,
    axis_name: AxisName | None = None,
) -> Shaped[jax.Array, "*batch k"]:
    """The entries of `values` at the given indices, row by row.

    Args:
        values: `[*batch, vocab]`.
        ids: `[*batch, k]`, within the vocabulary. Under `jit`, an id outside it gives nan (the
            smallest integer if `values` are integers).
        axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that axis.
            `ids` then refer to the whole vocabulary.

    Returns:
        `[*batch, k]`, the dtype of `values`.

    Raises:
        TypeError: `ids` are not integers.
        ValueError: the leading axes differ, an id is outside of the vocabulary, or the vocabulary
            is sharded over an Explicit mesh axis and `axis_name` is not given.

    >>> import jax.numpy as jnp
    >>> gather_at(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[2, 0]]))
    Array([[3., 1.]], dtype=float32)
    """
    checks.shapes(values=(values, "any *batch vocab"), ids=(ids, "int *batch k"))
    values, ids, vocab = jnp.asarray(values), jnp.asarray(ids), jnp.shape(values)[-1]
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    checks.ids(ids, vocab * shards, "ids")

    def gather(values: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
        # A negative id does not count from the end: it is as invalid as one that is too large.
        return (jnp.take_along_axis(values, jnp.where(ids < 0, vocab, ids), axis=-1),)

    if axis_name is None:
        checks.vocabulary_unsharded(values, "values", "gather")
        return over_batch(gather, (values.ndim,), values, ids)[0]
    local = ids - lax.axis_index(axis_name) * vocab
    here = (local >= 0) & (local < vocab)
    # For an id that no shard has, each returns its value for ids outside its part.
    outside = (ids < 0) | (ids >= vocab * shards)
    local = jnp.where(here, local, jnp.where(outside, -1, 0))
    result = over_batch(gather, (values.ndim,), values, local)[0]
    return lax.psum(jnp.where(here | outside, result, 0), axis_name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """The k largest logits of each position, as cached for a teacher instead of all logits.

    Attributes:
        values: `[*batch, k]` logits, largest first.
        indices: `[*batch, k]` int32, their ids in the vocabulary.
        log_z: `[*batch]`, log of the summed exponentials over the *whole* vocabulary, so that
            `values - log_z[..., None]` are log-probabilities; None if it was not stored.
    """

    # Not `jax.Array`: a tree of specs or shapes is built by the same constructor.
    values: Any
    indices: Any
    log_z: Any

    @classmethod
    def of(
        cls,
        logits: Float[Array, "*batch vocab"],
        k: int,
        *,
        vocab_where: Bool[Array, "..."] | None = None,
        axis_name: AxisName | None = None,
    ) -> "TopK":
        """The top k of full logits, in float32; for a temperature, pass `logits / temperature`.

        Args:
            logits: `[*batch, vocab]`.
            vocab_where: boolean, broadcastable to `logits`: True for the entries that exist.
            axis_name: inside `jax.shard_map`, the mesh axis over which the vocabulary is split.

        Raises:
            ValueError: as for `top_k`.

        >>> import numpy as np
        >>> top = jax.jit(lambda logits: TopK.of(logits, 2))(np.log([0.1, 0.7, 0.2]))
        >>> [f"{log_p:.2f}" for log_p in np.subtract(top.values, top.log_z)], top.indices
        (['-0.36', '-1.61'], Array([1, 2], dtype=int32))
        """
        logits = checks.as_float(logits, "logits", vocab_where)
        values, indices = top_k(logits, k, axis_name=axis_name)
        return cls(values, indices, logsumexp(logits, axis_name=axis_name))


def _local_top_k(values: jax.Array, k: int, group_size: int) -> tuple[jax.Array, jax.Array]:
    grouped = values.shape[-1] >= 2 * k * group_size
    if values.dtype == jnp.float32 and values.shape[-1] >= _LONG and native.in_use():

        def find(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            ids = native.on_cpu(
                functools.partial(_native_ids, k=k),
                lambda v: _grouped_ids(v, k, group_size) if grouped else lax.top_k(v, k)[1],
                lax.stop_gradient(values),
            )
            return jnp.take_along_axis(values, ids, axis=-1), ids

    elif not grouped:

        def find(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            largest, ids = lax.top_k(values, k)
            return largest, ids

    else:

        def find(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            ids = _grouped_ids(lax.stop_gradient(values), k, group_size)
            # Gathered from the input, so that the gradient scatters k entries instead of k groups.
            return jnp.take_along_axis(values, ids, axis=-1), ids

    return over_batch(find, (values.ndim, values.ndim), values)


def _native_ids(values: jax.Array, *, k: int) -> jax.Array:
    *batch, vocab = values.shape
    return native.largest_ids(values.reshape(-1, vocab), k).reshape(*batch, k)


def _grouped_ids(values: jax.Array, k: int, group_size: int) -> jax.Array:
    *batch, vocab = values.shape
    groups = vocab // group_size
    total = groups * group_size
    if total == vocab:
        maxima = values.reshape(*batch, groups, group_size).max(-1)
    else:
        # A slice here costs ten times the maxima themselves on CPU.
        window = (1,) * len(batch) + (group_size,)
        lowest = _lowest(values.dtype)
        maxima = lax.reduce_window(values, lowest, lax.max, window, window, "VALID")
    # Exact: an entry outside of these k groups has k others, the maxima, at least as large.
    _, chosen = lax.top_k(maxima, k)
    # In the order of the vocabulary, so that equal values keep it.
    first = jnp.sort(chosen, axis=-1) * group_size
    # The incomplete group at the end is always searched: padding it would copy all `values`.
    candidates = jnp.concatenate(
        [_windows(values, first, group_size).reshape(*batch, k * group_size), values[..., total:]],
        axis=-1,
    )
    _, places = lax.top_k(candidates, k)
    group, offset = places // group_size, places % group_size
    in_group = jnp.take_along_axis(first, jnp.minimum(group, k - 1), axis=-1) + offset
    return jnp.where(group < k, in_group, places - k * group_size + total)


def _lowest(dtype: jnp.dtype) -> np.ndarray:
    if jnp.issubdtype(dtype, jnp.floating):
        return np.array(-np.inf, dtype)
    return np.array(jnp.iinfo(dtype).min, dtype)


def _windows(values: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """`values[..., first : first + size]` for each of the `[*batch, k]` first indices."""
    batch = tuple(range(values.ndim - 1))
    dimensions = lax.GatherDimensionNumbers(
        offset_dims=(values.ndim,),
        collapsed_slice_dims=(),
        start_index_map=(values.ndim - 1,),
        operand_batching_dims=batch,
        start_indices_batching_dims=batch,
    )
    slice_sizes = (1,) * len(batch) + (size,)
    return lax.gather(values, first[..., None], dimensions, slice_sizes, mode="promise_in_bounds")
