import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from logitjax.fusion._inputs import read_inputs
from logitjax.fusion._joint import least_step
from logitjax.fusion._minimum import find_minimum
from logitjax.fusion._path import Path, make_path
from logitjax.fusion._rows import by_rows
from logitjax.fusion._solve import Solution, Visit, find_root
from logitjax.ops import Array, AxisName, checks

Method = Literal["grid", "jeffreys", "project"]
Multi = Literal["single", "joint"]
_METHODS, _MULTIS = ("grid", "jeffreys", "project"), ("single", "joint")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicFusion:
    """Follows experts as far as they have moved from their bases, at every token.

    The fused logits are `large + sum_t alpha_t (expert_t - base_t)`. With P the large model,
    P_a the fused distribution, Q_t the expert and Q its base, alpha is chosen such that P_a is
    about as far from P as Q_t from Q. What "as far" means is the `method`::

        grid      least (KL(P_a||P) - KL(Q_t||Q))^2 + (KL(P||P_a) - KL(Q||Q_t))^2 on a grid
        jeffreys  KL(P_a||P) + KL(P||P_a) = KL(Q_t||Q) + KL(Q||Q_t)
        project   the P_a nearest to P with E_{P_a}[log Q_t/Q] >= KL(Q_t||Q)

    The first is the paper's, whose objective may have several minima; `lower` and `upper` hold the
    lowest. Each of the others is the root of one growing function. All give alpha = 1 if P equals
    Q.

    With several experts `multi` determines how alphas are chosen::

        single      one expert a token, the one that comes nearest to the mean of the
                    divergences (the paper's rule; an expert that changed nothing halves that mean)
        joint       all alphas for the sum of the mean divergences, as `jeffreys` whatever the
                    method, by the shortest steps: one equation for several alphas

    Attributes:
        method: see above. Grid is the paper's; the default closed most of the gap between a large
            model and its tuned self in the experiment of docs/dynamic_fusion.md.
        multi: see above; without effect for one expert. The default did best with experts in two
            domains, where the sum of all shifts is too large.
        alpha_range: least and largest alpha.
        num: points of the grid, the ends included.
        max_sweeps: maximum number of evaluations of a search.
        sharded_sweeps: exact number of evaluations of a search with `axis_name`, each of which is
            an all-reduce.
        tolerance: relative tolerance of the root searches on the divergence.

    >>> large = jnp.array([2.0, 1.0, 0.0])
    >>> expert, base = jnp.array([0.0, 2.0, 0.0]), jnp.array([2.0, 1.0, 0.0])
    >>> fused, info = jax.jit(DynamicFusion())(large, expert, base)
    >>> print(f"{info['alpha'][0]:.3f}", bool(info["converged"]))
    1.000 True

    References:
        Fan et al., On giant's shoulders, 2024 (arXiv 2406.15480), eq. 3 and algorithm 1 (whose best
        loss is reset for every token here). Jeffreys and project: ours.
    """

    method: Method = "project"
    multi: Multi = "joint"
    alpha_range: tuple[float, float] = (0.0, 2.0)
    # Steps of 0.1 by default.
    num: int = 21
    max_sweeps: int = 64
    sharded_sweeps: int = 12
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {self.method!r}")
        if self.multi not in _MULTIS:
            raise ValueError(f"multi: expected one of {', '.join(_MULTIS)}, got {self.multi!r}")
        low, high = self.alpha_range
        if not 0 <= low < high:
            raise ValueError(f"alpha_range: expected 0 <= low < high, got {self.alpha_range}")
        checks.between(self.num, 2, float("inf"), "num")
        checks.between(self.max_sweeps, 1, float("inf"), "max_sweeps")
        checks.between(self.sharded_sweeps, 1, float("inf"), "sharded_sweeps")

    def __call__(
        self,
        logits_large: Float[Array, "*batch vocab"],
        logits_experts: Float[Array, "..."],
        logits_bases: Float[Array, "..."],
        *,
        vocab_where: Bool[Array, "..."] | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Float[jax.Array, "*batch vocab"], dict[str, jax.Array]]:
        """Fuse logits, and report the decisions.

        Arguments are those of the other strategies, such as `ProxyTuning`: logits `[*batch,
            vocab]`,
        untempered, of experts and bases `[T, *batch, vocab]`. Entries at `-inf` in any of the
        models do not exist.

        Returns:
            Float32 logits `[*batch, vocab]` up to a constant a row, such that the large model's
            largest is 0 (alphas count as constants in their gradient), and arrays: `alpha`,
            `lower`, `upper` `[T, *batch]`, proven to hold the exact alpha: all the range where the
            numbers say nothing about it, and for several alphas at once; `converged` `[*batch]`,
            false where the answer may be worse than the tolerance; `at_bound` `[*batch]`; `expert`
            `[*batch]`, the one that was followed, -1 for all; `forward`, `reverse`, `objective`
            `[*batch]` and their targets, of the fused distribution against the mean divergences;
            `sweeps`, evaluations of the path.

        Raises:
            ValueError: shapes do not fit.
        """
        inputs = read_inputs(logits_large, logits_experts, logits_bases, vocab_where)
        arrays = [logits_large, logits_experts, logits_bases, vocab_where]
        if vocab_where is not None:
            arrays[3] = jnp.broadcast_to(vocab_where, logits_large.shape)  # cut by rows
        frozen = jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), arrays)
        decide = functools.partial(self._decide, axis_name=axis_name)
        # All-reduces are counted per token, not per row.
        if axis_name is None:
            info = by_rows(decide, inputs.large.shape[:-1], *frozen)
        else:
            info = decide(*frozen)
        levels = info.pop("large_level"), info.pop("expert_levels"), info.pop("base_levels")
        alpha = info["alpha"][..., None].astype(inputs.large.dtype)
        shift = (alpha * inputs.differences_below(levels)).sum(0)
        return inputs.fused(inputs.below(levels).large + shift), info

    def _decide(
        self,
        large: jax.Array,
        experts: jax.Array,
        bases: jax.Array,
        vocab_where: jax.Array | None,
        *,
        axis_name: AxisName | None,
    ) -> dict[str, jax.Array]:
        """Alphas, and all other reported values."""
        inputs = read_inputs(large, experts, bases, vocab_where)
        path = make_path(inputs, axis_name)
        several = len(path) > 1
        # -1: all experts are followed.
        expert = jnp.full(inputs.large.shape[:-1], -1 if several else 0, jnp.int32)
        if several and self.multi == "joint":
            solution = self._joint(path, axis_name)
        else:
            mean = several and self.method != "project"
            solution = self._alone(path, axis_name, mean_targets=mean)
            if several:
                solution, expert = _choose(path, solution)
            else:
                solution = solution._replace(at=jax.tree.map(lambda x: x[0], solution.at))
        level, expert_levels, base_levels = path.levels
        return {
            **self._report(path, solution),
            "expert": expert,
            "large_level": level,
            "expert_levels": expert_levels,
            "base_levels": base_levels,
        }

    def _alone(self, path: Path, axis_name: AxisName | None, *, mean_targets: bool) -> Solution:
        """Each expert's alpha without the others."""
        targets = path.target_forward, path.target_reverse
        errors = path.target_errors
        if mean_targets:
            targets, errors = jax.tree.map(
                lambda x: jnp.broadcast_to(x.mean(0), x.shape), (targets, errors)
            )
        if self.method == "grid":
            values = jnp.linspace(*self.alpha_range, self.num, dtype=path.variance.dtype)
            return find_minimum(path, targets, errors[:2], values, axis_name=axis_name)
        visit, scale, start = _visit_mean, targets[0], path.target_mean / path.variance
        doubt: Any = jnp.inf
        if self.method == "jeffreys":
            scale = targets[0] + targets[1]
            # If the large model is almost certain, divergences of 1e-17 are rounding.
            doubt = 0.01 * scale
            visit = functools.partial(_visit_sum, target=(scale, errors[0] + errors[1]))
            start = jnp.sqrt(scale / path.variance)
        return find_root(
            functools.partial(visit, path, axis_name=axis_name),
            self.tolerance * scale,
            start,
            *self.alpha_range,
            max_sweeps=self._sweeps(axis_name),
            unrolled=axis_name is not None,
            doubt=doubt,
        )

    def _sweeps(self, axis_name: AxisName | None) -> int:
        return self.max_sweeps if axis_name is None else self.sharded_sweeps

    def _joint(self, path: Path, axis_name: AxisName | None) -> Solution:
        one = dataclasses.replace(self, method="jeffreys")
        return least_step(
            path,
            path.target_forward.mean(0) + path.target_reverse.mean(0),
            one._alone(path, axis_name, mean_targets=False).alpha / len(path),
            self.alpha_range,
            # Steps of several alphas are not bracketed and take longer.
            max_sweeps=self._sweeps(axis_name) * (1 if axis_name is None else 2),
            tolerance=self.tolerance,
            axis_name=axis_name,
        )

    def _report(self, path: Path, solution: Solution) -> dict[str, jax.Array]:
        moved, back = solution.at
        forward, reverse = path.target_forward.mean(0), path.target_reverse.mean(0)
        return {
            "alpha": solution.alpha,
            "lower": solution.lower,
            "upper": solution.upper,
            "converged": solution.converged.all(0),
            "at_bound": (solution.alpha >= self.alpha_range[1]).any(0),
            "forward": moved,
            "reverse": back,
            "target_forward": forward,
            "target_reverse": reverse,
            "objective": (moved - forward) ** 2 + (back - reverse) ** 2,
            "sweeps": jnp.asarray(solution.sweeps, jnp.int32),
        }


