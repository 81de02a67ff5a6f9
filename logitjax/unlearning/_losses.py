"""Unlearning losses that start at negative log-likelihoods, of tokens or of whole answers.

Where these came from does not matter: `cross_entropy` of logits or `linear_cross_entropy` of hidden
states, which never forms them. Weights and defaults are those of OpenUnlearning
(`UNLEARNING_METHODS` holds what its configurations say of each method).

>>> import jax, numpy as np
>>> from logitjax import losses, unlearning
>>> @jax.jit
... def both(logits, labels, answer):
...     nll, lengths = unlearning.sequence_nll(losses.cross_entropy(logits, labels), answer)
...     return unlearning.npo(nll, nll - 1.0), unlearning.simnpo(nll, lengths)
>>> logits, labels = np.zeros((2, 3, 5)), np.array([[1, 2, 3], [4, 0, 0]])
>>> answer = np.array([[True, True, True], [True, False, False]])
>>> npo, simnpo = jax.device_get(both(logits, labels, answer))
>>> [f"{loss:.3f}" for loss in npo]
['12.888', '12.888']
>>> [f"{loss:.5f}" for loss in simnpo]
['0.00032', '0.00032']
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, Number, checks


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


def gradient_ascent(
    nll: Float[Array, "*batch"], *, beta: Number = 0.0
) -> Float[jax.Array, "*batch"]:
    """Make what is to be forgotten less likely: minus its likelihood loss, without a bound.

    With `beta` it is WGA, whose weight fades as a token becomes unlikely. The weight is a constant
    for the gradient, as in the authors' code.

    ::

        -p^beta nll,    p = exp(-nll)

    Args:
        nll: `[*batch]`, of tokens; the published mean is over the tokens of all answers together.
            `inf` gives the limit: `-inf`, with a positive `beta` 0.
        beta: how soon the weight fades; 1 in WGA.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point.

    >>> gradient_ascent(jnp.array([0.5, 2.0]))
    Array([-0.5, -2. ], dtype=float32)
    >>> weighted = jax.jit(gradient_ascent)(jnp.array([0.0, 0.6931472, 200.0]), beta=1.0)
    >>> [f"{loss:.4f}" for loss in weighted.tolist()]
    ['-0.0000', '-0.3466', '-0.0000']

    References:
        Maini et al., TOFU, 2024 (arXiv 2401.06121), section 4. Wang et al., Rethinking LLM
        unlearning objectives, 2025 (arXiv 2502.19301); OpenUnlearning's `WGA`.
    """
    nll = as_losses(nll, "nll")
    gone = nll == jnp.inf
    finite = jnp.where(gone, 0.0, nll)
    weight = jax.lax.stop_gradient(jnp.exp(-beta * finite))
    return jnp.where(gone, jnp.where(beta > 0, 0.0, -jnp.inf), -weight * finite)


def satimp(
    nll: Float[Array, "*batch"], *, beta1: Number = 5.0, beta2: Number = 1.0
) -> Float[jax.Array, "*batch"]:
    """SatImp: gradient ascent on tokens that are likely but not certain.

    The weight is a constant for the gradient. It is largest at `p = beta1 / (beta1 + beta2)`; with
    `beta2` of 0 it is that of WGA.

    ::

        -p^beta1 (1 - p)^beta2 nll,    p = exp(-nll)

    Args:
        nll: `[*batch]`, of tokens. `inf` gives the limit, 0 with a positive `beta1`.
        beta1: how soon the weight fades as a token becomes unlikely.
        beta2: how much smaller the weight of a nearly certain token is.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point.

    >>> losses = jax.jit(satimp)(jnp.array([0.1, 0.6931472, 3.0]))
    >>> [f"{loss:.4g}" for loss in losses.tolist()]
    ['-0.005772', '-0.01083', '-8.72e-07']

    References:
        Yang et al., Exploring criteria of loss reweighting to enhance LLM unlearning, 2025 (arXiv
        2505.11953); OpenUnlearning's `SatImp`.
    """
    weighted = gradient_ascent(nll, beta=beta1)
    # 1 - exp(-nll) would be 0 of a token that is nearly certain.
    unsure = -jnp.expm1(-as_losses(nll, "nll"))
    return jax.lax.stop_gradient(unsure**beta2) * weighted


def npo(
    nll: Float[Array, "*batch"],
    reference_nll: Float[Array, "*batch"],
    *,
    beta: float | int = 0.1,
) -> Float[jax.Array, "*batch"]:
    """Negative preference optimisation: gradient ascent that fades as the answer is forgotten.

    Bounded from below, unlike gradient ascent, which it becomes as `beta` goes to 0. The
    reference gets no gradient.

    ::

        -(2 / beta) log sigmoid( beta (n - n_ref) )

    Args:
        nll: `[*batch]`, summed over each answer's tokens: `sequence_nll`.
        reference_nll: `[*batch]`, of the model before unlearning.
        beta: inverse temperature.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: different shapes, or `beta` is not positive.

    >>> print(f"{npo(jnp.array(30.0), jnp.array(10.0)):.4f}")
    2.5386

    References:
        Zhang et al., Negative preference optimization, 2024 (arXiv 2404.05868). OpenUnlearning's
        `NPO`: beta 0.1 in its configuration (1 in its class).
    """
    gap = _above_reference(nll, reference_nll, "nll", "reference_nll")
    return _preference(gap, beta)


def simnpo(
    nll: Float[Array, "*batch"],
    lengths: Int[Array, "*batch"],
    *,
    beta: float | int = 4.5,
    delta: Number = 0.0,
) -> Float[jax.Array, "*batch"]:
    """SimNPO: negative preference by likelihood per token, without a reference model.

    ::

        -(2 / beta) log sigmoid( beta (n / |y| - delta) )

    Args:
        nll: `[*batch]`, summed over each answer's tokens: `sequence_nll`.
        lengths: `[*batch]`, tokens of each answer; none counts as one.
        beta: inverse temperature.
        delta: likelihood loss per token at which an answer counts as forgotten.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: `nll` is not floating point or `lengths` not integers.
        ValueError: different shapes, or `beta` is not positive.

    >>> print(f"{simnpo(jnp.array(2.0), jnp.array(4), beta=2.5):.4f}")
    0.2015

    References:
        Fan et al., Simplicity prevails, 2024 (arXiv 2410.07163). OpenUnlearning's `SimNPO`: beta
        4.5, delta 0, and weights of 0.125 and 1 for it and the retain loss; the authors use beta
        2.5 and 0.1375 on forget05.
    """
    nll = as_losses(nll, "nll")
    lengths = jnp.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    checks.same_shape(nll, lengths, "nll", "lengths")
    return _preference(nll / jnp.maximum(lengths, 1) - delta, beta)


def dpo(
    chosen_nll: Float[Array, "*batch"],
    rejected_nll: Float[Array, "*batch"],
    reference_chosen_nll: Float[Array, "*batch"],
    reference_rejected_nll: Float[Array, "*batch"],
    *,
    beta: float | int = 0.1,
) -> Float[jax.Array, "*batch"]:
    """Direct preference optimisation; with "I don't know" as the chosen answer it is IdkDPO.

    The references get no gradient.

    ::

        -(2 / beta) log sigmoid( beta ( (n_l - n_l,ref) - (n_w - n_w,ref) ) )

    Args:
        chosen_nll: `[*batch]`, `n_w`: summed over the tokens of the answer to give instead.
        rejected_nll: `[*batch]`, `n_l`: of the answer to forget.
        reference_chosen_nll: `[*batch]`, of the model before unlearning.
        reference_rejected_nll: `[*batch]`, likewise.
        beta: inverse temperature.

    Returns:
        float32 `[*batch]`.

    Raises:
        TypeError: arrays are not floating point.
        ValueError: different shapes, or `beta` is not positive.

    >>> one = jnp.array(1.0)
    >>> print(f"{dpo(one, one, one, one):.4f}")
    13.8629

    References:
        Rafailov et al., Direct preference optimization, 2023 (arXiv 2305.18290); Maini et al.,
        TOFU, 2024 (arXiv 2401.06121). The factor `2 / beta` is OpenUnlearning's and that of NPO's
        code, which changes the step but not the minimum; others print `1 / beta` or none.
    """
    chosen = _above_reference(
        chosen_nll, reference_chosen_nll, "chosen_nll", "reference_chosen_nll"
    )
    rejected = _above_reference(
        rejected_nll, reference_rejected_nll, "rejected_nll", "reference_rejected_nll"
    )
    checks.same_shape(chosen, rejected, "chosen_nll", "rejected_nll")
    return _preference(rejected - chosen, beta)


def _above_reference(nll: Array, reference: Array, name: str, reference_name: str) -> jax.Array:
    nll, reference = as_losses(nll, name), as_losses(reference, reference_name)
    checks.same_shape(nll, reference, name, reference_name)
    return nll - jax.lax.stop_gradient(reference)


def _preference(gap: jax.Array, beta: float) -> jax.Array:
    checks.positive(beta, "beta")
    return 2.0 / beta * jax.nn.softplus(-beta * gap)
