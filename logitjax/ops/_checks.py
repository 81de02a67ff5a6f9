"""Argument checks: each error names the argument, the expected and the actual value.

Shapes and types are checked in every call. Values are checked only outside `jit`, and only where
that is cheap: in numpy arrays, and in device arrays of at most `_MOST_FETCHED` entries. Nothing
else is fetched, so no step ever waits for a check of its logits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from logitjax.ops._types import Array

_KINDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "float": ("floating point", (jnp.floating,)),
    "int": ("integers", (jnp.integer,)),
    "bool": ("booleans", (jnp.bool_,)),
    "number": ("numbers", (jnp.floating, jnp.integer)),
    "any": ("an array", (jnp.generic,)),
}

#: Maximum entries of a device array that a check fetches: labels of a batch, not its logits.
_MOST_FETCHED = 2**18


def as_float(
    values: Array, name: str, vocab_where: Array | None = None, where_name: str = "vocab_where"
) -> jax.Array:
    """Return `values` in float32, with `-inf` where `vocab_where` excludes an entry.

    float64 stays float64 if x64 is enabled. Integers raise a TypeError.
    """
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, got {values.dtype}")
    if values.ndim == 0:
        raise ValueError(f"{name}: expected a vocabulary axis, got a scalar")
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if vocab_where is None:
        return values
    where(vocab_where, values.shape, where_name)
    return jnp.where(vocab_where, values, -jnp.inf)


def shapes(**arrays: tuple[Any, str]) -> None:
    """Check kinds and shapes of arrays, and that axes of one name have one length.

    A spec is a kind (`float`, `int`, `bool`, `number`, `any`) and the names of the axes, of which
    the first may stand for any number of them: `"float *batch hidden"`. Axes without a star need at
    least one entry. None is skipped.

    Raises:
        TypeError: An array of another kind.
        ValueError: An array of another shape.

    >>> x, labels = np.zeros((2, 3)), np.zeros(3, int)
    >>> shapes(x=(x, "float *batch vocab"), labels=(labels, "int *batch"))
    Traceback (most recent call last):
    ValueError: labels: expected shape [2], as of x, got [3]
    """
    entries: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, (array, spec) in arrays.items():
        if array is None:
            continue
        kind, *axes = spec.split()
        dtype, shape = getattr(array, "dtype", None) or np.asarray(array).dtype, jnp.shape(array)
        what, parents = _KINDS[kind]
        if not any(jnp.issubdtype(dtype, parent) for parent in parents):
            raise TypeError(f"{name}: expected {what}, got {dtype}")
        # Only the first axis may stand for many, so the others are counted from the end.
        many = bool(axes) and axes[0].startswith("*")
        fits = len(shape) >= len(axes) - 1 if many else len(shape) == len(axes)
        split = len(shape) - len(axes) + 1 if many else 0
        parts = [shape[:split]] if many and fits else []
        parts += [(size,) for size in shape[split:]]
        if not fits or any(entries.get(a, (p,))[0] != p for a, p in zip(axes, parts, strict=True)):
            items = [a for a in axes if a in entries]
            expected = [", ".join(map(str, entries[a][0])) if a in entries else a for a in axes]
            others = " and ".join(dict.fromkeys(entries[a][1] for a in items))
            raise ValueError(
                f"{name}: expected shape [{', '.join(filter(None, expected))}]"
                f"{', as of ' + others if others else ''}, got {list(shape)}"
            )
        entries |= {a: (p, name) for a, p in zip(axes, parts, strict=True) if a not in entries}
        if 0 in shape[split:]:
            empty = axes[shape.index(0, split) - len(shape)]
            raise ValueError(f"{name}: expected at least one entry of {empty}, got {list(shape)}")


def axis(axis: int, shape: tuple[int, ...], name: str) -> int:
    """Return `axis` counted from the front; check that it has at least one entry."""
    ndim = len(shape)
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis: expected one of the {ndim} axes of {name}, got {axis}")
    if not shape[axis]:
        raise ValueError(f"{name}: expected at least one entry along axis {axis}, got {shape}")
    return axis % ndim


def ids(values: Any, count: int, name: str, *, least: int = 0) -> None:
    """Check that values are integers and, if they can be read, from `least` to `count - 1`."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    stored = _held(values)
    if stored is not None:
        _refuse(stored, (stored < least) | (stored >= count), name, f"{least} to {count - 1}")


def values(values: Any, fine: Callable[[np.ndarray], np.ndarray], name: str, expected: str) -> None:
    """Check each number, if numbers can be read."""
    stored = _held(values)
    if stored is not None:
        _refuse(stored, ~fine(stored), name, expected)


def unit_rows(values: Any, name: str) -> None:
    """Check that rows have length one, if they can be read; a row of zeros means no row."""
    stored = _held(values)
    if stored is None:
        return
    # Squares vanish in float16.
    length = np.sqrt(np.square(stored.astype(np.float32)).sum(-1))
    # Rows from a cache in half precision are off by a thousandth.
    # Not `>`, which nan passes.
    wrong = ~(np.abs(length - 1) <= 1e-2) & (length != 0)
    _refuse(length, wrong, name, "rows of length one")


def _held(values: Any) -> np.ndarray | None:
    """Values on the host if reading them costs nothing, otherwise None."""
    if isinstance(values, np.ndarray):
        return values
    fetched = isinstance(values, jax.Array) and not isinstance(values, Tracer)
    if fetched and values.size <= _MOST_FETCHED and values.is_fully_addressable:
        return np.asarray(values)
    return None


def _refuse(values: np.ndarray, wrong: np.ndarray, name: str, expected: str) -> None:
    """Raise an error with the first offending index, if there is one."""
    if wrong.any():
        location = tuple(int(axis[0]) for axis in np.nonzero(wrong)) if wrong.ndim else ()
        at = f" at {location[0] if len(location) == 1 else location}" if location else ""
        got = (
            values[location]
            if np.issubdtype(values.dtype, np.integer)
            else f"{values[location]:.4g}"
        )
        raise ValueError(f"{name}: expected {expected}, got {got}{at}")


def where(mask: Array | None, shape: tuple[int, ...], name: str = "where") -> None:
    """Check that a boolean mask broadcasts to `shape`."""
    if mask is None:
        return
    if mask.dtype != jnp.bool_:
        raise TypeError(f"{name}: expected booleans, got {mask.dtype}")
    try:
        matches = jnp.broadcast_shapes(mask.shape, shape) == tuple(shape)
    except ValueError:
        matches = False
    if not matches:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {mask.shape}"
        )


def positive(value: Any, name: str) -> None:
    """Check a Python number; a traced one cannot be read and passes."""
    # `not >`, because nan is not positive either.
    if isinstance(value, (int, float, np.number)) and not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value}")


def between(value: Any, low: float | int, high: float | int, name: str) -> None:
    """Check a Python number; a traced one cannot be read and passes."""
    if isinstance(value, (int, float, np.number)) and not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}")


def vocabulary_unsharded(values: jax.Array, name: str, operation: str) -> None:
    """Raise if the last axis of `values` is sharded over an Explicit mesh axis."""
    # Auto axes do not appear in it.
    spec = jax.typeof(values).sharding.spec
    if len(spec) == values.ndim and values.ndim and spec[-1] is not None:
        raise ValueError(
            f"{name}: expected an unsharded vocabulary, or axis_name={spec[-1]!r} inside "
            f"jax.shard_map, for a {operation}; got one sharded over {spec[-1]!r}"
        )
