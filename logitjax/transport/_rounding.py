"""Bounds of the distance between computed numbers and the numbers they represent.

They rest on three facts, with u the unit roundoff and ``gamma(n) = n u / (1 - n u)``:

- A sum of n products is off by at most ``gamma(n)`` times the sum of their absolute values,
  whatever the order of summation (Higham, Accuracy and stability of numerical algorithms, 3.1).
- The p-th root of the Gromov-Wasserstein cost moves by at most ``|C - C'|_p``, in the norm of
  L_p(a x a), when C becomes C'; so it is enough to know how far a computed matrix is off.
- A transport cost of features moves, as a p-th root, by at most the norm of their errors.

Concrete arrays are computed with in float64, traced ones in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.ops import Array

# Types of arguments and results of this package, for a graph of n nodes.
Scalar = Float[jax.Array, ""]
Vector = Float[jax.Array, "n"]
Square = Float[jax.Array, "n n"]
Order = Int[jax.Array, "n"]
Weights = Float[Array, "_"] | None

# Operations besides the additions: products, weights, roots. Deliberately generous.
_EXTRA = 16
# Possible sum of products that underflow, in units of the largest entry.
UNDERFLOW = 1e-30


def real(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)  # pyright: ignore


def gamma(count: int) -> float:
    """Relative error of a sum of `count` products of one sign, in any order."""
    share = (count + _EXTRA) * float(jnp.finfo(real(0.0).dtype).eps) / 2
    # Beyond half nothing is known; a finite number keeps zero times it zero.
    return share / (1 - share) if share < 0.5 else 1e30


def lowered(raw: Any, *, p: int, relative: Any = 0.0, absolute: Any = 0.0, root: Any = 0.0) -> Any:
    """A proven lower bound from a computed one, with the gradient of the computed one.

    Rounding may have added a `relative` share and `absolute` to the cost, and `root` to its root.
    """
    least = jnp.maximum(raw * (1 - relative) - absolute, 0.0)
    if p == 1:
        least = jnp.maximum(least - root, 0.0)
    else:
        least = jnp.square(jnp.maximum(jnp.sqrt(least) - root, 0.0))
    least = jnp.maximum(least * (1 - gamma(0)) - UNDERFLOW, 0.0)
    # The value of the bound, with the gradient of the computed number.
    return (raw - jax.lax.stop_gradient(raw)) + jax.lax.stop_gradient(least)


def power_of_two(exponent: jax.Array | int) -> jax.Array:
    """2^exponent, exactly; beyond the type's normal numbers the nearest of them."""
    info = jnp.finfo(real(0.0).dtype)
    exponent = jnp.clip(jnp.asarray(exponent, f"int{info.bits}"), info.minexp, info.maxexp - 1)
    return jax.lax.bitcast_convert_type((exponent + (info.maxexp - 1)) << info.nmant, info.dtype)


def times_power_of_two(
    x: Float[jax.Array, "*shape"], exponent: jax.Array | int
) -> Float[jax.Array, "*shape"]:
    """x 2^exponent in representable steps, so that only the result can over- or underflow."""
    # Costs have four times the exponents of the graphs' entries.
    steps = 6
    for step in range(steps):
        x = x * power_of_two((exponent + step) // steps)
    return x


def distance(errors: Vector, weights: Vector, p: int) -> Scalar:
    if p == 1:
        return jnp.sum(weights * errors)
    return jnp.sqrt(jnp.sum(weights * jnp.square(errors)))


def safe_sqrt(x: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def sqrt_error(
    computed: Float[jax.Array, "*shape"], error: Float[jax.Array, "*shape"]
) -> Float[jax.Array, "*shape"]:
    """Error of a root by that of its square: at most ``error / sqrt(x)`` and at most its root."""
    root = safe_sqrt(computed)
    worst = safe_sqrt(error)
    return (
        jnp.where(root > worst, error / jnp.where(root > worst, root, 1.0), worst) + gamma(0) * root
    )


def deviation_of(
    mean: Vector, square: Vector, mean_error: Vector, square_error: Vector
) -> tuple[Vector, Vector]:
    """The deviation from mean and mean square, and its error from theirs."""
    variance = square - jnp.square(mean)
    error = (
        square_error
        + mean_error * (2 * jnp.abs(mean) + mean_error)
        + gamma(0) * (jnp.abs(square) + jnp.square(mean))
    )
    return safe_sqrt(variance), sqrt_error(variance, error)
