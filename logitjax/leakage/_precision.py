"""float64 for the few steps that need it, whatever the caller's setting."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def in_float64(function: Callable[P, R]) -> Callable[P, R]:
    """Runs an eager function with 64-bit types on: a Gram matrix halves the digits it is given."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return run


def widest() -> Any:
    """float64 where it is on, else float32."""
    return jax.numpy.float64 if jax.config.jax_enable_x64 else jax.numpy.float32  # pyright: ignore
