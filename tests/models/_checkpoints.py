"""Checkpoint directories with the weights that the goldens were made from."""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from logitjax.models import Decoder, config_from_hf
from logitjax.models._export import checkpoint_tensors
from tests.models._configs import HF_CONFIGS, weight


def tensors(name: str) -> dict[str, np.ndarray]:
    model = nnx.eval_shape(lambda: Decoder(config_from_hf(HF_CONFIGS[name]), rngs=nnx.Rngs(0)))
    zeros = nnx.merge(*_zeros(model))
    return {n: weight(n, values.shape) for n, values in checkpoint_tensors(zeros)}


def _zeros(model):
    graphdef, state = nnx.split(model)
    return graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))


def write_checkpoint(name: str, directory: pathlib.Path, shards: int = 1) -> pathlib.Path:
    """A Hugging Face directory of one of the families, in one file or several."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(HF_CONFIGS[name]))
    values = tensors(name)
    if shards == 1:
        safetensors.numpy.save_file(values, directory / "model.safetensors")
        return directory
    weight_map = {}
    for i in range(shards):
        names = list(values)[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        safetensors.numpy.save_file({n: values[n] for n in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
