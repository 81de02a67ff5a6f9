"""Learning rates and the optimizer of all recipes, from optax."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import optax

from logitjax.ops import mesh as on_mesh

Course = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step: linear warm-up, then one of three courses.

    Attributes:
        peak: the learning rate after the warm-up.
        course: shape after the warm-up: ``constant``; ``linear`` or ``cosine`` down to ``final``.
        warmup: steps from 0 to the peak.
        total_steps: steps of the run; needed by all but ``constant``.
        final: fraction of the peak at the end.

    Raises:
        ValueError: on another course, or a course without its ``total_steps``.

    >>> import numpy as np
    >>> rate = Schedule(1.0, "linear", warmup=2, total_steps=12, final=0.0)
    >>> jax.jit(rate)(np.array([0, 1, 2, 7, 12])).tolist()
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    peak: float
    course: Course = "cosine"
    _: dataclasses.KW_ONLY
    warmup: int = 0
    total_steps: int | None = None
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.course not in get_args(Course):
            raise ValueError(f"course: expected one of {get_args(Course)}, got {self.course!r}")
        if self.course == "constant":
            return
        if self.total_steps is None or self.total_steps <= self.warmup:
            raise ValueError(
                f"total_steps: course {self.course!r} expects more steps than the warm-up's "
                f"{self.warmup}, got {self.total_steps}"
            )

    def __call__(self, step: Any) -> Any:
        """The learning rate at a step, counted from 0."""
        peak, warmup, course = self.peak, self.warmup, self._course()
        if warmup == 0:
            return course(step)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), course], [warmup])(
            step
        )

    def _course(self) -> Callable[[Any], Any]:
        peak, end = self.peak, self.peak * self.final
        remaining = 1 if self.total_steps is None else self.total_steps - self.warmup
        if self.course == "constant":
            return optax.constant_schedule(peak)
        if self.course == "linear":
            return optax.linear_schedule(peak, end, remaining)
        return optax.cosine_decay_schedule(peak, remaining, self.final)

    def optimizer(
        self,
        *,
        weight_decay: float = 0.0,
        # As usual for language models; Adam's own is 0.999.
        b2: float = 0.95,
        eps: float = 1e-8,
        trainable: str | None = None,
    ) -> optax.GradientTransformation:
        """AdamW with this learning rate and frozen parameters; gradients have a norm of at most 1.

        Biases and norms do not decay.

        Args:
            trainable: if given, parameters whose path does not match are frozen, without state.

        >>> import numpy as np
        >>> tx = Schedule(0.1, "constant").optimizer(trainable="lora")
        >>> params = {"kernel": np.ones(2, np.float32), "lora": np.ones(2, np.float32)}
        >>> first = jax.jit(lambda params: tx.update(params, tx.init(params), params)[0])
        >>> first(params)["kernel"].tolist()
        [0.0, 0.0]
        """

        def decays(params: Any) -> Any:
            # Not by the number of dimensions: the norms of a stack of layers are matrices.
            return jax.tree.map(operator.not_, on_mesh.path_mask(params, r"(bias|scale|norm)"))

        tx = optax.adamw(self, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
        # Before Adam, whose moments must not include the spike.
        tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
        if trainable is None:
            return tx

        def labels(params: Any) -> Any:
            marks = on_mesh.path_mask(params, trainable)
            if not any(jax.tree.leaves(marks)):
                raise ValueError(f"trainable: no parameter's path matches {trainable!r}")
            return jax.tree.map(lambda mark: "trained" if mark else "frozen", marks)

        # Not `optax.masked`, which passes the other parameters' gradients through unchanged.
        return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
