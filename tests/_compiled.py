"""Functions under test as one program each: every operation alone would be one as well."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under one `jax.jit`: arrays are traced, everything else is static.

    Errors about values that are not arrays stay what they are. Made once per function, so that
    tests share its programs; not for what reads a setting that a test changes.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def run(plain, arrays):
        tree, static = plain
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in static]
        args, options = jax.tree.unflatten(tree, leaves)
        return function(*args, **options)

    @functools.wraps(function)
    def call(*args, **options):
        leaves, tree = jax.tree.flatten((args, options))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        static = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
        return run((tree, static), arrays)

    return call


@functools.cache
def values_and_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The value of `function` and the gradient of its sum in the first argument, in one program."""

    def run(first, *others, **options):
        def total(first):
            values = function(first, *others, **options)
            return values.sum(), values

        gradient, values = jax.grad(total, has_aux=True)(first)
        return values, gradient

    return compiled(run)


_ARRAY = object()


def _is_array(leaf) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)
