"""Tuning heads on cached hidden states: one loop for every kind, so that budgets are equal."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from logitjax.ops import Array, logsumexp
from logitjax.training import local_rows, make_global_batch
from logitjax.vq._assignment import reassign
from logitjax.vq._loss import cluster_log_mass, code_scores, vq_nll
from logitjax.vq._targets import HeadTargets

HeadLoss = Callable[..., jax.Array]


def tune_head(
    loss_fn: HeadLoss,
    params: Any,
    arrays: Sequence[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    constants: Any = None,
    warmup: float = 0.1,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    opt_state: Any = None,
    mesh: Mesh | None = None,
) -> tuple[Any, Any, list[float]]:
    """Adam with a cosine schedule on mini-batches of cached positions.

    A part of the run (``start_step`` to ``stop_step``) does what the whole run does there, so a
    caller may change the parameters in between, as reassignment does.

    Args:
      loss_fn: ``(params, constants, *batch) -> loss of each position``.
      params: pytree of trained arrays.
      arrays: ``[count, ...]`` each, sampled together: hidden states, labels, ...
      steps: of the whole run.
      batch_size: positions a step.
      learning_rate: peak.
      constants: pytree that is not trained: assignments, tables.
      warmup: share of the steps.
      seed: of the order of positions.
      start_step: where to begin.
      stop_step: where to end; ``steps`` when omitted.
      opt_state: of the part before.
      mesh: its data and fsdp axes share the positions of a step; parameters and constants are on
        every device. Every process has all ``arrays`` and gets all results.

    Returns:
      ``(params, opt_state, losses)``.

    Raises:
      ValueError: the mesh does not divide the positions of a step.

    >>> loss = lambda params, _, x: (params - x) ** 2
    >>> params, _, losses = tune_head(loss, jnp.zeros(()), [np.ones(8, np.float32)], steps=60,
    ...                               batch_size=4, learning_rate=0.1)
    >>> bool(abs(params - 1) < 0.1)
    True
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, int(warmup * steps)), max(2, steps)
    )
    # The larger epsilon keeps codes and tokens that hardly occur from drifting with the noise.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99, eps=1e-6))
    opt_state = tx.init(params) if opt_state is None else opt_state

    @jax.jit(donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, constants: Any, batch: Any) -> Any:
        def mean_loss(params: Any) -> jax.Array:
            return loss_fn(params, constants, *batch).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    count = len(arrays[0])
    batch_size = min(batch_size, count)
    per_epoch = count // batch_size
    share = slice(None)
    params = jax.tree.map(jnp.array, params)
    if mesh is not None:
        share = local_rows(mesh, batch_size)
        everywhere = NamedSharding(mesh, PartitionSpec())
        params, opt_state, constants = jax.device_put((params, opt_state, constants), everywhere)
    losses = []
    for index in range(start_step, steps if stop_step is None else stop_step):
        epoch, place = divmod(index, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        chosen = np.sort(order[place * batch_size : (place + 1) * batch_size])[share]
        batch = [np.asarray(array[chosen]) for array in arrays]
        batch = batch if mesh is None else make_global_batch(mesh, batch)
        params, opt_state, loss = step(params, opt_state, constants, batch)
        losses.append(loss)
    if mesh is not None:
        # Other code knows no mesh, and nothing of several processes.
        params, opt_state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, opt_state))
    return params, opt_state, [float(loss) for loss in losses]


def vq_distillation_loss(
    params: dict[str, Array],
    constants: dict[str, Array],
    hidden: Array,
    top_probs: Array,
    top_tokens: Array,
) -> jax.Array:
    """Cross-entropy of a VQ head against the old head's whole distribution, from `HeadTargets`.

    ::

        log Z_q(h_n) - sum_{v in top(n)} p_n(v) (z_{n,m(v)} + b_v)
                     - 1/N (sum_k C_k . R_k + sum_v r_v b_v)

    ``R`` and ``r`` hold what lies outside the top tokens, summed over all N positions. Its mean
    over positions is exact, and less the teacher's entropy it is the KL divergence.

    Args:
      params: ``codebook [codes, hidden]``, and ``bias [vocab]`` unless it is fixed at zero.
      constants: ``assignment [vocab]``, ``rest [codes, hidden]`` and ``rest_counts [vocab]``, both
        over N.
      hidden: ``[n, hidden]``.
      top_probs: ``[n, k]``.
      top_tokens: ``[n, k]``.

    Returns:
      ``[n]``.
    """
    codebook, assignment = params["codebook"], constants["assignment"]
    bias = params.get("bias")
    bias = jnp.zeros(assignment.shape) if bias is None else bias
    scores = code_scores(hidden, codebook)
    log_z = logsumexp(scores + cluster_log_mass(bias, assignment, codebook.shape[0]))
    logits = jnp.take_along_axis(scores, assignment[top_tokens], axis=-1) + bias[top_tokens]
    rest = (codebook * constants["rest"]).sum() + (bias * constants["rest_counts"]).sum()
    return log_z - (top_probs * logits).sum(-1) - rest


