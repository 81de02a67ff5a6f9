"""The few positions that count, in an array of fixed length."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from logitjax.ops import checks


class Positions:
    """Where something counts, gathered first of all, and the way back.

    Of a batch of questions only answers' tokens meet the head, whose product is most of the work of
    a small model. How many those are differs from step to step, shapes may not: they go into
    `most` places, the rest of which holds some position again, which `counted` leaves out.

    Attributes:
        counted: bool `[most]`, which of the places hold a position that counts; `where` itself
            when all positions are kept.
        fits: bool scalar, whether the positions that count are at most `most`. If not, the last
            ones are missing.

    Args:
        where: bool `[...]`, which positions count.
        most: places; all positions stay where they are when None, or when there are no more of
            them. Leave it None where positions are split over devices: gathering them would move
            them.

    Raises:
        ValueError: `most` is not positive.

    >>> import numpy as np
    >>> @jax.jit
    ... def tenfold(values, where):
    ...     positions = Positions(where, 3)
    ...     picked = positions.pick(values)
    ...     return picked, positions.counted, positions.put(10 * picked)
    >>> where = np.array([[False, True], [True, False]])
    >>> picked, counted, whole = tenfold(np.array([[1.0, 2.0], [3.0, 4.0]]), where)
    >>> picked.tolist()[:2], counted.tolist(), whole.tolist()
    ([2.0, 3.0], [True, True, False], [[0.0, 20.0], [30.0, 0.0]])
    """

    def __init__(self, where: Any, most: int | None = None):
        if most is not None and most < 1:
            raise ValueError(f"most: expected a positive number, got {most}")
        where = jnp.asarray(where)
        checks.where(where, where.shape)
        self._shape = where.shape
        self._at: jax.Array | None = None
        self.counted, self.fits = where, jnp.bool_(True)
        if most is not None and most < where.size:
            # Places left over lie behind the end: read there is the last position, written nothing.
            (self._at,) = jnp.nonzero(where.ravel(), size=most, fill_value=where.size)
            self.counted = self._at < where.size
            self.fits = where.sum() <= most

    def pick(self, values: Any) -> jax.Array:
        """`[..., *rest]` to `[most, *rest]`."""
        values = jnp.asarray(values)
        if values.shape[: len(self._shape)] != self._shape:
            raise ValueError(f"values: expected {self._shape} first, got shape {values.shape}")
        if self._at is None:
            return values
        flat = values.reshape(-1, *values.shape[len(self._shape) :])
        return flat.at[self._at].get(mode="clip")

    def put(self, values: Any) -> jax.Array:
        """`[most, *rest]` back to `[..., *rest]`, zero where nothing counts."""
        values = jnp.asarray(values)
        if self._at is None:
            return values
        zeros = jnp.zeros((math.prod(self._shape), *values.shape[1:]), values.dtype)
        flat = zeros.at[self._at].set(values, mode="drop")
        return flat.reshape(*self._shape, *values.shape[1:])
