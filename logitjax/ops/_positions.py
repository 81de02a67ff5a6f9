import math
from typing import Any

import jax
import jax.numpy as jnp

from logitjax.ops import checks


class Positions:
    """Gathers the positions of a batch that count, and puts results back in place.

    In a batch of questions and answers only the answers' tokens need the head, whose product is
    most of the work of a small model. Their number differs from step to step, but shapes must not.
    Therefore they are gathered into `most` entries. Unused entries repeat some position, and
    `counted` is False for them.

    Attributes:
        counted: bool `[most]`, entries with a position that counts; `where` if all are kept.
        fits: bool scalar, whether at most `most` positions count; else the last are missing.

    Args:
        where: bool `[...]`, which positions count.
        most: number of entries. With None, or no more positions, all stay in place. Leave it None
            if positions are split over devices: gathering would move them between devices.

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
            # Unused entries point past the end: reads there get the last position, writes nothing.
            (self._at,) = jnp.nonzero(where.ravel(), size=most, fill_value=where.size)
            self.counted = self._at < where.size
            self.fits = where.sum() <= most

    def pick(self, values: Any) -> jax.Array:
        """Gathers `[..., *rest]` into `[most, *rest]`."""
        values = jnp.asarray(values)
        if values.shape[: len(self._shape)] != self._shape:
            raise ValueError(f"values: expected {self._shape} first, got shape {values.shape}")
        if self._at is None:
            return values
        flat = values.reshape(-1, *values.shape[len(self._shape) :])
        return flat.at[self._at].get(mode="clip")

    def put(self, values: Any) -> jax.Array:
        """Scatter `[most, *rest]` back into `[..., *rest]`, with zeros at other positions."""
        values = jnp.asarray(values)
        if self._at is None:
            return values
        # Scattered into zeros: the gradient of all other positions is zero, never nan.
        zeros = jnp.zeros((math.prod(self._shape), *values.shape[1:]), values.dtype)
        flat = zeros.at[self._at].set(values, mode="drop")
        return flat.reshape(*self._shape, *values.shape[1:])
