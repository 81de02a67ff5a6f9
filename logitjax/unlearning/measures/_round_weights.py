"""A model's weights with fewer bits: what deployment does to them, and an attack on unlearning."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models import Decoder


def round_weights(model: Decoder, bits: int, *, group: int = 64) -> Decoder:
    """The model with the kernels of its layers rounded; embedding, norms and head stay.

    A small update of the weights may vanish in the rounding, and with it what was unlearned.

    ::

        w' = round(w m / s) s / m,   s = max |w| of a group of inputs,   m = 2^(bits - 1) - 1

    References:
        Zhang et al., Catastrophic failure of LLM unlearning via quantization, 2024 (arXiv
        2410.16454), which finds 21 % of the knowledge before and 83 % after rounding to 4 bits.
    """
    if not 2 <= bits <= 8 or group < 1:
        raise ValueError(f"bits, group: expected 2 to 8 and at least 1, got {bits} and {group}")
    return _rounded(model, bits, group)


@functools.partial(nnx.jit, static_argnums=(1, 2))
def _rounded(model: Decoder, bits: int, group: int) -> Decoder:
    graphdef, state = nnx.split(model)
    levels = 2 ** (bits - 1) - 1

    def one(path: Any, leaf: Any) -> Any:
        names = [str(getattr(key, "key", key)) for key in path]
        if "segments" not in names or "kernel" not in names:
            return leaf
        inputs, outputs = leaf.shape[-2:]
        padded = jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, -inputs % group), (0, 0)])
        blocks = padded.reshape(*leaf.shape[:-2], -1, group, outputs)
        scale = jnp.maximum(jnp.abs(blocks).max(-2, keepdims=True), 1e-30) / levels
        blocks = jnp.round(blocks / scale) * scale
        return blocks.reshape(padded.shape)[..., :inputs, :].astype(leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(one, state))