def _visit_mean(path: Path, alpha: jax.Array, *, axis_name: AxisName | None) -> Visit:
    """`project`: the mean of h equals that of the expert."""
    # Its slope is the variance v, and from mu on -(mu - least) <= v'/v <= most - mu: the gap closes
    # within the integral of this bound. Near the root the centre is the mean.
    at = path.moments(alpha, axis_name=axis_name, centre=path.target_mean)
    gap, error = at.mean - path.target_mean, at.errors[2] + path.target_errors[2]
    variance = jnp.maximum(at.variance - at.errors[3], 0.0)

    def reach(distance: jax.Array, rate: jax.Array) -> jax.Array:
        share = jnp.maximum(rate, 0.0) * distance / variance
        bent = -jnp.log1p(-share) / rate
        existing = (distance < variance / 1e-30) & (share < 1)
        width = 1.001 * jnp.maximum(distance / variance, jnp.where(rate > 0, bent, 0.0))
        return jnp.where(distance < 0, 0.0, jnp.where(existing, width, jnp.inf))

    margin = path.target_errors[2]
    below = alpha - reach(gap + error, path.most - path.target_mean + margin)
    above = alpha + reach(error - gap, path.target_mean + margin - path.least)
    return Visit(gap, error, -gap / at.variance, below, above, (at.forward, at.reverse))


