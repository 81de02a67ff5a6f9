"""Kernels for TPUs that stream the sketch of a paged head, and the pages that it chose."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
# Of 64 MiB or more on chip.
_PARAMS = pltpu.CompilerParams(vmem_limit_bytes=48 * 2**20)
_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
# Products with rows.
_across = functools.partial(
    lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
)


def page_mass(
    hidden: jax.Array,
    projection: jax.Array,
    codes: jax.Array,
    lines: jax.Array,
    size: int,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """``[n, pages]`` and ``[n, 1]``, logsumexp by page and of all of these logits. ::

    (hidden @ projection.T @ codes) * scales + offsets
    """
    (rank, width), (steps, _, tile), n = projection.shape, lines.shape, hidden.shape[0]
    count = tile // size

    def kernel(
        x: Any, projection: Any, codes: Any, lines: Any, out: Any, log_z: Any, here: Any
    ) -> None:
        @pl.when(pl.program_id(0) == 0)
        def _() -> None:
            log_z[...] = jnp.full_like(log_z, -jnp.inf)
            here[...] = _across(x[...], projection[...]).astype(here.dtype)

        logits = _dot(here[...], codes[...].astype(here.dtype)) * lines[0, :1] + lines[0, 1:]
        peak = logits.max(-1, keepdims=True)
        # Sums over a page's lanes are a product with zeros and ones.
        page = lax.broadcasted_iota(jnp.int32, (tile, count), 0) // size
        ones = (page == lax.broadcasted_iota(jnp.int32, (tile, count), 1)).astype(jnp.float32)
        sums = _dot(jnp.exp(logits - peak), ones, precision=lax.Precision.HIGHEST)
        out[0] = jnp.log(sums) + peak
        # The first tile has tokens, so that both are never -inf.
        log_z[...] = jnp.logaddexp(log_z[...], jnp.log(sums.sum(-1, keepdims=True)) + peak)

    out, log_z = pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[
            pl.BlockSpec((n, width), lambda i: (0, 0)),
            pl.BlockSpec((rank, width), lambda i: (0, 0)),
            pl.BlockSpec((rank, tile), lambda i: (0, i)),
            pl.BlockSpec((1, 2, tile), lambda i: (i, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((1, n, count), lambda i: (i, 0, 0)),
            pl.BlockSpec((n, 1), lambda i: (0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((steps, n, count), jnp.float32),
            jax.ShapeDtypeStruct((n, 1), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((n, rank), jnp.bfloat16)],
        cost_estimate=pl.CostEstimate(
            flops=2 * n * (width * rank + steps * tile * (rank + count)),
            bytes_accessed=steps * (tile * rank // 2 + 8 * tile + 4 * n * count)
            + 2 * width * (n + rank),
            transcendentals=n * steps * tile,
        ),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="logitjax_page_mass",
    )(hidden.astype(projection.dtype), projection, codes, lines)
    return jnp.moveaxis(out, 1, 0).reshape(n, -1), log_z


def page_products(
    hidden: jax.Array, rows: jax.Array, ids: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """``[n, chosen * size]``, products with the rows ``[pages, size, width]`` of sorted pages."""
    (n, width), (_, size, _), chosen = hidden.shape, rows.shape, ids.shape[0]
    # Several pages a step, so that its results fill the lanes and its copies run together.
    copies = max(1, _LANES // size)
    # A page that a copy already has is not copied again.
    ids = jnp.pad(ids, (0, -chosen % copies), mode="edge").astype(jnp.int32)
    steps = ids.size // copies

    def kernel(_: Any, x: Any, *refs: Any) -> None:
        *pages, out = refs
        out[0] = _across(x[...], jnp.concatenate([page[0] for page in pages]))

    def page(copy: int, step: Any, ids: Any) -> tuple[Any, int, int]:
        return ids[step * copies + copy], 0, 0

    blocks = [
        pl.BlockSpec((1, size, width), functools.partial(page, copy)) for copy in range(copies)
    ]
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps,),
            in_specs=[pl.BlockSpec((n, width), lambda i, ids: (0, 0)), *blocks],
            out_specs=pl.BlockSpec((1, n, copies * size), lambda i, ids: (i, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((steps, n, copies * size), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=2 * n * ids.size * size * width,
            bytes_accessed=rows.dtype.itemsize * width * (n + ids.size * size)
            + 4 * ids.size * (1 + n * size),
            transcendentals=0,
        ),
        compiler_params=_PARAMS,
        interpret=interpret,
        name="logitjax_page_products",
    )(ids, hidden.astype(rows.dtype), *[rows] * copies)
    return jnp.moveaxis(out, 1, 0).reshape(n, -1)[:, : chosen * size]
