"""PDU: flat logits, while a multiplier holds the loss on rows to keep below a bound."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from logitjax.losses.sweep import ReadoutStatistic, run
from logitjax.ops import neginf_to_zero
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read

# Ratio of the bound to the loss on rows to keep before unlearning.
_ABOVE = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class PDU(TwoSided):
    """Flat logits, while a multiplier holds the loss on rows to keep below a bound.

    `(max_v logits_v - mean_v logits_v)^2` is 0 where all tokens are equally likely; each step sets
    `multiplier <- max(0, multiplier + dual_step (retain loss - bound))`.

    Attributes:
        retain_weight: The multiplier at the start.
        dual_step: Its learning rate.
        bound: Of the retain loss; 1.05 times that of the model before if None.

    References:
        Unlearning as a constrained problem by primal-dual updates, 2025 (arXiv 2506.05314).
        OpenUnlearning's `PDU` averages over all positions, prompt and padding included, and moves
        the multiplier at every micro-batch. It starts at 1 in its configuration, at 50 to 100 in
        its README, and waits for five epochs, which is left to the caller (`optimizer`).
    """

    retain: str = "nll"
    retain_weight: float = 50.0
    dual_step: float = 1.0
    bound: float | None = None

    reads = (Need("forget", "states"),)

    def prepared(self, retain_nll: Callable[[], float]) -> "PDU":
        if self.bound is not None:
            return self
        return dataclasses.replace(self, bound=_ABOVE * retain_nll())

    def state(self) -> Any:
        return jnp.float32(self.retain_weight)

    def optimizer(
        self, tx: optax.GradientTransformation, *, warmup: int = 0
    ) -> optax.GradientTransformation:
        """Wrap an optimizer of weights: after `warmup` steps it moves the multiplier too.

        >>> tx = PDU().optimizer(optax.sgd(0.5))
        >>> params = {"weights": jnp.ones(1), "state": jnp.float32(1.0)}
        >>> slack = {"weights": jnp.ones(1), "state": jnp.float32(-0.3)}  # minus 0.5 - 0.2
        >>> moves, _ = tx.update(slack, tx.init(params), params)
        >>> print(f"{optax.apply_updates(params, moves)['state']:.1f}")
        1.3
        """

        def step(count: Any) -> jax.Array:
            return jnp.where(count < warmup, 0.0, self.dual_step)

        moves = optax.chain(optax.sgd(step), optax.keep_params_nonnegative())
        return optax.multi_transform(
            {"weights": tx, "state": moves}, {"weights": "weights", "state": "state"}
        )

    def forget(self, read: Read) -> Any:
        states = read.states("forget")
        head = read.head().resolve(states.shape[-1])
        outputs = run(ReadoutStatistic(k=1, mean=True), states, head)
        values = jnp.square(neginf_to_zero(outputs.values[..., 0]) - outputs.mean)
        return read.put("forget", values), read.where("forget")

    def loss(self, read: Read, state: Any) -> Any:
        if self.bound is None:
            raise ValueError("PDU: bound: expected a number, or `prepared` called, got None")
        _, means = super().loss(read, state)
        # By the weights the gradient is that of the Lagrangian, by the multiplier the slack: the
        # last term is zero, and so is its gradient by the weights.
        slack, multiplier = means["retain"] - self.bound, jax.lax.stop_gradient(state)
        loss = self.forget_weight * means["forget"] + multiplier * slack
        return loss + (multiplier - state) * slack, means
