"""Tuning heads on cached hidden states: one loop for every kind, so that budgets are equal."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax import training
from logitjax.losses import Head, linear_cross_entropy
from logitjax.ops import Array, logsumexp
from logitjax.ops.sharding import ShardingRules
from logitjax.vq._loss import cluster_log_mass, code_scores
from logitjax.vq._targets import HeadTargets

HeadLoss = Callable[..., jax.Array]

#: A head is small, so every device holds a full copy.
_REPLICATED = ShardingRules()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tuned(training.TrainState):
    losses: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tunes a head by Adam with a cosine schedule, on mini-batches of cached positions.

    Attributes:
        learning_rate: Peak.
        warmup: Share of the steps.
        workdir: Folder of ten checkpoints, from which the same call continues; None for none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    seed: int = 0
    workdir: epath.Path | None = None

    def update(
        self, mesh: Mesh, loss_fn: HeadLoss | None = None
    ) -> tuple[optax.GradientTransformation, training.TrainStep]:
        """The optimizer, and the compiled step for `run`.

        `loss_fn` is by default that of `ConvertConfig`, otherwise as for `run`. Batches of the step
        are tuples of arrays, its arguments after `constants`.
        """
        of_position = vq_distillation_loss if loss_fn is None else loss_fn
        # The larger epsilon keeps rare codes and tokens from drifting with the noise.
        schedule = training.Schedule(
            self.learning_rate,
            warmup=max(1, int(self.warmup * self.steps)),
            total_steps=max(2, self.steps),
            final=0.0,
        )
        tx = schedule.optimizer(b2=0.99, eps=1e-6)

        def sums(params: Any, batch: Any, rng: Any, constants: Any = None) -> Any:
            losses = of_position(params, constants, *batch)
            return losses.sum(), losses.size, {}

        return tx, training.TrainStep(sums, tx, mesh=mesh)

    def run(
        self,
        loss_fn: HeadLoss,
        params: Any,
        arrays: Sequence[np.ndarray],
        *,
        constants: Any = None,
        mesh: Mesh | None = None,
    ) -> tuple[Any, list[float]]:
        """Tunes any head on cached positions: parameters, and the loss by step.

        Args:
            loss_fn: `(params, constants, *batch) -> loss of each position`.
            params: Pytree of trained arrays.
            arrays: `[count, ...]` each, sampled together: hidden states, labels, ...
            constants: Pytree that is not trained: assignments, tables.
            mesh: Its data and fsdp axes share the positions of a step (ValueError if they do not
                divide them); parameters and constants are on every device. Every process has all
                `arrays` and gets all results.

        >>> loss = lambda params, _, x: (params - x) ** 2
        >>> tuning = Tuning(steps=60, batch_size=4, learning_rate=0.1)
        >>> params, losses = tuning.run(loss, jnp.zeros(()), [np.ones(8, np.float32)])
        >>> bool(abs(params - 1) < 0.1)
        True
        """
        if mesh is None:
            mesh = training.make_mesh("data:1", devices=jax.local_devices()[:1])
        tx, step = self.update(mesh, loss_fn)
        everywhere = NamedSharding(mesh, PartitionSpec())
        constants, count = jax.device_put(constants, everywhere), len(arrays[0])
        # Of all processes.
        batch_size = min(self.batch_size, count)
        share, per_epoch = training.BatchLayout(mesh).rows(batch_size), count // batch_size

        def start() -> Any:
            state = training.TrainState.create(params, tx, mesh=mesh, rules=_REPLICATED)
            losses = jax.device_put(np.zeros(self.steps, np.float32), everywhere)
            return _Tuned(**vars(state), losses=losses)

        def batches(index: int) -> Any:
            epoch, location = divmod(index, per_epoch)
            order = np.random.default_rng([self.seed, epoch]).permutation(count)
            # Sorted, because memory-mapped rows are read in order.
            chosen = np.sort(order[location * batch_size : (location + 1) * batch_size])[share]
            return index, tuple(np.asarray(array[chosen]) for array in arrays)

        def update(tuned: Any, numbered: Any) -> Any:
            index, batch = numbered
            state = training.TrainState(tuned.step, tuned.params, tuned.opt_state, tuned.rng)
            state, output = step(state, batch, constants)
            losses = tuned.losses.at[index].set(jnp.divide(*output.metrics["loss"]))
            return _Tuned(**vars(state), losses=losses), output

        tenth = max(1, self.steps // 10)
        folder, saver = self.workdir, contextlib.nullcontext()
        if folder is not None:
            saver = training.Checkpointer(folder / "checkpoints")
        with saver as checkpointer:
            tuned: Any = training.train_loop(
                start,
                update,
                batches,
                total_steps=self.steps,
                workdir=folder,
                checkpointer=checkpointer,
                writer=None if folder is None else training.make_writer(folder),
                options=training.LoopOptions(checkpoint_every=tenth, log_every=tenth),
            )
        # Other code has no mesh, and nothing of several processes.
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tuned.params)
        return params, np.asarray(tuned.losses).tolist()

    def imitate(
        self,
        head_of: Callable[[Any, Any], Head],
        params: Any,
        hidden: np.ndarray,
        targets: HeadTargets,
        mesh: Mesh | None = None,
        *,
        constants: Any = None,
    ) -> tuple[Any, list[float]]:
        """Tune a head that amounts to rows against an old head, at O(V d) per position.

        The returned losses are KL divergences from the old head's whole distribution.

        Args:
            head_of: `(params, constants)` to a `Head` with biases.
            hidden, targets: Positions, and the old head's outputs there.
            params, constants, mesh: As for `run`.
        """
        # Fewer of the top tokens, because their rows are gathered, unlike in VQ heads.
        targets = targets.with_top(16, hidden)
        rest = (targets.rest_sums / len(hidden), targets.rest_counts / len(hidden))

        def loss(params: Any, fixed: Any, hidden: Any, probs: Any, tokens: Any) -> jax.Array:
            constants, (rest_sums, rest_counts) = fixed
            head = head_of(params, constants)
            bias = head.bias
            nll = linear_cross_entropy(hidden, head, tokens[:, 0])
            logits = jnp.einsum("nd,nkd->nk", hidden, head.rows[tokens]) + bias[tokens]
            # Expected logits of all other tokens are linear in rows and biases: two sums suffice.
            far = (head.rows * rest_sums).sum() + (bias * rest_counts).sum()
            return nll + logits[:, 0] - (probs * logits).sum(-1) - far

        batch, constants = [hidden, targets.top_probs, targets.top_tokens], (constants, rest)
        params, losses = self.run(loss, params, batch, constants=constants, mesh=mesh)
        return params, [value - targets.entropy for value in losses]


def vq_distillation_loss(
    params: dict[str, Array],
    constants: dict[str, Array],
    hidden: Array,
    top_probs: Array,
    top_tokens: Array,
) -> jax.Array:
    """Cross-entropy of a VQ head against the old head's whole distribution, from `HeadTargets`.

    ``R`` and ``r`` sum the part outside the top tokens over all N positions: the mean is exact. ::

        log Z_q(h_n) - sum_{v in top(n)} p_n(v) (z_{n,m(v)} + b_v)
                     - 1/N (sum_k C_k . R_k + sum_v r_v b_v)
    """
    codebook, assignment = params["codebook"], constants["assignment"]
    bias = params.get("bias")
    bias = jnp.zeros(assignment.shape) if bias is None else bias
    scores = code_scores(hidden, codebook)
    log_z = logsumexp(scores + cluster_log_mass(bias, assignment, codebook.shape[0]))
    logits = jnp.take_along_axis(scores, assignment[top_tokens], axis=-1) + bias[top_tokens]
    rest = (codebook * constants["rest"]).sum() + (bias * constants["rest_counts"]).sum()
    return log_z - (top_probs * logits).sum(-1) - rest


def tune_vq_head(
    codebook: Array,
    bias: Array | None,
    assignment: Array,
    hidden: np.ndarray,
    targets: HeadTargets,
    tuning: Tuning,
    *,
    mesh: Mesh | None = None,
) -> tuple[Any, Any, list[float]]:
    """Tune codebook and biases to the old head; losses are KL divergences by step."""
    params = {"codebook": jnp.asarray(codebook)}
    if bias is not None:
        params["bias"] = jnp.asarray(bias)
    rest = jnp.asarray(targets.rest_sums) / len(hidden)
    constants = {
        "assignment": jnp.asarray(assignment),
        "rest": jax.ops.segment_sum(rest, assignment, num_segments=len(codebook)),
        "rest_counts": jnp.asarray(targets.rest_counts) / len(hidden),
    }
    batch = [hidden, targets.top_probs, targets.top_tokens]
    params, losses = tuning.run(vq_distillation_loss, params, batch, constants=constants, mesh=mesh)
    # From cross-entropy to divergence.
    losses = [loss - targets.entropy for loss in losses]
    return params["codebook"], params.get("bias"), losses
