"""Answers about two graphs: bounds, units and the coupling."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.ops import Array
from logitjax.transport._rounding import times_power_of_two
from logitjax.transport._sorted import Coupling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """Bounds ``lower <= GW_p^p <= upper``, with a coupling that attains the upper one.

    Attributes:
        lower: lower bound of the cost of all couplings.
        upper: some coupling costs at most this: ``coupling`` up to rounding, or a cheaper plan of
            the ``candidates``.
        coupling: the best one found.
        units: divisors of c and d, ``[2]``; infinite or zero beyond float32.
        costs: upper bound of the cost of each of the ``candidates`` once its marginals are the
            weights, ``[candidates]``: ``costs / lower`` bounds its distance from the optimum.
        reported: the ``primal_cost`` that a solution of ott states, ``[candidates]``; else nan.
        converged: whether a solution says that it converged, ``[candidates]``.
    """

    lower: Array
    upper: Array
    coupling: Coupling
    units: Array
    costs: Array
    reported: Array = dataclasses.field(default_factory=functools.partial(np.zeros, 0, np.float32))
    converged: Array = dataclasses.field(default_factory=functools.partial(np.zeros, 0, bool))

    @property
    def gap(self) -> jax.Array:
        """upper / lower; 1 if both are zero, infinite if only the lower one is."""
        upper, lower = jnp.asarray(self.upper), jnp.asarray(self.lower)
        apart = jnp.where(lower > 0, upper / jnp.where(lower > 0, lower, 1.0), jnp.inf)
        return jnp.where(upper > 0, apart, 1.0)


def raised(answer: Certificate, exponents: tuple[Any, Any]) -> Certificate:
    """Under a transformation: infinite above and the largest number below the type's range."""
    cost, unit = exponents
    lower, upper, costs = (
        times_power_of_two(jnp.asarray(x), cost) for x in (answer.lower, answer.upper, answer.costs)
    )
    return dataclasses.replace(
        answer,
        lower=jnp.minimum(lower, jnp.finfo(lower.dtype).max),
        upper=upper,
        costs=costs,
        units=times_power_of_two(jnp.asarray(answer.units), unit),
    )


def in_float32(answer: Certificate, exponents: tuple[Any, Any], scale: Any) -> Certificate:
    """The same claims in float32, for one pair or many: rounded away from each other."""
    info = np.finfo(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        lower, upper = (
            np.ldexp(np.asarray(x, np.float64), exponents[0]) for x in (answer.lower, answer.upper)
        )
        costs = np.ldexp(np.asarray(answer.costs, np.float64), np.asarray(exponents[0])[..., None])
        units = np.ldexp(np.asarray(answer.units, np.float64), exponents[1])
    vanished = (answer.upper > 0) & (upper < info.tiny)
    if not np.all(upper <= info.max) or (scale == "none" and np.any(vanished)):
        raise ValueError(
            "scale: expected units in which float32 holds the cost, got a cost between "
            f"{np.min(lower):g} and {np.max(upper):g} with scale={scale!r}"
        )
    if not (units.min() >= info.tiny and units.max() <= info.max):
        raise ValueError(
            f"scale: expected graphs whose RMS entry float32 holds, got {units.min():g} and "
            f"{units.max():g}; use scale='none' or other units"
        )
    kinds = (np.int32, np.int32, np.float32)
    plan = answer.coupling
    plans = zip((plan.rows, plan.columns, plan.mass), kinds, strict=True)
    return dataclasses.replace(
        answer,
        lower=jnp.asarray(towards(lower, -1)),
        upper=jnp.asarray(towards(np.where(vanished, info.tiny, upper), 1)),
        coupling=Coupling(*(jnp.asarray(np.asarray(x, kind)) for x, kind in plans)),
        units=jnp.asarray(units.astype(np.float32)),
        costs=jnp.asarray(towards(costs, 1)),
    )


def towards(value: Any, direction: int) -> np.ndarray:
    """The nearest float32 that is not below (1), or not above (-1), a number in float64."""
    # Next to a float32 array a Python number would be compared as float32.
    value = np.asarray(value, np.float64)
    with np.errstate(over="ignore"):
        near = value.astype(np.float32)
    wrong = near > value if direction < 0 else near < value
    return np.where(wrong, np.nextafter(near, np.float32(direction * np.inf)), near)
