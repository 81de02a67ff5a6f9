"""Training few-shot heads on cached features: one scan in one jit, mapped over runs and grids."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Int

from logitjax.few_shot._method import FewShotTask, Method, State
from logitjax.ops import Array, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """AdamW or SGD on mini-batches; the defaults are those of AMU's released code.

    Numbers except counts may be traced, and so be part of a grid.

    Attributes:
        epochs: Number of passes over the labelled images.
        steps: Number of steps of the whole run, instead of `epochs`.
        batch_size: Images per step; the last batch of an epoch is short if they do not divide.
        learning_rate: Learning rate of the first step; a cosine lowers it to 0 step by step.
        floor: Final rate of the cosine.
        first_epoch_rate: Rate of the whole first epoch, after which the cosine falls per epoch
            instead of per step, as in CLAP's code; None for a cosine per step from the start.
        weight_decay: Weight decay, decoupled in AdamW.
        algorithm: `'adamw'`, or `'sgd'` with momentum b1, which ignores `eps` and b2.
        eps: Term that AdamW adds to the root of the second moment.
    """

    epochs: int = 50
    steps: int | None = None
    batch_size: int = 8
    learning_rate: Any = 1e-3
    floor: float = 0.0
    first_epoch_rate: float | None = None
    weight_decay: Any = 0.01
    algorithm: Literal["adamw", "sgd"] = "adamw"
    eps: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", *(["steps"] if self.steps is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    @classmethod
    def published(cls, method: str, *, shots: int = 1) -> "Recipe":
        """Return the settings of a method's released code.

        They are `tip_adapter_f`, `clap` (also for ZS-LP), `pro_lip`, and, for `tune_towers` and its
        second stage, `clip_lora`, `two_stage_norms` and `two_stage` (for :class:`methods.CLAP`
        without a penalty), whose steps grow with the `shots`. Other names are a ValueError.
        """
        sgd = dict(algorithm="sgd", learning_rate=0.1, first_epoch_rate=1e-5)
        tower = dict(batch_size=32, learning_rate=2e-4, floor=1e-6, eps=1e-8)
        entries: dict[str, dict[str, Any]] = {
            "tip_adapter_f": dict(epochs=20, batch_size=256),
            "clap": dict(epochs=300, batch_size=256, weight_decay=0.0, **sgd),
            "clip_lora": dict(steps=500 * shots, **tower),
            # The stages take .6 and .4 of 300 steps per shot.
            "two_stage_norms": dict(steps=180 * shots, **tower),
            "two_stage": dict(steps=120 * shots, **tower),
            # All images in every step, one view after another; any rate of 1e-5 to 1e-2.
            "pro_lip": dict(epochs=300, batch_size=1 << 30, weight_decay=0.0),
        }
        if method not in entries:
            raise ValueError(f"method: expected one of {', '.join(entries)}, got {method!r}")
        return cls(**entries[method])

    def batches(self, num_examples: int) -> int:
        """Batches per epoch; ValueError if there is no image."""
        if num_examples < 1:
            raise ValueError(f"num_examples: expected at least one image, got {num_examples}")
        return -(-num_examples // min(self.batch_size, num_examples))

    def total_steps(self, num_examples: int) -> int:
        """Number of steps of a run."""
        return self.steps or self.epochs * self.batches(num_examples)

    def optimizer(self, total_steps: Any) -> optax.GradientTransformation:
        """The algorithm with its schedule, a formula because `total_steps` may be traced."""
        # `training.Schedule` takes an `int`; this way one program serves every number of images.

        def rate(step: Any) -> Any:
            share = jnp.minimum(step / total_steps, 1.0)
            if self.first_epoch_rate is not None:
                epoch = step * self.epochs // total_steps
                share = jnp.maximum(epoch - 1, 0) / self.epochs
            cosine = 0.5 * (1.0 + jnp.cos(math.pi * share))
            falling = self.floor + (self.learning_rate - self.floor) * cosine
            if self.first_epoch_rate is not None:
                return jnp.where(epoch > 0, falling, self.first_epoch_rate)
            return falling

        if self.algorithm == "sgd":
            # As in torch, decay is part of the gradient and passes through the momentum.
            decay = optax.add_decayed_weights(self.weight_decay)
            return optax.chain(decay, optax.sgd(rate, momentum=self.b1))

        def init(trained: Any) -> Any:
            zeros = jax.tree.map(jnp.zeros_like, trained)
            return jnp.zeros((), jnp.int32), zeros, zeros

        def update(gradient: Any, state: Any, trained: Any = None) -> tuple[Any, Any]:
            step, first, second = state
            now, count = rate(step), step + 1
            # optax divides both moments by their corrections: three divisions per weight, not one.
            size = now / (1 - self.b1**count)
            root = jax.lax.rsqrt(1 - jnp.asarray(self.b2, jnp.result_type(float)) ** count)
            first = jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, first, gradient)
            second = jax.tree.map(
                lambda v, g: self.b2 * v + (1 - self.b2) * g * g, second, gradient
            )
            updates = jax.tree.map(
                lambda m, v, w: (
                    -size * m / (jnp.sqrt(v) * root + self.eps) - now * self.weight_decay * w
                ),
                *(first, second, trained),
            )
            return updates, (count, first, second)

        functions: Any = (init, update)
        return optax.GradientTransformation(*functions)

    def order(
        self,
        seed: int | Sequence[int],
        num_examples: int,
        *,
        views: int = 1,
        stride: int | None = None,
    ) -> np.ndarray:
        """Rows of every batch: a new permutation and the next view in each epoch.

        The result is int32 `[steps, batch]`; -1 pads short batches. Without images, ValueError.

        Args:
            views: Augmented views; the rows of view `v` start at `v * stride`.
            stride: By default `num_examples`.

        >>> order = Recipe(epochs=1, batch_size=2).order(0, 5)
        >>> order.shape, sorted(order.ravel().tolist())
        ((3, 2), [-1, 0, 1, 2, 3, 4])
        """
        batches, batch = self.batches(num_examples), min(self.batch_size, num_examples)
        steps = self.total_steps(num_examples)
        epochs = -(-steps // batches)
        # -1 means no image.
        order = np.full((epochs, batches * batch), -1, np.int32)
        for epoch in range(epochs):
            rows = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(num_examples)
            # The next view in each epoch.
            order[epoch, :num_examples] = rows + (epoch % views) * (stride or num_examples)
        return order.reshape(epochs * batches, batch)[:steps]

    def train(
        self,
        method: Method,
        task: FewShotTask,
        state: State,
        order: Int[Array, "steps batch"],
        *,
        steps: Any = None,
    ) -> tuple[State, jax.Array]:
        """Train a few-shot head: a pure function to `jit` and `vmap`.

        Everything except the trained arrays is constant, so a step only gathers cached rows. The
        steps are one scan, which is mapped over samples and settings. (`training.TrainStep` cannot
        do this: the host calls its update once for each batch.) Returns the trained state and the
        loss of every step, `[steps]` (0 for skipped ones).

        Args:
            state: The initial state, see `Method.init`.
            order: `[steps, batch]` rows of `task.support`, see `order`; -1 means none.
            steps: Number of steps of the order to take; by default all. It may be traced, so that
                one program serves any number of images. The rest of the order is ignored.

        Raises:
            TypeError: Labels or an order that are not integers.
            ValueError: Labels that do not fit the images or the classes, no labelled image, or
                (outside `jit`) rows of the order that are not labelled images.

        >>> from logitjax import few_shot
        >>> images = few_shot.Inputs(zero_shot=np.zeros((4, 3)), features=np.eye(4))
        >>> task = FewShotTask(support=images, labels=np.arange(4) % 3)
        >>> method, recipe = few_shot.methods.TaskRes(), Recipe(epochs=9, batch_size=4)
        >>> _, losses = recipe.train(method, task, method.init(task), recipe.order(0, 4))
        >>> bool(losses[-1] < losses[0])
        True
        """
        task.check()
        _check_order(order, task)
        arrays = (task.support, task.labels, order)
        support, labels, rows_of_step = jax.tree.map(jnp.asarray, arrays)
        count = len(labels)
        # A whole number of batches has no padding; otherwise rows may be missing.
        full = steps is None and count % rows_of_step.shape[1] == 0
        total = len(rows_of_step) if steps is None else steps
        tx = self.optimizer(total)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            trained, opt_state = carry

            def mean_loss(trained: Any) -> jax.Array:
                # Row v * count + i is view v of image i: every view has the labels.
                values = method.loss(
                    State(trained, state.fixed), support[rows], labels[rows % count]
                )
                if full:
                    return values.mean()
                real = rows >= 0
                return jnp.where(real, values, 0.0).sum() / jnp.maximum(real.sum(), 1)

            loss, gradient = jax.value_and_grad(mean_loss)(trained)
            updates, opt_state = tx.update(gradient, opt_state, trained)
            return (optax.apply_updates(trained, updates), opt_state), loss

        start = (state.trained, tx.init(state.trained))
        if steps is None:
            (trained, _), losses = jax.lax.scan(step, start, rows_of_step)
        else:  # the length of a scan cannot be traced

            def body(index: Any, carry: Any) -> Any:
                inner, losses = carry
                inner, loss = step(inner, rows_of_step[index])
                return inner, losses.at[index].set(loss)

            kind = jnp.result_type(*jax.tree.leaves(state.trained))
            carry = (start, jnp.zeros(len(rows_of_step), kind))
            (trained, _), losses = jax.lax.fori_loop(0, total, body, carry)
        return State(trained, state.fixed), losses


def _check_order(order: Any, task: FewShotTask) -> None:
    """Refuse rows that do not exist, if both can be read."""
    order = order if hasattr(order, "dtype") else np.asarray(order)
    if order.ndim != 2 or not order.size:
        raise ValueError(f"order: expected [steps, batch], got shape {order.shape}")
    checks.ids(order, len(task.support), "order", least=-1)
    if isinstance(order, Tracer) or isinstance(task.labels, Tracer):
        return
    order, labels = np.asarray(order), np.asarray(task.labels)
    absent = (order >= 0) & (labels[order % len(labels)] < 0)
    if absent.any():
        step, location = (int(axis[0]) for axis in np.nonzero(absent))
        row = order[step, location]
        raise ValueError(f"order: expected rows with a label, got {row} at {(step, location)}")
