"""Dynamic logit fusion: how far to follow the experts, token by token."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from logitjax.fusion._inputs import read_inputs
from logitjax.fusion._joint import least_step, project
from logitjax.fusion._minimum import find_minimum
from logitjax.fusion._path import Moments, Path, make_path
from logitjax.fusion._rows import by_rows
from logitjax.fusion._solve import Solution, find_root
from logitjax.ops import Array, AxisName, checks

Method = Literal["grid", "newton", "jeffreys", "budget", "project"]
Multi = Literal["single", "joint", "per_expert", "project"]
_METHODS = ("grid", "newton", "jeffreys", "budget", "project")
_MULTIS = ("single", "joint", "per_expert", "project")
_LARGEST_JOINT_GRID = 10_000
# Enough for most rows; of many rows the others are searched apart.
_FEW_SWEEPS = 10


class _Found(NamedTuple):
    """Alphas and their bracket `[T, *batch]`; F and R of the fused distribution, where known."""

    alpha: jax.Array
    lower: jax.Array
    upper: jax.Array
    converged: jax.Array
    sweeps: Any
    divergences: Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicFusion:
    """Follows experts as far as they have moved from their bases, anew at every token.

    The fused logits are `large + sum_t alpha_t (expert_t - base_t)`. With P the large model,
    P_a the fused distribution, Q_t the expert and Q its base, alpha is chosen such that P_a is
    about as far from P as Q_t from Q. What "as far" means is the `method`::

        grid      least (KL(P_a||P) - KL(Q_t||Q))^2 + (KL(P||P_a) - KL(Q||Q_t))^2 on a grid
        newton    the same objective, its least value on the whole range, certified
        jeffreys  KL(P_a||P) + KL(P||P_a) = KL(Q_t||Q) + KL(Q||Q_t)
        budget    KL(P_a||P) = KL(Q_t||Q): the largest shift within the expert's divergence
        project   the P_a nearest to P with E_{P_a}[log Q_t/Q] >= KL(Q_t||Q)

    The first two search an objective with several minima. The last three are each the root of one
    growing function. All of them give alpha = 1 where P equals Q.

    With several experts `multi` says how alphas are chosen::

        single      one expert a token, the one that comes nearest to the mean of the
                    divergences (the paper's rule; an expert that changed nothing halves that mean)
        joint       all alphas for the mean divergences: on the full grid, or the shortest step;
                    with `method='project'` by `jeffreys`, as constraints have no mean
        per_expert  each alpha by itself, and the shifts add up
        project     the nearest P_a that satisfies `project` for all experts: convex, and an expert
                    that changed nothing changes nothing

    Attributes:
        method: see above. Grid is the paper's; the default closed most of the gap between a large
            model and its tuned self in the experiment of docs/dynamic_fusion.md.
        multi: see above; without effect for one expert. `'project'` takes the place of `method`.
            The default did best with experts of two domains, where the sum of all shifts is too
            much.
        alpha_range: least and largest alpha.
        num: points of the grid, the ends included.
        max_sweeps: largest number of evaluations of a search.
        sharded_sweeps: exact number of evaluations of a search with `axis_name`, each of which is
            an all-reduce. Newton then starts from the whole grid, which takes one.
        tolerance: relative tolerance of the root searches on the divergence.

    >>> large = jnp.array([2.0, 1.0, 0.0])
    >>> expert, base = jnp.array([0.0, 2.0, 0.0]), jnp.array([2.0, 1.0, 0.0])
    >>> fused, info = jax.jit(DynamicFusion())(large, expert, base)
    >>> print(f"{info['alpha'][0]:.3f}", bool(info["converged"]))
    1.000 True

    References:
        Fan et al., On giant's shoulders, 2024 (arXiv 2406.15480), eq. 3 and algorithm 1 (whose best
        loss is reset for every token here). Jeffreys, budget, project: ours.
    """

    method: Method = "project"
    multi: Multi = "joint"
    alpha_range: tuple[float, float] = (0.0, 2.0)
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
        """Fused logits, and what was decided.

        Args:
            logits_large: `[*batch, vocab]`, untempered.
            logits_experts: `[T, *batch, vocab]`, or without the leading axis for one expert.
            logits_bases: as many, or one for all.
            vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
                Entries that are `-inf` in any of the models do not exist either.
            axis_name: inside `jax.shard_map` with the vocabulary split over this mesh axis: that
                axis.

        Returns:
            Float32 logits `[*batch, vocab]` up to a constant a row, such that the large model's
            largest is 0 (alphas count as constants in their gradient), and arrays: `alpha`,
            `lower`, `upper` `[T, *batch]`, the last two a bracket; `converged` `[*batch]`, false
            where the answer may be another; `at_bound` `[*batch]`; `expert` `[*batch]`, the one
            that was followed, -1 for all; `forward`, `reverse`, `objective` `[*batch]` and their
            targets, of the fused distribution against the mean divergences; `sweeps`, evaluations
            of the path.

        Raises:
            ValueError: shapes do not fit, or a joint grid would be too large.
        """
        inputs = read_inputs(logits_large, logits_experts, logits_bases, vocab_where)
        given = [logits_large, logits_experts, logits_bases, vocab_where]
        if vocab_where is not None:
            given[3] = jnp.broadcast_to(vocab_where, logits_large.shape)
        frozen = jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), given)
        decide = functools.partial(self._decide, axis_name=axis_name)
        # All-reduces are counted by the token, not by the row.
        if axis_name is None:
            quick = dataclasses.replace(self, max_sweeps=min(self.max_sweeps, _FEW_SWEEPS))
            first = functools.partial(quick._decide, axis_name=None)
            info = by_rows(decide, inputs.large.shape[:-1], *frozen, first=first)
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
        """Alphas, and all that is reported beside them."""
        inputs = read_inputs(large, experts, bases, vocab_where)
        extent = self.method == "newton"
        path = make_path(inputs, axis_name, extent=extent)
        several = len(path) > 1
        expert = jnp.full(inputs.large.shape[:-1], -1 if several else 0, jnp.int32)
        if several and self.multi == "project":
            found = _of(self._project(path, axis_name))
        elif several and self.multi == "joint":
            found = self._joint(path, axis_name)
        else:
            mean = several and self.multi == "single" and self.method != "project"
            found = self._alone(path, axis_name, mean_targets=mean)
            if several and self.multi == "single":
                found, expert = _choose(path, found)
            elif several:
                found = found._replace(divergences=None)
            else:
                found = found._replace(divergences=_first(found.divergences))
        level, expert_levels, base_levels = path.levels
        return {
            **self._report(path, found, axis_name),
            "expert": expert,
            "large_level": level,
            "expert_levels": expert_levels,
            "base_levels": base_levels,
        }

    def _alone(self, path: Path, axis_name: AxisName | None, *, mean_targets: bool) -> _Found:
        """Each expert's alpha with the others left out."""
        forward, reverse = path.target_forward, path.target_reverse
        if mean_targets:
            forward, reverse = (jnp.broadcast_to(t.mean(0), t.shape) for t in (forward, reverse))
        if self.method == "grid":
            return self._grid(path, forward, reverse, axis_name)
        if self.method == "newton":
            return self._newton(path, forward, reverse, axis_name)
        target, start = {
            "jeffreys": (forward + reverse, jnp.sqrt((forward + reverse) / path.variance)),
            "budget": (forward, jnp.sqrt(2 * forward / path.variance)),
            "project": (forward, (forward - path.gain) / path.variance),
        }[self.method]

        def root(alpha: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
            at = path.moments(alpha, axis_name=axis_name)
            moved = alpha * at.mean - at.log_z
            if self.method == "project":
                value, slope = at.mean + path.gain, at.variance
            elif self.method == "budget":
                value, slope = moved, alpha * at.variance
            else:
                value, slope = alpha * at.mean, at.mean + alpha * at.variance
            return value, slope, (moved, at.log_z)

        solution = find_root(
            root,
            target,
            start,
            *self.alpha_range,
            quadratic=self.method != "project",
            tolerance=self.tolerance,
            max_sweeps=self._sweeps(axis_name),
            unrolled=axis_name is not None,
        )
        return _of(solution)

    def _grid(
        self, path: Path, forward: jax.Array, reverse: jax.Array, axis_name: AxisName | None
    ) -> _Found:
        low, high = self.alpha_range
        values = jnp.linspace(low, high, self.num, dtype=path.variance.dtype)
        moved, back = _divergences(*path.scan(values, axis_name=axis_name))
        # The first of equal ones, as the paper's strict comparison keeps it.
        best = ((moved - forward) ** 2 + (back - reverse) ** 2).argmin(0)
        alpha, width = _pick(values, best), (high - low) / (self.num - 1)
        at = (_pick(moved, best), _pick(back, best))
        lower, upper = jnp.maximum(alpha - width, low), jnp.minimum(alpha + width, high)
        return _Found(alpha, lower, upper, jnp.isfinite(at[0]), self.num, at)

    def _newton(
        self, path: Path, forward: jax.Array, reverse: jax.Array, axis_name: AxisName | None
    ) -> _Found:
        # Unsharded, a point costs a sweep: most of the grid is proven away without one.
        count = 3 if axis_name is None else self.num
        values = jnp.linspace(*self.alpha_range, count, dtype=path.variance.dtype)
        sweeps = self._sweeps(axis_name)
        return _of(
            find_minimum(path, forward, reverse, values, max_sweeps=sweeps, axis_name=axis_name)
        )

    def _sweeps(self, axis_name: AxisName | None, *, several: bool = False) -> int:
        # Steps of several alphas are not bracketed, and take longer.
        return self.max_sweeps if axis_name is None else self.sharded_sweeps * (1 + several)

    def _project(self, path: Path, axis_name: AxisName | None) -> Solution:
        return project(
            path,
            self.alpha_range,
            max_sweeps=self._sweeps(axis_name, several=True),
            tolerance=self.tolerance,
            axis_name=axis_name,
        )

    def _joint(self, path: Path, axis_name: AxisName | None) -> _Found:
        forward, reverse = path.target_forward.mean(0), path.target_reverse.mean(0)
        count = len(path)
        if self.method == "project":
            return dataclasses.replace(self, method="jeffreys")._joint(path, axis_name)
        if self.method != "grid":
            start = self._alone(path, axis_name, mean_targets=False).alpha / count
            return _of(
                least_step(
                    path,
                    forward,
                    reverse,
                    start,
                    self.alpha_range,
                    method=self.method,
                    max_sweeps=self._sweeps(axis_name, several=True),
                    tolerance=self.tolerance,
                    axis_name=axis_name,
                )
            )
        if self.num**count > _LARGEST_JOINT_GRID:
            raise ValueError(
                f"num: a joint grid of {self.num} points for {count} experts has "
                f"{self.num**count} points, at most {_LARGEST_JOINT_GRID} are tried; lower num or "
                "take another multi"
            )
        low, high = self.alpha_range
        values = jnp.linspace(low, high, self.num, dtype=path.variance.dtype)
        points = jnp.stack(jnp.meshgrid(*[values] * count, indexing="ij"), -1).reshape(-1, count)
        batch = path.variance.shape[1:]

        def visit(point: jax.Array) -> tuple[jax.Array, jax.Array]:
            alphas = jnp.broadcast_to(point.reshape(count, *[1] * len(batch)), (count, *batch))
            log_z, means, _ = path.joint_moments(alphas, axis_name=axis_name)
            return (alphas * means).sum(0) - log_z, log_z

        moved, back = lax.map(visit, points)
        best = ((moved - forward) ** 2 + (back - reverse) ** 2).argmin(0)
        alpha = jnp.stack([_pick(column, best) for column in points.T])
        at = (_pick(moved, best), _pick(back, best))
        width = (high - low) / (self.num - 1)
        lower, upper = jnp.maximum(alpha - width, low), jnp.minimum(alpha + width, high)
        return _Found(alpha, lower, upper, jnp.isfinite(alpha), len(points), at)

    def _report(
        self, path: Path, found: _Found, axis_name: AxisName | None
    ) -> dict[str, jax.Array]:
        if found.divergences is None:
            log_z, means, _ = path.joint_moments(found.alpha, axis_name=axis_name)
            moved = (found.alpha * means).sum(0) - log_z
        else:
            moved, log_z = found.divergences
        forward, reverse = path.target_forward.mean(0), path.target_reverse.mean(0)
        return {
            "alpha": found.alpha,
            "lower": found.lower,
            "upper": found.upper,
            "converged": found.converged.all(0),
            "at_bound": (found.alpha >= self.alpha_range[1]).any(0),
            "forward": moved,
            "reverse": log_z,
            "target_forward": forward,
            "target_reverse": reverse,
            "objective": (moved - forward) ** 2 + (log_z - reverse) ** 2,
            "sweeps": jnp.asarray(found.sweeps, jnp.int32),
        }


def _divergences(alpha: jax.Array, moments: Moments) -> tuple[jax.Array, jax.Array]:
    """F and R."""
    return alpha * moments.mean - moments.log_z, moments.log_z


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """Of `values [num, *batch]` or `[num]`, those at `index [*batch]`.

    By comparison, for a gather from a batch that is sharded would have to be told how.
    """
    values = values.reshape(*values.shape, *[1] * (1 + index.ndim - values.ndim))
    chosen = jnp.arange(len(values)).reshape(-1, *[1] * index.ndim) == index
    return jnp.where(chosen, values, 0).sum(0)


def _first(values: Any) -> Any:
    return jax.tree.map(lambda value: value[0], values)


def _of(solution: Solution) -> _Found:
    return _Found(
        solution.alpha,
        solution.lower,
        solution.upper,
        solution.converged,
        solution.sweeps,
        solution.at,
    )


def _choose(path: Path, found: _Found) -> tuple[_Found, jax.Array]:
    """The paper's rule: of one alpha an expert, the one with the least summed objective."""
    moved, back = found.divergences
    gap, gap_back = moved - path.target_forward.mean(0), back - path.target_reverse.mean(0)
    expert = (gap**2 + gap_back**2).argmin(0).astype(jnp.int32)
    chosen = jnp.arange(len(path)).reshape(-1, *[1] * expert.ndim) == expert

    def only(values: jax.Array) -> jax.Array:
        return jnp.where(chosen, values, 0.0)

    alone = _Found(
        only(found.alpha),
        only(found.lower),
        only(found.upper),
        found.converged | ~chosen,
        found.sweeps,
        (only(moved).sum(0), only(back).sum(0)),
    )
    return alone, expert
