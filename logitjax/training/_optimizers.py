"""Optimizers and schedules by name, from optax."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from logitjax.ops import path_mask

Schedule = Literal["constant", "linear", "cosine", "wsd", "rsqrt"]
Optimizer = Literal["adamw", "lion", "adafactor", "sgd"]


def make_schedule(
    learning_rate: float,
    *,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    total_steps: int | None = None,
    final: float = 0.1,
) -> Callable[[Any], Any]:
    """The learning rate as a function of the step: linear warm-up, then one of five courses.

    Args:
      learning_rate: the peak.
      schedule: after the warm-up, ``constant``; ``linear`` or ``cosine`` down to ``final``;
        ``wsd``, constant until the last fifth, then linear to ``final``; ``rsqrt``, with the
        inverse root of the step.
      warmup: steps from 0 to the peak.
      total_steps: of the run; needed by all but ``constant`` and ``rsqrt``.
      final: what is left of the peak at the end, as a fraction.

    Returns:
      step -> learning rate.

    Raises:
      ValueError: on another schedule, or a course without its ``total_steps``.

    >>> rate = make_schedule(1.0, schedule="linear", warmup=2, total_steps=12, final=0.0)
    >>> [float(rate(step)) for step in (0, 1, 2, 7, 12)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if schedule not in ("constant", "linear", "cosine", "wsd", "rsqrt"):
        raise ValueError(
            f"schedule: expected constant, linear, cosine, wsd or rsqrt, got {schedule!r}"
        )
    if schedule in ("constant", "rsqrt"):
        remaining = 1
    elif total_steps is None or total_steps <= warmup:
        raise ValueError(
            f"total_steps: schedule {schedule!r} expects more steps than the warm-up's {warmup}, "
            f"got {total_steps}"
        )
    else:
        remaining = total_steps - warmup
    course: Callable[[Any], Any]
    if schedule == "constant":
        course = optax.constant_schedule(learning_rate)
    elif schedule == "linear":
        course = optax.linear_schedule(learning_rate, learning_rate * final, remaining)
    elif schedule == "cosine":
        course = optax.cosine_decay_schedule(learning_rate, remaining, final)
    elif schedule == "wsd":
        decay = max(1, remaining // 5)
        course = optax.linear_schedule(
            learning_rate, learning_rate * final, decay, transition_begin=remaining - decay
        )
    else:
        knee = max(warmup, 1)

        def inverse_root(step: Any) -> Any:
            return learning_rate * jnp.sqrt(knee / (knee + jnp.maximum(step, 0)))

        course = inverse_root

    if warmup == 0:
        return course
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), course], [warmup]
    )


def make_optimizer(
    learning_rate: float,
    *,
    optimizer: Optimizer = "adamw",
    schedule: Schedule = "cosine",
    warmup: int = 0,
    total_steps: int | None = None,
    final: float = 0.1,
    weight_decay: float = 0.0,
    no_decay: str = r"(bias|scale|norm)",
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    moment_dtype: Any = None,
    trainable: str | None = None,
) -> optax.GradientTransformation:
    """An optimizer with warm-up, decay, clipping and frozen parameters.

    Args:
      learning_rate: the peak.
      optimizer: ``adamw``, ``lion``, ``adafactor`` or ``sgd`` (with momentum ``b1``).
      schedule: see :func:`make_schedule`, also for ``warmup``, ``total_steps`` and ``final``.
      warmup: steps of warm-up.
      total_steps: of the run.
      final: fraction of the peak that is left at the end.
      weight_decay: decoupled weight decay.
      no_decay: parameters whose path matches this regular expression do not decay. Dimensions would
        not tell: the norms of a stack of layers are matrices.
      clip: bound on the global norm of the gradient, or None.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: of ``adamw``.
      moment_dtype: dtype of the first moment, by default the parameters'.
      trainable: if given, parameters whose path it does not match are frozen, without any state.

    Returns:
      The optax transformation.

    >>> tx = make_optimizer(0.1, schedule="constant", trainable="lora")
    >>> params = {"kernel": jnp.ones(2), "lora": jnp.ones(2)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["kernel"].tolist()
    [0.0, 0.0]
    """
    rate = make_schedule(
        learning_rate, schedule=schedule, warmup=warmup, total_steps=total_steps, final=final
    )

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda matched: not matched, path_mask(params, no_decay))

    if optimizer == "adamw":
        tx = optax.adamw(
            rate,
            b1=b1,
            b2=b2,
            eps=eps,
            mu_dtype=moment_dtype,
            weight_decay=weight_decay,
            mask=decays,
        )
    elif optimizer == "lion":
        tx = optax.lion(
            rate, b1=b1, b2=b2, mu_dtype=moment_dtype, weight_decay=weight_decay, mask=decays
        )
    elif optimizer == "adafactor":
        tx = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(weight_decay, decays),
            optax.scale_by_learning_rate(rate),
        )
    elif optimizer == "sgd":
        tx = optax.chain(
            optax.add_decayed_weights(weight_decay, decays),
            optax.sgd(rate, momentum=b1 or None, accumulator_dtype=moment_dtype),
        )
    else:
        raise ValueError(f"optimizer: expected adamw, lion, adafactor or sgd, got {optimizer!r}")
    if clip is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip), tx)
    if trainable is None:
        return tx

    def labels(params: Any) -> Any:
        marks = path_mask(params, trainable)
        if not any(jax.tree.leaves(marks)):
            raise ValueError(f"trainable: no parameter's path matches {trainable!r}")
        return jax.tree.map(lambda mark: "trained" if mark else "frozen", marks)

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