def vq_label_loss(
    params: dict[str, Array], constants: dict[str, Array], hidden: Array, labels: Array
) -> jax.Array:
    """Cross-entropy of a VQ head on the labels."""
    return vq_nll(hidden, params["codebook"], params.get("bias"), constants["assignment"], labels)


def tune_vq_head(
    codebook: Array,
    bias: Array | None,
    assignment: Array,
    hidden: np.ndarray,
    targets: HeadTargets,
    *,
    steps: int,
    batch_size: int = 2048,
    learning_rate: float = 2e-3,
    reassign_every: int | None = None,
    min_count: float = 1.0,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Array, Array | None, Array, dict[str, list[float]]]:
    """Tunes codebook and biases to the old head, and every so many steps the mapping as well.

    The expected divergence, over all positions and the whole vocabulary, is minimised at the cost
    of K scores a position. With ``reassign_every``, tokens move to the code under which they are
    most likely (`logitjax.vq.reassign`); the last moves come well before the end.

    Args:
      codebook: ``[codes, hidden]``.
      bias: ``[vocab]``; None tunes the head as published, without one.
      assignment: ``[vocab]``.
      hidden: ``[count, hidden]``, cached.
      targets: of `head_targets`, for the same positions.
      steps: of Adam.
      batch_size: positions a step.
      learning_rate: peak.
      reassign_every: steps between reassignments; None keeps the mapping. Needs biases.
      min_count: expected targets below which a token stays where it is.
      seed: of the order of positions.
      mesh: as of `tune_head`.

    Returns:
      ``(codebook, bias, assignment, history)``; history holds ``loss`` and ``moved``.

    Raises:
      ValueError: ``reassign_every`` without biases.
    """
    if reassign_every is not None and bias is None:
        raise ValueError("reassign_every needs biases, got bias=None")
    params = {"codebook": jnp.asarray(codebook)}
    if bias is not None:
        params["bias"] = jnp.asarray(bias)
    assignment = jnp.asarray(assignment)
    count, codes = len(hidden), params["codebook"].shape[0]
    history: dict[str, list[float]] = {"loss": [], "moved": []}
    opt_state = None
    stops = list(range(reassign_every, steps, reassign_every)) if reassign_every else []
    for start, stop in zip([0, *stops], [*stops, steps]):
        constants = {
            "assignment": assignment,
            "rest": jax.ops.segment_sum(
                jnp.asarray(targets.rest_sums) / count, assignment, num_segments=codes
            ),
            "rest_counts": jnp.asarray(targets.rest_counts) / count,
        }
        params, opt_state, losses = tune_head(
            vq_distillation_loss,
            params,
            [hidden, targets.top_probs, targets.top_tokens],
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            constants=constants,
            seed=seed,
            start_step=start,
            stop_step=stop,
            opt_state=opt_state,
            mesh=mesh,
        )
        history["loss"] += losses
        if stop < steps:
            assignment, params["bias"], moved = reassign(
                params["codebook"],
                params["bias"],
                assignment,
                targets.sums,
                targets.counts,
                hidden,
                min_count=min_count,
            )
            history["moved"].append(float(moved))
    return params["codebook"], params.get("bias"), assignment, history


def reassign_from_labels(
    codebook: Float[Array, "codes hidden"],
    bias: Float[Array, " vocab"],
    assignment: Int[Array, " vocab"],
    hidden: Float[Array, "count hidden"],
    labels: Int[Array, " count"],
    *,
    min_count: float = 30.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`logitjax.vq.reassign` from the labels of a training run, between two of its steps.

    The periodic reassignment of training from scratch: gather hidden states and labels of a few
    hundred recent batches, call this, go on with the new mapping and biases.

    Args:
      codebook: ``[codes, hidden]``.
      bias: ``[vocab]``.
      assignment: ``[vocab]``.
      hidden: ``[count, hidden]``, hidden states.
      labels: ``[count]``, the tokens that followed.
      min_count: tokens seen less often stay: few labels overfit.

    Returns:
      ``(assignment, bias, moved)``.

    >>> codebook, hidden = jnp.array([[1.0], [-1.0]]), jnp.array([[2.0], [-2.0]])
    >>> new, bias, moved = reassign_from_labels(codebook, jnp.zeros(2), jnp.array([1, 0]), hidden,
    ...                                         jnp.array([0, 1]), min_count=1)
    >>> print(new, moved)
    [0 1] 2
    """
    hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
    vocab = len(assignment)
    sums = jax.ops.segment_sum(hidden, labels, num_segments=vocab)
    counts = jnp.bincount(labels, length=vocab).astype(jnp.float32)
    return reassign(codebook, bias, assignment, sums, counts, hidden, min_count=min_count)
