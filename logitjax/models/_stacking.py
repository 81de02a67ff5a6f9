"""Layers of a segment, stacked or listed, and modules that share their arrays."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models._config import SegmentSpec


def stack_layers(layers: Sequence[Any], spec: SegmentSpec) -> list[Any]:
    """Layers grouped into one member per pattern entry, stacked over the repeats."""
    period = len(spec.pattern)
    return _stacked([list(layers[j::period]) for j in range(period)])


def list_layers(stacked: Sequence[Any], spec: SegmentSpec) -> list[Any]:
    return _listed(list(stacked[: len(spec.pattern)]), spec.repeats)


# One program for all arrays: separately, each would be two.
@jax.jit
def _stacked(members: list[list[Any]]) -> list[Any]:
    return [jax.tree.map(lambda *x: jnp.stack(x), *layers) for layers in members]


@functools.partial(jax.jit, static_argnums=1)
def _listed(members: list[Any], repeats: int) -> list[Any]:
    return [jax.tree.map(lambda x, r=r: x[r], one) for r in range(repeats) for one in members]


def convert(members: Sequence[Any], spec: SegmentSpec, layout: str) -> list[Any]:
    """The members of a segment in the other layout."""
    period = len(spec.pattern)
    expected = spec.num_layers if layout == "stacked" else period
    if len(members) != expected:
        raise ValueError(
            f"segment has {len(members)} members, expected {expected} to make {layout}"
        )
    return stack_layers(members, spec) if layout == "stacked" else list_layers(members, spec)


def twin(module: Any) -> Any:
    """Another module with the same arrays; assigning to one does not change the other."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, nnx.to_pure_dict(state))
