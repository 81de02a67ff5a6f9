"""The multiplier of a retain loss that is a constraint, moved beside the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from logitjax.unlearning._objective import UnlearningMethod


def dual_optimizer(
    method: UnlearningMethod, tx: optax.GradientTransformation, *, warmup: int = 0
) -> optax.GradientTransformation:
    """An optimizer of weights that also moves the multiplier of a method's constraint.

    ::

        multiplier <- max(0, multiplier + dual_step (retain loss - bound))

    Args:
        method: A method with a `dual_step`.
        tx: Optimizer of the weights.
        warmup: Number of steps before the multiplier moves.

    Returns:
        An optimizer of `{"weights", "multiplier"}`, as `make_unlearning_loss` takes them.

    >>> from logitjax.unlearning import UNLEARNING_METHODS
    >>> tx = dual_optimizer(UNLEARNING_METHODS["pdu"], optax.sgd(0.5))
    >>> params = {"weights": jnp.ones(1), "multiplier": jnp.float32(1.0)}
    >>> slack = {"weights": jnp.ones(1), "multiplier": jnp.float32(-0.3)}  # minus 0.5 - 0.2
    >>> moves, _ = tx.update(slack, tx.init(params), params)
    >>> print(f"{optax.apply_updates(params, moves)['multiplier']:.1f}")
    1.3

    References:
        OpenUnlearning's `PDU`, which moves it at every micro-batch.
    """

    def step(count: Any) -> jax.Array:
        return jnp.where(count < warmup, 0.0, method.dual_step)

    moves = optax.chain(optax.sgd(step), optax.keep_params_nonnegative())
    return optax.multi_transform(
        {"weights": tx, "multiplier": moves}, {"weights": "weights", "multiplier": "multiplier"}
    )
