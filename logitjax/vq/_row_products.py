"""Products with chosen rows, for re-scoring a few tokens of a vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from logitjax.kernels import native
from logitjax.ops import Array
from logitjax.ops import mesh as on_mesh

#: Rows that XLA gathers at a time for one position on a CPU: they fit its cache.
_PART = 256


def row_products(
    vectors: Float[Array, "n width"], rows: Float[Array, "vocab width"], ids: Int[Array, "n chosen"]
) -> Float[jax.Array, "n chosen"]:
    """Compute ``out[n, m] = vectors[n] . rows[ids[n, m]]``, on a CPU without copying rows."""
    vectors, rows = jnp.asarray(vectors), jnp.asarray(rows)
    ids = jnp.asarray(ids)
    if not rows.shape[0] and ids.size:
        raise ValueError(f"rows: expected at least one row, got shape {rows.shape}")
    # The kernel does not check its arguments.
    ids = jnp.clip(ids, 0, rows.shape[0] - 1)

    def products(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> tuple[jax.Array]:
        if vectors.dtype == jnp.float32 and rows.dtype in (jnp.float32, jnp.bfloat16):
            return (native.on_cpu(_native, _gathered, vectors, rows, ids),)
        return (_gathered(vectors, rows, ids),)

    return on_mesh.over_batch(products, (2,), vectors, rows, ids)[0]


@jax.custom_jvp
def _native(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    return native.row_products(vectors, rows, ids.astype(jnp.int32))


@_native.defjvp
def _native_jvp(primals: Any, tangents: Any) -> Any:
    vectors, rows, ids = primals
    return jax.jvp(lambda v, r: _gathered(v, r, ids), (vectors, rows), tangents[:2])


def _gathered(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    wide = jnp.promote_types(vectors.dtype, jnp.float32)

    def at(ids: jax.Array) -> jax.Array:
        return rows.at[ids].get(mode="promise_in_bounds").astype(vectors.dtype)

    def at_once(vector: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.matmul(at(ids), vector, preferred_element_type=wide)

    def by_parts(vector: jax.Array, ids: jax.Array) -> jax.Array:
        """A part's rows stay in the cache between gathering and reading."""
        parts = jnp.array_split(ids, max(1, -(-ids.size // _PART)))
        return jnp.concatenate([at_once(vector, part) for part in parts])

    if vectors.shape[0] == 1:
        one = (vectors[0], ids[0])
        return lax.platform_dependent(*one, cpu=by_parts, default=at_once)[None]
    return jnp.einsum("nd,ncd->nc", vectors, at(ids), preferred_element_type=wide)
