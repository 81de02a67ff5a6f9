"""Training few-shot heads on cached features: one scan in one jit, mapped over runs and grids."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from logitjax.few_shot._method import FewShotConfig, FewShotInputs, FewShotState


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotTraining:
    """AdamW on mini-batches; the defaults are those of AMU's released code.

    Numbers other than the counts may be traced, and so be part of a grid.

    Attributes:
      epochs: passes over the labelled images.
      steps: of the whole run, instead of ``epochs``.
      batch_size: the last batch of an epoch is short where it does not divide the images.
      learning_rate: at the first step; a cosine brings it to 0, step by step.
      warmup: steps from 0 to ``learning_rate``, before the cosine.
      weight_decay: decoupled.
      eps: of AdamW, outside the root.
      b1: decay of the first moment.
      b2: decay of the second.
    """

    epochs: int = 50
    steps: int | None = None
    batch_size: int = 8
    learning_rate: Any = 1e-3
    warmup: int = 0
    weight_decay: Any = 0.01
    eps: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", *(["steps"] if self.steps is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @classmethod
    def published(cls, method: str) -> "FewShotTraining":
        """The released code's settings: ``amu``, ``tip_adapter_f``, ``cafo`` or ``cross_modal``.

        Raises:
          ValueError: another name.
        """
        known: dict[str, dict[str, Any]] = {
            "amu": {},
            "tip_adapter_f": dict(epochs=20, batch_size=256),
            "cafo": dict(epochs=20, batch_size=256),
            # Weight decay 0, .01 and .0001 and rates 1e-3 and 1e-4 are searched there.
            "cross_modal": dict(steps=12_800, warmup=50, eps=1e-8),
        }
        if method not in known:
            raise ValueError(f"method must be one of {', '.join(known)}, got {method!r}")
        return cls(**known[method])

    def batches(self, num_examples: int) -> int:
        """Batches of an epoch."""
        return -(-num_examples // min(self.batch_size, num_examples))

    def total_steps(self, num_examples: int) -> int:
        """Steps of a run."""
        return self.steps or self.epochs * self.batches(num_examples)

    def optimizer(self, total_steps: Any) -> optax.GradientTransformation:
        """AdamW with its schedule; the number of steps may be traced."""

        def rate(step: Any) -> Any:
            rest = jnp.maximum(1, total_steps - self.warmup)
            share = jnp.clip((step - self.warmup) / rest, 0.0, 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(math.pi * share))
            return self.learning_rate * jnp.where(
                step < self.warmup, step / max(1, self.warmup), cosine
            )

        return optax.adamw(
            rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
        )


def few_shot_order(
    seed: int | Sequence[int],
    num_examples: int,
    training: FewShotTraining,
    *,
    views: int = 1,
    stride: int | None = None,
) -> np.ndarray:
    """Rows of every batch: a new permutation and the next view in each epoch.

    Args:
      seed: of the permutations.
      num_examples: labelled images.
      training: batch size and length.
      views: augmented views; the rows of view ``v`` start at ``v * stride``.
      stride: ``num_examples`` when omitted.

    Returns:
      int32 ``[steps, batch]``; -1 fills up short batches.

    >>> order = few_shot_order(0, 5, FewShotTraining(epochs=1, batch_size=2))
    >>> order.shape, sorted(order.ravel().tolist())
    ((3, 2), [-1, 0, 1, 2, 3, 4])
    """
    batch, batches = min(training.batch_size, num_examples), training.batches(num_examples)
    steps = training.total_steps(num_examples)
    epochs = -(-steps // batches)
    order = np.full((epochs, batches * batch), -1, np.int32)
    for epoch in range(epochs):
        rows = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(num_examples)
        order[epoch, :num_examples] = rows + (epoch % views) * (stride or num_examples)
    return order.reshape(epochs * batches, batch)[:steps]


def fit_few_shot(
    config: FewShotConfig,
    state: FewShotState,
    support: FewShotInputs,
    labels: Any,
    order: Any,
    *,
    training: FewShotTraining,
    steps: Any = None,
) -> tuple[FewShotState, jax.Array]:
    """Trains a few-shot head: a pure function to ``jit`` and ``vmap``.

    Everything but the trained arrays is constant, so a step gathers cached rows and nothing else.

    Args:
      config: the method.
      state: where it starts, see :meth:`FewShotConfig.init`.
      support: ``[views * n, ...]`` labelled images.
      labels: ``[n]``.
      order: ``[steps, batch]`` rows of ``support``, see :func:`few_shot_order`; -1 is none.
      training: the optimizer's settings.
      steps: how many of the order's, all when omitted. It may be traced, so that one program serves
        any number of images; the rest of the order is not looked at.

    Returns:
      the trained state and the loss of every step, ``[steps]`` (0 where it has not come to it).

    >>> from logitjax.few_shot import TaskResConfig
    >>> x, y = jnp.eye(4), jnp.arange(4) % 3
    >>> support = FewShotInputs(zero_shot=jnp.zeros((4, 3)), features=x)
    >>> config, training = TaskResConfig(), FewShotTraining(epochs=9, batch_size=4)
    >>> order = few_shot_order(0, 4, training)
    >>> state, losses = fit_few_shot(
    ...     config, config.init(support, y), support, y, order, training=training)
    >>> bool(losses[-1] < losses[0])
    True
    """
    support, labels, order = jax.tree.map(jnp.asarray, (config.prepare(support), labels, order))
    count = len(labels)
    # Nothing is missing from a whole number of batches; elsewhere rows may be.
    full = steps is None and count % order.shape[1] == 0
    total = len(order) if steps is None else steps
    tx = training.optimizer(total)

    def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        trained, opt_state = carry

        def mean_loss(trained: Any) -> jax.Array:
            values = config.loss(
                FewShotState(trained, state.fixed), support[rows], labels[rows % count]
            )
            if full:
                return values.mean()
            real = rows >= 0
            return jnp.where(real, values, 0.0).sum() / real.sum()

        loss, gradient = jax.value_and_grad(mean_loss)(trained)
        updates, opt_state = tx.update(gradient, opt_state, trained)
        return (optax.apply_updates(trained, updates), opt_state), loss

    start = (state.trained, tx.init(state.trained))
    if steps is None:
        (trained, _), losses = jax.lax.scan(step, start, order)
    else:

        def body(index: Any, carry: Any) -> Any:
            inner, losses = carry
            inner, loss = step(inner, order[index])
            return inner, losses.at[index].set(loss)

        kind = jnp.result_type(*jax.tree.leaves(state.trained))
        carry = (start, jnp.zeros(len(order), kind))
        (trained, _), losses = jax.lax.fori_loop(0, total, body, carry)
    return FewShotState(trained, state.fixed), losses