def _visit_sum(
    path: Path, alpha: jax.Array, *, target: tuple[jax.Array, jax.Array], axis_name: AxisName | None
) -> Visit:
    """`jeffreys`: the sum of both divergences, alpha mu, is the target `(sum, its error)`."""
    # mu grows, so the sum grows at least as fast as alpha.
    at = path.moments(alpha, axis_name=axis_name)
    (expected, doubt), error = target, alpha * at.errors[2] + 1e-6 * alpha * at.mean
    value, tiny = alpha * at.mean, jnp.finfo(alpha.dtype).tiny
    most = jnp.where(value > error, (expected + doubt) / (value - error), jnp.inf)
    below = alpha * jnp.minimum(1.0, (expected - doubt) / (value + error + tiny)) * (1 - 1e-6)
    above = jnp.where(alpha > 0, alpha * jnp.maximum(1.0, most) * (1 + 1e-6), jnp.inf)
    # Near 0 the sum is about c alpha^2, so its square root is nearly linear.
    root = jnp.sqrt(value)
    step = (jnp.sqrt(expected) - root) * 2 * root / (at.mean + alpha * at.variance)
    return Visit(value - expected, error + doubt, step, below, above, (at.forward, at.reverse))


def _choose(path: Path, solution: Solution) -> tuple[Solution, jax.Array]:
    """The paper's rule: of one alpha per expert, the one with the least summed objective."""
    moved, back = solution.at
    objective = (moved - path.target_forward.mean(0)) ** 2
    objective += (back - path.target_reverse.mean(0)) ** 2
    # The first of equal ones, as with the paper's strict comparison.
    expert = objective.argmin(0).astype(jnp.int32)
    chosen = jnp.arange(len(path)).reshape(-1, *[1] * expert.ndim) == expert
    alpha, lower, upper, moved, back = (
        jnp.where(chosen, x, 0.0)
        for x in (solution.alpha, solution.lower, solution.upper, moved, back)
    )
    at, converged = (moved.sum(0), back.sum(0)), solution.converged | ~chosen
    return Solution(alpha, at, lower, upper, converged, solution.sweeps), expert
