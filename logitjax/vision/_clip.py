"""CLIP: vectors of pictures and texts in one space."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.ops import Array
from logitjax.vision import _vit as vit
from logitjax.vision._fastvit import FastViT, FastViTConfig
from logitjax.vision._layers import Features, Images, avg_pool, normed_conv
from logitjax.vision._resnet import Bottleneck, four_stages
from logitjax.vision._vit import StagesConfig, TextTower, TowersConfig, ViT, ViTConfig


class _AttentionPool(nnx.Module):
    """Attention pool with the mean of all positions as query; the tower applies `c_proj`."""

    def __init__(self, tokens: int, width: int, heads: int, out: int, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        start = width**-0.5 * jax.random.normal(rngs.params(), (tokens, width))
        self.positional_embedding = nnx.Param(start)
        self.q_proj, self.k_proj, self.v_proj = (
            nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.c_proj = nnx.Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)  # [batch, 1 + positions, width]
        x = (x + self.positional_embedding[...]).astype(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        return vit.attend(q, k, v, self.heads)[:, 0]


class ModifiedResNet(nnx.Module):
    """CLIP's ResNet: three convolutions in the stem, pooling before strides, an attention pool.

    Radford et al. (arXiv 2103.00020), with names as in OpenAI's code. Batch norms always use the
    running statistics, because this is for frozen features.
    """

    def __init__(self, config: StagesConfig, *, dtype: Any, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = config.width
        self.conv1, self.bn1 = normed_conv(3, width // 2, 3, options, stride=2)
        self.conv2, self.bn2 = normed_conv(width // 2, width // 2, 3, options)
        self.conv3, self.bn3 = normed_conv(width // 2, width, 3, options)
        block, norms = functools.partial(Bottleneck, pooled=True), options | {"axis_name": None}
        self.layer1, self.layer2, self.layer3, self.layer4 = four_stages(
            width, 4 * width, config.blocks, norms, block
        )
        # Tokens are the positions and their mean.
        sizes = config.grid**2 + 1, 32 * width, config.heads, config.embed_dim
        self.attnpool = _AttentionPool(*sizes, dtype, rngs)

    def __call__(self, images: Images) -> Features:
        return self.attnpool.c_proj(self.hidden(images))

    @property
    def last_projection(self) -> tuple[jax.Array, jax.Array | None]:
        return vit.kernel_and_bias(self.attnpool.c_proj)

    def hidden(self, images: Images) -> Features:
        x = jnp.asarray(images)
        for layer, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = nnx.relu(norm(layer(x), use_running_average=True))
        x = avg_pool(x, 2)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x)
        return self.attnpool(x)


_NETWORKS = {ViTConfig: ViT, StagesConfig: ModifiedResNet, FastViTConfig: FastViT}


def network_of(config: Any) -> Any:
    """The class of the picture tower with this configuration."""
    return _NETWORKS[type(config)]


class CLIP(nnx.Module):
    """Both towers (arXiv 2103.00020); called with pictures it is the vision tower."""

    def __init__(self, config: TowersConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.vision: Any = network_of(config.vision)(config.vision, dtype=dtype, rngs=rngs)
        sizes = (config.vocab_size, config.context_length, config.embed_dim)
        self.text = TextTower(config.text, *sizes, use_bias=False, dtype=dtype, rngs=rngs)
        # Initial value in CLIP's training.
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))

    def __call__(self, images: Images) -> Features:
        """Features of preprocessed pictures, float32 ``[batch, embed_dim]``, not normalised."""
        return jnp.asarray(self.vision(images), jnp.float32)

    def hidden(self, images: Images) -> Float[jax.Array, "batch hidden"]:
        """The input of `last_projection`, float32 ``[batch, hidden]``."""
        return jnp.asarray(self.vision.hidden(images), jnp.float32)

    @property
    def last_projection(self) -> tuple[jax.Array, jax.Array | None]:
        """``[hidden, embed_dim]`` and, for a ResNet, a bias ``[embed_dim]``."""
        return self.vision.last_projection

    def text_features(self, tokens: Int[Array, "batch length"]) -> Features:
        """Features of texts up to their end, float32 `[batch, embed_dim]`, not normalised."""
        return jnp.asarray(self.text(jnp.asarray(tokens)), jnp.float32)
