"""What losses of unlearning are made of: sums over answers, preferences, and two weighted means."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, Number, checks, masked_mean


def as_losses(values: Array, name: str) -> jax.Array:
    """Float32 losses, of any shape; float64 stays where x64 is on."""
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {values.dtype}")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def sequence_nll(
    token_nll: Float[Array, "*batch time"], where: Bool[Array, "..."] | None = None
) -> tuple[Float[jax.Array, "*batch"], Int[jax.Array, "*batch"]]:
    """Summed negative log-likelihood of each answer, and how many tokens it has.

    ::

        n = sum_t where_t nll_t,    |y| = sum_t where_t

    Args:
        token_nll: `[*batch, time]`, as from `cross_entropy`; whatever stands where `where` is
            False, nan included, counts for nothing.
        where: boolean, broadcastable to `token_nll`: the tokens of the answer.

    Returns:
        float32 `[*batch]` and int32 `[*batch]`.

    Raises:
        TypeError: `token_nll` is not floating point or `where` not boolean.
        ValueError: `where` does not broadcast.

    >>> sequence_nll(jnp.array([1.0, jnp.nan, 2.0]), jnp.array([True, False, True]))
    (Array(3., dtype=float32), Array(2, dtype=int32))
    """
    nll = as_losses(token_nll, "token_nll")
    if where is None:
        where = jnp.ones(nll.shape, bool)
    where = jnp.asarray(where)
    checks.where(where, nll.shape)
    where = jnp.broadcast_to(where, nll.shape)
    return jnp.where(where, nll, 0.0).sum(-1), where.sum(-1, dtype=jnp.int32)


def unlearning_objective(
    forget_losses: Float[Array, "..."],
    retain_losses: Float[Array, "..."] | None = None,
    *,
    forget_weight: Number = 1.0,
    retain_weight: Number = 1.0,
    forget_where: Bool[Array, "..."] | None = None,
    retain_where: Bool[Array, "..."] | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """The weighted sum of a mean forget loss and a mean retain loss.

    Gradient difference is `gradient_ascent` with the retain tokens' likelihood loss. The assistant
    of a logit difference reverses both: likelihood on what is to be forgotten, and `uniform_kl` on
    what is to be kept (`make_assistant_loss` computes it in one sweep over the head).

    ::

        gamma mean(forget_losses) + alpha mean(retain_losses)

    Args:
        forget_losses: any shape, such as `npo` of answers or `gradient_ascent` of tokens.
        retain_losses: any shape: `cross_entropy` of the tokens to keep, or `kl_divergence` from the
            model before unlearning ("KL-retain"). None for methods without.
        forget_weight: gamma.
        retain_weight: alpha.
        forget_where: boolean, the entries that count; all when None.
        retain_where: likewise. Published codes average the divergence over all positions, prompt
            and padding included; give the tokens of the answers to leave those out.

    Returns:
        The float32 scalar, and both means: `{"forget", "retain"}`.

    Raises:
        TypeError: losses are not floating point or masks not boolean.
        ValueError: a mask does not broadcast.

    >>> objective = jax.jit(unlearning_objective)
    >>> loss, means = objective(jnp.array([-1.0, -3.0]), jnp.ones(5), retain_weight=0.5)
    >>> float(loss), float(means["forget"])
    (-1.5, -2.0)

    References:
        OpenUnlearning's `GradDiff` and what derives from it.
    """
    forget = masked_mean(as_losses(forget_losses, "forget_losses"), forget_where)
    if retain_losses is None:
        return jnp.asarray(forget_weight * forget), {"forget": forget}
    retain = masked_mean(as_losses(retain_losses, "retain_losses"), retain_where)
    loss = forget_weight * forget + retain_weight * retain
    return jnp.asarray(loss), {"forget": forget, "retain": retain}


def above_reference(nll: Array, reference: Array, name: str, reference_name: str) -> jax.Array:
    nll, reference = as_losses(nll, name), as_losses(reference, reference_name)
    checks.same_shape(nll, reference, name, reference_name)
    return nll - jax.lax.stop_gradient(reference)


def preference(gap: jax.Array, beta: float) -> jax.Array:
    checks.positive(beta, "beta")
    return 2.0 / beta * jax.nn.softplus(-beta * gap)
