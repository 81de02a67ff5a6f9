"""An nnx module as a pure function and its parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def from_nnx(module: Any, *, method: str | None = None) -> tuple[Callable, dict]:
    """Turn an nnx module into `(apply_fn, params)`; `apply_fn(params, *args, **kwargs)` calls it.

    `params` is a pure dict of the `nnx.Param` arrays; everything else in the module (PRNG streams,
    statistics) stays fixed inside `apply_fn`. To call several methods, use
    `nnx.merge(apply_fn.graphdef, params, apply_fn.rest)`.

    Args:
        method: the method to call, by default `__call__`.

    Raises:
        TypeError: for anything else, such as a Linen module, whose `apply` is already pure.

    >>> import numpy as np
    >>> module = nnx.jit(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))()
    >>> apply_fn, params = from_nnx(module)
    >>> apply_fn(params, np.ones((1, 2), np.float32)).shape
    (1, 3)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: expected an nnx module, got {type(module).__name__}")
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        return getattr(model, method or "__call__")(*args, **kwargs)

    apply_fn.graphdef = graphdef
    apply_fn.rest = rest
    return apply_fn, nnx.to_pure_dict(params)
