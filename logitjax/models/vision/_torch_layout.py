"""Weights between our trees and the names torch checkpoints give them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from logitjax.models._torch_checkpoint import read_state_dict
from logitjax.models.vision._classifier import ImageClassifier

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Written by torch for every norm, and no part of the function.
_IGNORED = re.compile(r"(^|\.)num_batches_tracked$")


def torch_names(model: ImageClassifier) -> dict[str, tuple[Any, ...]]:
    """The name each weight has in a torch state dict, and its path in ours.

    Only a linear head has a name there: a dual head's own weights are left out.

    >>> from logitjax.models.vision import create_classifier
    >>> names = torch_names(create_classifier("resnet8", rngs=nnx.Rngs(0)))
    >>> names["layer2.0.downsample.0.weight"]
    ('backbone', 'layer2', 0, 'downsample', 0, 'kernel')
    """
    names = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        if path[0] == "backbone":
            parts = [str(part) for part in path[1:-1]]
        elif len(path) == 2 or (len(path) == 3 and path[1] == "fc"):
            parts = [model.backbone.classifier_name]
        else:
            continue
        names[".".join([*parts, _LEAVES[str(path[-1])]])] = tuple(path)
    return names


def _to_ours(value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def load_torch_weights(
    model: ImageClassifier,
    weights: epath.PathLike | Mapping[str, np.ndarray],
    *,
    strict_head: bool = True,
) -> ImageClassifier:
    """Fill a classifier with the weights of a torch checkpoint, without torch.

    Files in the layout of torchvision (ResNets) and mdistiller (the small-image networks) fit the
    networks of the same names: ``.safetensors``, or ``.pth``/``.pt``/``.tar`` read through an
    allow-list. A checkpoint may hold the weights under ``model`` or ``state_dict`` and may carry
    the ``module.`` prefix of data-parallel training.

    Args:
      model: as :func:`create_classifier` makes it; it is updated in place.
      weights: a file, or the arrays by their torch names.
      strict_head: False keeps the model's own head where the file's has another number of classes.

    Returns:
      The model.

    Raises:
      ValueError: weights are missing, unknown, of another shape, or the file is not safe to read.
    """
    state_dict = dict(weights) if isinstance(weights, Mapping) else read_state_dict(weights)
    state_dict = {k: v for k, v in state_dict.items() if not _IGNORED.search(k)}
    names = torch_names(model)
    if missing := sorted(set(names) - set(state_dict)):
        raise ValueError(f"weights lack {len(missing)} entries, the first is {missing[0]!r}")
    if unknown := sorted(set(state_dict) - set(names)):
        raise ValueError(f"weights hold {len(unknown)} entries more, the first is {unknown[0]!r}")
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    flat = dict(nnx.to_flat_state(state))
    for name, path in names.items():
        value, variable = _to_ours(np.asarray(state_dict[name])), flat[path]
        if value.shape != variable.shape:
            if path[0] == "head" and not strict_head:
                continue
            raise ValueError(
                f"weight {name!r} must have shape {variable.shape} (in our layout), got "
                f"{value.shape}"
            )
        flat[path] = variable.replace(jnp.asarray(value, variable.dtype))
    nnx.update(model, nnx.from_flat_state(flat.items()))
    return model


def to_torch_weights(model: ImageClassifier) -> dict[str, np.ndarray]:
    """A classifier's weights by their torch names, in torch's layout.

    Of a dual head the first head is written, as the classifier's only one.
    """
    flat = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))

    def to_torch(value: np.ndarray) -> np.ndarray:
        if value.ndim == 4:
            return value.transpose(3, 2, 0, 1)
        return value.T if value.ndim == 2 else value

    return {
        name: np.ascontiguousarray(to_torch(np.asarray(jax.device_get(flat[path][...]))))
        for name, path in torch_names(model).items()
    }
