import math
from typing import Any

import jax
import jax.numpy as jnp

from logitjax.ops import checks


class Positions:
    """Gathers the positions of a batch that count, and puts results back where they came from.

    In a batch of questions and answers only the tokens of answers need the head, whose product is
    most of the work of a small model. Their number differs from step to step, but shapes must not.
    So they are gathered into `most` places. Places that are left over repeat some position, and
    `counted` is False for them.

    Attributes:
        counted: bool `[most]`, places that hold a position that counts; `where` if all are kept.
        fits: bool scalar, whether at most `most` positions count; else the last ones are missing.

    Args:
        where: bool `[...]`, which positions count.
        most: number of places. With None, or no more positions, all stay where they are. Leave it
            None where positions are split over devices: gathering would move them between these.

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
        """Gathers `[..., *rest]` into `[most, *rest]`."""
        values = jnp.asarray(values)
        if values.shape[: len(self._shape)] != self._shape:
            raise ValueError(f"values: expected {self._shape} first, got shape {values.shape}")
        if self._at is None:
            return values
        flat = values.reshape(-1, *values.shape[len(self._shape) :])
        return flat.at[self._at].get(mode="clip")

    def put(self, values: Any) -> jax.Array:
        """Puts `[most, *rest]` back into `[..., *rest]`, with zeros where nothing counts."""
        values = jnp.asarray(values)
        if self._at is None:
            return values
        # Scattered into zeros: the gradient of what does not count is zero, and none is nan.
        zeros = jnp.zeros((math.prod(self._shape), *values.shape[1:]), values.dtype)
        flat = zeros.at[self._at].set(values, mode="drop")
        return flat.reshape(*self._shape, *values.shape[1:])
