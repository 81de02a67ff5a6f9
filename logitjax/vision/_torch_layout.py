"""Conversion of weights between our trees and the names of torch checkpoints."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes of torch's kernels in our layout, and the reverse.
_HWIO, _OIHW = (2, 3, 1, 0), (3, 2, 0, 1)
# Written by torch for every norm, but not part of the function.
_IGNORED = re.compile(r"(^|\.)num_batches_tracked$")


def torch_names(model: Any) -> dict[str, tuple[Any, ...]]:
    """A classifier's weights by their names in a torch state dict, as paths; linear heads only."""
    names = {}
    for path in weight_paths(model):
        if path[0] == "backbone":
            parts = path[1:]
        elif len(path) == 2 or (len(path) == 3 and path[1] == "fc"):
            parts = (model.backbone.classifier_name, path[-1])
        else:
            continue
        names[torch_name(parts)] = path
    return names


def weight_paths(model: nnx.Module) -> list[tuple[Any, ...]]:
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return [tuple(path) for path, _ in nnx.to_flat_state(state)]


def torch_name(path: tuple[Any, ...]) -> str:
    """Return torch's name of the weight at a path of a module with torch's names."""
    return ".".join([*map(str, path[:-1]), _LEAVES.get(str(path[-1]), str(path[-1]))])


def _turned(value: np.ndarray, leaf: str, axes: tuple[int, ...]) -> np.ndarray:
    # Tables and vectors have the same layout on both sides.
    if leaf != "kernel":
        return value
    return value.transpose(axes) if value.ndim == 4 else value.T


def fill_weights(
    model: nnx.Module, weights: Mapping[str, np.ndarray], names: Mapping[str, tuple[Any, ...]]
) -> None:
    """Assign torch's arrays, converted to our layout, by ``names``; all of them must fit."""
    weights = {k: v for k, v in weights.items() if not _IGNORED.search(k)}
    if missing := sorted(set(names) - set(weights)):
        raise ValueError(f"weights lack {len(missing)} entries, the first is {missing[0]!r}")
    if unknown := sorted(set(weights) - set(names)):
        raise ValueError(f"weights have {len(unknown)} unknown entries, such as {unknown[0]!r}")
    flat = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    for name, path in names.items():
        value, variable = _turned(np.asarray(weights[name]), str(path[-1]), _HWIO), flat[path]
        if value.shape != variable.shape:
            raise ValueError(
                f"weight {name!r}: expected shape {variable.shape} (in our layout), got "
                f"{value.shape}"
            )
        flat[path] = variable.replace(jnp.asarray(value.astype(variable.dtype), variable.dtype))
    nnx.update(model, nnx.from_flat_state(flat.items()))


def blank(model: Any, names: Mapping[str, tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """Zeros in torch's shapes for a model's weights, whose leaves may be only shapes."""
    flat = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    zeros = {name: np.zeros(flat[path].shape, np.float32) for name, path in names.items()}
    return {name: _turned(value, str(names[name][-1]), _OIHW) for name, value in zeros.items()}
