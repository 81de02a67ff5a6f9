"""The vector-quantised head in training: exact loss from K cluster scores, never V logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, checks, logsumexp, neginf_to_zero
from logitjax.ops import mesh as on_mesh


def cluster_log_mass(
    bias: Float[Array, " vocab"], assignment: Int[Array, " vocab"], num_codes: int
) -> Float[jax.Array, " codes"]:
    """``log B_k = log sum_{v: m(v) = k} exp(b_v)``: all that a normaliser needs of tokens."""
    bias = _float32(bias)
    # A log-sum-exp by cluster, less its largest bias against overflow; the peak has no gradient.
    peak = lax.stop_gradient(jax.ops.segment_max(bias, assignment, num_segments=num_codes))
    peak = neginf_to_zero(peak)
    total = jax.ops.segment_sum(
        jnp.exp(bias - peak[assignment]), assignment, num_segments=num_codes
    )
    # Not `total > 0`: a nan must not be replaced.
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + peak)


def code_scores(
    hidden: Float[Array, "*batch hidden"], codebook: Float[Array, "codes hidden"]
) -> Float[jax.Array, "*batch codes"]:
    """Scores of the clusters: inputs in the dtype of ``hidden``, sums and result in float32."""
    hidden = jnp.asarray(hidden)
    codebook = jnp.asarray(codebook, hidden.dtype)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    if hidden.size == codebook.shape[1]:
        # One position: a matrix-vector product, nearly twice as fast on CPU.
        scores = jnp.matmul(codebook, hidden.reshape(-1), preferred_element_type=wide)
        return scores.reshape(*hidden.shape[:-1], -1)
    contract = (((hidden.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(hidden, codebook, contract, preferred_element_type=wide)


def token_bias(
    bias: Float[Array, " vocab"] | None,
    assignment: Int[Array, " vocab"],
    *,
    temperature: float | Array = 1.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
) -> Float[jax.Array, " vocab"]:
    """The bias that the other functions add: zero if there is none, ``-inf`` where excluded."""
    checks.positive(temperature, "temperature")
    bias = jnp.zeros(assignment.shape, jnp.float32) if bias is None else _float32(bias)
    bias = bias / temperature
    checks.where(vocab_where, bias.shape, "vocab_where")
    return bias if vocab_where is None else jnp.where(vocab_where, bias, -jnp.inf)


def vq_logits(
    hidden: Float[Array, "*batch hidden"],
    codebook: Float[Array, "codes hidden"],
    bias: Float[Array, " vocab"] | None,
    assignment: Int[Array, " vocab"],
    *,
    temperature: float | Array = 1.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
) -> Float[jax.Array, "*batch vocab"]:
    """All V logits ``[*batch, vocab]``, float32, for checks and for code that needs logits.

    It needs a full head's memory; `vq_nll` and `VQTables` give the same numbers without it. ::

        logit_v = (h . C_{m(v)} + b_v) / T

    Arguments and errors are those of `vq_nll`. Without a bias, as in the paper (VQ-Logits,
    arXiv:2505.10202), logits within a cluster are equal, and perplexity cannot fall below the
    geometric mean of the cluster sizes (`perplexity_floor`).

    >>> codebook, assignment = jnp.array([[1.0], [5.0]]), jnp.array([0, 1, 1, 0])
    >>> jax.jit(vq_logits)(jnp.ones((1, 1)), codebook, None, assignment)
    Array([[1., 5., 5., 1.]], dtype=float32)
    """
    check_head(hidden, codebook, bias, assignment)
    added = token_bias(bias, assignment, temperature=temperature, vocab_where=vocab_where)

    def run(hidden: Array, codebook: Array, added: Array, assignment: Array) -> tuple[jax.Array]:
        scores = code_scores(hidden, codebook) / temperature
        return (jnp.take(scores, assignment, axis=-1) + added,)

    return on_batch(run, (jnp.ndim(hidden),), hidden, codebook, added, assignment)[0]


def vq_nll(
    hidden: Float[Array, "*batch hidden"],
    codebook: Float[Array, "codes hidden"],
    bias: Float[Array, " vocab"] | None,
    assignment: Int[Array, " vocab"],
    labels: Int[Array, "*batch"],
    *,
    temperature: float | Array = 1.0,
    z_loss: float = 0.0,
    vocab_where: Bool[Array, " vocab"] | None = None,
) -> Float[jax.Array, "*batch"]:
    """Cross-entropy of a vector-quantised head, exact, in O(N K d) and N x K memory.

    Equal to the cross-entropy of `vq_logits`, in value and gradient, without forming them. The
    paper (VQ-Logits, arXiv:2505.10202) scatters to V logits; our normaliser is over clusters.
    Returns float32 ``[*batch]``, not reduced; nan if the label is outside the vocabulary. ::

        z_k = h . C_k
        log Z = logsumexp_k (z_k + log B_k),   log B_k = logsumexp_{v in k} b_v
        nll = log Z - z_{m(y)} - b_y + z_loss * (log Z)^2

    Args:
        hidden: ``[*batch, hidden]``. bfloat16 is multiplied as such and summed in float32.
        codebook: ``[codes, hidden]``.
        bias: ``[vocab]``, or None for the head as published (``B_k`` is then the cluster's size).
        assignment: ``[vocab]``, cluster of each entry, 0 to codes - 1.
        labels: ``[*batch]``, each in 0 to vocab - 1.
        temperature: divides the logits.
        vocab_where: ``[vocab]``, True for the entries that exist.

    Raises:
        TypeError: arrays of another kind.
        ValueError: shapes that do not fit, or (outside ``jit``) a cluster that does not exist.

    >>> import numpy as np
    >>> assignment, labels = np.array([0, 1, 1, 0]), np.array([0, 3])
    >>> print(jax.jit(vq_nll)(np.ones((2, 1)), np.zeros((2, 1)), None, assignment, labels))
    [1.3862944 1.3862944]
    """
    check_head(hidden, codebook, bias, assignment, labels)
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    added = token_bias(bias, assignment, temperature=temperature, vocab_where=vocab_where)

    def run(
        hidden: Array, labels: Array, codebook: Array, added: Array, assignment: Array
    ) -> tuple[jax.Array]:
        # A hidden state of nan has no loss; with a cotangent of zero its gradients, which sum over
        # positions, would be zero times nan.
        fine = jnp.isfinite(hidden).all(-1, keepdims=True)
        hidden = jnp.where(fine, hidden, 0)
        scores = code_scores(hidden, codebook) / temperature
        mass = cluster_log_mass(added, assignment, codebook.shape[0])
        # K terms replace V: sum_v exp(s_m(v) + b_v) = sum_k exp(s_k) sum_{v in k} exp(b_v).
        log_z = logsumexp(scores + mass)
        chosen = jnp.take_along_axis(scores, assignment[labels][..., None], axis=-1)[..., 0]
        # The label's score is its code's score plus its bias.
        nll = log_z - chosen - added[labels]
        nll = nll + z_loss * log_z**2 if z_loss else nll
        fine = fine[..., 0] & (labels >= 0) & (labels < len(added))
        return (jnp.where(fine, nll, jnp.nan),)

    return on_batch(run, (labels.ndim,), hidden, labels, codebook, added, assignment)[0]


def on_batch(fn: Callable[..., Any], out_ndims: tuple[int, ...], *args: Any) -> Any:
    """`logitjax.ops.over_batch` for pytrees; the first argument has the batch axes."""
    leaves, structure = jax.tree.flatten(args)

    def run(*leaves: jax.Array) -> Any:
        return fn(*jax.tree.unflatten(structure, leaves))

    return on_mesh.over_batch(run, out_ndims, *map(jnp.asarray, leaves))


def check_head(hidden: Any, codebook: Any, bias: Any, assignment: Any, labels: Any = None) -> None:
    """Refuse a head whose parts do not fit, and tokens in a cluster that does not exist."""
    checks.shapes(
        hidden=(hidden, "float *batch hidden"),
        codebook=(codebook, "float codes hidden"),
        assignment=(assignment, "int vocab"),
        bias=(bias, "float vocab"),
        labels=(labels, "int *batch"),
    )
    checks.ids(assignment, codebook.shape[0], "assignment")


def _float32(values: Array) -> jax.Array:
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
