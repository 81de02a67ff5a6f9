"""Parts of losses of unlearning: float32 values, and preferences between answers."""

import jax
import jax.numpy as jnp

from logitjax.ops import Array, checks


def as_losses(values: Array, name: str) -> jax.Array:
    """Float32 losses, of any shape; float64 stays where x64 is on."""
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {values.dtype}")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def above_reference(nll: Array, reference: Array, name: str) -> jax.Array:
    """Decrease of answers' log-likelihood from before, in nats; before gets no gradient."""
    nll, reference = as_losses(nll, name), as_losses(reference, f"reference_{name}")
    checks.shapes(**{name: (nll, "any *same"), f"reference_{name}": (reference, "any *same")})
    return nll - jax.lax.stop_gradient(reference)


def preference(gap: jax.Array, beta: float) -> jax.Array:
    """`-(2 / beta) log sigmoid(beta gap)`: near a gap of 0 a descent, far above it nothing."""
    checks.positive(beta, "beta")
    # The factor 2 / beta is that of NPO's code: it changes the step, and not the minimum.
    # Log sigmoid overflows nowhere as softplus.
    return 2.0 / beta * jax.nn.softplus(-beta * gap)
