"""Comparisons and calls whose failures name the property, the argument and the numbers."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.registry import Registry

#: Arrays by the name of their argument.
Arrays = Mapping[str, Any]


def fail(name: str, subject: str, message: str) -> NoReturn:
    """Raise an `AssertionError` of one line."""
    raise AssertionError(f"{name}: {subject}: {' '.join(message.split())}")


def equal(
    name: str, subject: str, result: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Fail at the first entry that differs; infinities and nans equal themselves."""
    result, expected = (np.asarray(x, np.float64) for x in (result, expected))
    if result.shape != expected.shape:
        fail(name, subject, f"expected shape {expected.shape}, got {result.shape}")
    # In float64 on the host, because float32 would round both sides alike.
    wrong = ~np.isclose(result, expected, rtol=rtol, atol=atol, equal_nan=True)
    if wrong.any():
        at = tuple(int(axis[0]) for axis in np.nonzero(wrong)) if wrong.ndim else ()
        numbers = f"expected {expected[at]:.6g}, got {result[at]:.6g}"
        fail(name, subject, f"{numbers} at {at}" if at else numbers)


def attempt(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and fail with the reason of any error."""
    try:
        return call(*arguments)
    except AssertionError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise AssertionError(f"{name}: {type(error).__name__}: {reason}") from error


def selected(properties: Sequence[str], skip: Collection[str]) -> tuple[str, ...]:
    """Return the properties that are not skipped."""
    unknown = sorted(set(skip) - set(properties))
    if unknown:
        raise ValueError(f"skip: expected some of {', '.join(properties)}, got {unknown[0]}")
    return tuple(name for name in properties if name not in skip)


def frozen_value(name: str, value: Any, base: type) -> None:
    """Fail unless the value is a frozen dataclass whose repr flags can parse."""
    kind, subject = type(value), type(value).__name__
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        fail(name, subject, "expected a frozen dataclass, got another class")
    copy = dataclasses.replace(value)
    if (attempt(name, hash, copy), copy) != (hash(value), value):
        fail(name, subject, "expected to equal its copy, got another value")
    # As in flags, whether or not its class can be imported.
    text = repr(value).replace(kind.__qualname__, subject, 1)
    names = Registry(kind=base.__name__, group="logitjax", members={subject: kind}, base=base)
    if attempt(name, names.parse, text) != value:
        fail(name, subject, f"expected {text} to be read as the same value, got another")


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def rounded(x: Any) -> np.ndarray:
    """Copy to the host, with floats in float32 rounded to bfloat16."""
    x = np.array(x)
    return x.astype(jnp.bfloat16).astype(np.float32) if is_float(x) else x


def batch_mesh(size: int, kind: AxisType) -> Mesh:
    """Mesh with an axis `data`, of as many devices as divide a batch of this size."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if math.gcd(n, size) == n)
    return jax.make_mesh((count,), ("data",), (kind,), devices=devices[:count])


def on_mesh(mesh: Mesh, arrays: Arrays, shared: Collection[str]) -> dict[str, jax.Array]:
    """Split all but the shared arrays along their first axis."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, P("data") if splits else P()))
        for name, x in arrays.items()
        for splits in [name not in shared and x.ndim > 0]
    }
