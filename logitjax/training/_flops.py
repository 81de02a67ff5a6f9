"""Arithmetic of a program, and the share of a device's peak that a step reaches."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

# Dense bfloat16 operations per second, by the makers' data sheets and JAX's names.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def matmul_flops(jaxpr: Any) -> float:
    """Multiplications and additions of all matrix products and convolutions of a jaxpr.

    Loops and kernels count as often as they run, a branch as its most expensive case, `shard_map`
    on every device. Elementwise work is not counted. A `while` loop counts once.

    >>> import jax
    >>> x = jax.numpy.ones((2, 3))
    >>> matmul_flops(jax.make_jaxpr(lambda x: x @ x.T)(x))
    24.0
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[i] for i in contracted)
            # A product and a sum.
            total += 2.0 * equation.outvars[0].aval.size * inner
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            # An output is a sum over `kernel.size / outputs` products.
            work = 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
            total += work / params["batch_group_count"]
        elif name == "cond":
            total += max(matmul_flops(branch) for branch in params["branches"])
        else:
            inside = sum(matmul_flops(inner) for inner in _jaxprs(params))
            if name == "scan":
                inside *= params["length"]
            elif name == "pallas_call":
                inside *= math.prod(params["grid_mapping"].grid)
            elif name == "shard_map":
                inside *= math.prod(
                    params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
                )
            total += inside
    return total


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                yield item


def utilisation(flops: float, seconds: float) -> dict[str, float]:
    """`tflops_per_second` of all devices, and `mfu`, the share of their peak if it is known."""
    if not flops:
        return {}
    # Recomputation included.
    rate, kind = flops / seconds, jax.devices()[0].device_kind
    # The longest matching name: `TPU v5` is also a prefix of `TPU v5 lite`.
    peaks = sorted((name for name in _PEAKS if name in kind), key=len)
    out = {"tflops_per_second": rate / 1e12}
    return out | ({"mfu": rate / (_PEAKS[peaks[-1]] * jax.device_count())} if peaks else {})
