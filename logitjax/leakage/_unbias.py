"""Exact algebra of reported log-probabilities under a logit bias."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import Array, Number, checks


@jax.jit
def unbias_by_reference(
    values: Float[Array, "*batch k"],
    reference: Float[Array, "*batch"] | Number,
    reference_log_prob: Float[Array, "*batch"] | Number,
) -> Float[jax.Array, "*batch k"]:
    """Log-probabilities of tokens that shared a bias with a reference token.

    The stable form: the normaliser, whatever the bias made of it, cancels. ::

        log p_i = (y_i - y_r) + log p_r

    Args:
        values: ``[*batch, k]`` reported under the bias.
        reference: ``[*batch]``, reported for the reference token in the same answers.
        reference_log_prob: its log-probability without a bias, from one more query.
    """
    values = checks.as_float(values, "values")
    return (
        values
        - jnp.expand_dims(jnp.asarray(reference), -1)
        + jnp.expand_dims(jnp.asarray(reference_log_prob), -1)
    )


@jax.jit
def unbias_by_visible(
    values: Float[Array, "*batch k"],
    visible: Float[Array, "*batch"] | Number,
    visible_log_prob: Float[Array, "*batch"] | Number,
    bias: Number,
) -> Float[jax.Array, "*batch k"]:
    """The same where the known token is in the answer but was not biased.

    ::

        log p_i = y_i - bias - y_r + log p_r

    Args:
        values: ``[*batch, k]`` reported for biased tokens.
        visible: ``[*batch]`` reported for a token without a bias, in the same answers.
        visible_log_prob: its log-probability without any bias.
        bias: nats.
    """
    return unbias_by_reference(values, visible, visible_log_prob) - bias


@jax.jit
def unbias_alone(
    values: Float[Array, "*batch k"], bias: Number
) -> tuple[Float[jax.Array, "*batch k"], Float[jax.Array, "*batch"]]:
    """Log-probabilities from one answer alone, where no reference can be had; ill-conditioned.

    With P_B the reported mass of the biased tokens and P their true one, P_B / (1 - P_B) is
    e^bias P / (1 - P), hence ::

        log p_i = y_i - logaddexp(bias + log(1 - P_B), log P_B)

    Args:
        values: ``[*batch, k]`` reported for the k tokens that were biased, all of them.
        bias: nats.

    Returns:
        The log-probabilities, nats, and ``[*batch]`` how much an error in the reported values is
        multiplied: about P_B / (1 - P_B) where that counts. nan where 1 - P_B is lost altogether.

    References:
        The formula of openlogprobs; its error is our reading of it.
    """
    values = checks.as_float(values, "values")
    log_mass = jax.nn.logsumexp(values, axis=-1)
    # log(1 - P_B) where P_B is close to 1 is what makes this form hard.
    rest = jnp.log(-jnp.expm1(jnp.minimum(log_mass, 0.0)))
    shift = jnp.logaddexp(bias + rest, log_mass)
    share = jax.nn.sigmoid(bias + rest - log_mass)
    # Where 1 - P_B is lost this is zero times infinity: nan.
    return values - shift[..., None], 1.0 + share * jnp.exp(log_mass - rest)
