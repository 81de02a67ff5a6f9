"""Anybody's model as a pure function and its parameters."""

from collections.abc import Callable
from typing import Any

from flax import linen, nnx


def from_nnx(module: Any, *, method: str | None = None) -> tuple[Callable, dict]:
    """Turn an nnx module into `(apply_fn, params)`.

    `params` is a pure dict of the `nnx.Param` arrays; everything else the module holds (PRNG
    streams, statistics) stays fixed inside `apply_fn`. To call several methods, write
    `nnx.merge(apply_fn.graphdef, params, apply_fn.rest)` yourself.

    Args:
        module: any nnx module.
        method: the method to call; `__call__` when omitted.

    Returns:
        `apply_fn(params, *args, **kwargs)` and the parameters.

    Raises:
        TypeError: for something else, such as a Linen module.

    >>> import numpy as np
    >>> module = nnx.jit(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))()
    >>> apply_fn, params = from_nnx(module)
    >>> apply_fn(params, np.ones((1, 2), np.float32)).shape
    (1, 3)
    """
    if not isinstance(module, nnx.Module):
        hint = (
            "; from_linen(module, variables) takes it" if isinstance(module, linen.Module) else ""
        )
        raise TypeError(f"module: expected an nnx module, got {_described(module)}{hint}")
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def apply_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        model = nnx.merge(graphdef, params, rest)
        return getattr(model, method or "__call__")(*args, **kwargs)

    apply_fn.graphdef = graphdef
    apply_fn.rest = rest
    return apply_fn, nnx.to_pure_dict(params)


def from_linen(
    module: Any, variables: Any, *, method: Any = None, mutable: Any = False
) -> tuple[Callable, Any]:
    """Turn a Linen module and its variables into `(apply_fn, params)`.

    Collections other than `params` (batch statistics and the like) stay fixed inside
    `apply_fn`; with `mutable` it returns `(output, updates)` as `module.apply` does.

    Args:
        module: a `flax.linen` module.
        variables: what `module.init` returned.
        method: the method to apply; `__call__` when omitted.
        mutable: as for `module.apply`.

    Returns:
        `apply_fn(params, *args, rngs=None, **kwargs)` and the parameters.

    Raises:
        TypeError: for something else, such as an nnx module.
        ValueError: where `variables` has no `params` collection.

    >>> import jax, numpy as np
    >>> from flax import linen
    >>> module, x = linen.Dense(3), np.ones((1, 2), np.float32)
    >>> variables = jax.jit(module.init)(jax.random.key(0), x)
    >>> apply_fn, params = from_linen(module, variables)
    >>> jax.jit(apply_fn)(params, x).shape
    (1, 3)
    """
    if not isinstance(module, linen.Module):
        hint = "; from_nnx(module) takes it" if isinstance(module, nnx.Module) else ""
        raise TypeError(f"module: expected a Linen module, got {_described(module)}{hint}")
    if "params" not in variables:
        raise ValueError(
            f"variables: expected a 'params' collection, got {sorted(variables)}; "
            "hand in what module.init returned"
        )
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply_fn(params: Any, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        return module.apply(
            {"params": params, **rest}, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
        )

    return apply_fn, variables["params"]


def _described(module: Any) -> str:
    kind = "Linen" if isinstance(module, linen.Module) else "nnx"
    known = isinstance(module, linen.Module | nnx.Module)
    return f"the {kind} module {type(module).__name__}" if known else type(module).__name__
