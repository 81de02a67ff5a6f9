"""CLIP: a picture and a text become vectors of one space."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.ops import Array
from logitjax.vision._clip_config import CLIPConfig
from logitjax.vision._layers import batch_norm, conv


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": _quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _param(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)


def _average(x: jax.Array, size: int) -> jax.Array:
    return nnx.avg_pool(x, (size, size), strides=(size, size)) if size > 1 else x


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int, *, causal: bool) -> jax.Array:
    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    out = jax.nn.dot_product_attention(split(q), split(k), split(v), is_causal=causal)
    return out.reshape(q.shape)


class _Attention(nnx.Module):
    def __init__(self, width: int, heads: int, causal: bool, dtype: Any, rngs: nnx.Rngs):
        self.heads, self.causal = heads, causal
        self.in_proj = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.in_proj(x), 3, -1)
        return self.out_proj(_attend(q, k, v, self.heads, causal=self.causal))


class _Mlp(nnx.Module):
    def __init__(self, width: int, activation: str, dtype: Any, rngs: nnx.Rngs):
        self.activation = activation
        self.c_fc = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.c_proj = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(_ACTIVATIONS[self.activation](self.c_fc(x)))


class _Block(nnx.Module):
    def __init__(
        self, width: int, heads: int, activation: str, causal: bool, dtype: Any, rngs: nnx.Rngs
    ):
        self.dtype = dtype
        self.ln_1, self.ln_2 = _norm(width, rngs), _norm(width, rngs)
        self.attn = _Attention(width, heads, causal, dtype, rngs)
        self.mlp = _Mlp(width, activation, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.ln_1(x).astype(x.dtype))
        return x + self.mlp(self.ln_2(x).astype(x.dtype))


class _Transformer(nnx.Module):
    def __init__(self, layers: int, *args: Any, **options: Any):
        self.resblocks = nnx.List([_Block(*args, **options) for _ in range(layers)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nnx.Module):
    """CLIP's ViT: a norm before the blocks, the class token's output projected.

    References:
        Radford et al. (arXiv 2103.00020); names as in OpenAI's code.
    """

    def __init__(self, config: CLIPConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        width, patch = config.vision_width, config.patch_size
        self.dtype = dtype
        self.conv1 = conv(3, width, patch, stride=patch, pad=0, dtype=dtype, rngs=rngs)
        tokens = (config.image_size // patch) ** 2 + 1
        self.class_embedding = _param(rngs, (width,), width**-0.5)
        self.positional_embedding = _param(rngs, (tokens, width), width**-0.5)
        self.ln_pre = _norm(width, rngs)
        self.transformer = _Transformer(
            int(config.vision_layers),  # pyright: ignore[reportArgumentType]
            width,
            config.vision_heads,
            config.activation,
            causal=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_post = _norm(width, rngs)
        self.proj = _param(rngs, (width, config.embed_dim), width**-0.5)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch features"]:
        return self.hidden(images) @ self.proj[...]

    def hidden(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch hidden"]:
        patches = self.conv1(jnp.asarray(images))
        batch, width = len(patches), patches.shape[-1]
        patches = patches.reshape(batch, -1, width)
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, width))
        x = jnp.concatenate([first.astype(patches.dtype), patches], 1)
        x = self.ln_pre(x + self.positional_embedding[...]).astype(patches.dtype)
        return self.ln_post(self.transformer(x)[:, 0])

    @property
    def last_projection(self) -> tuple[jax.Array, None]:
        return self.proj[...], None


class _Bottleneck(nnx.Module):
    """Average pooling instead of strides, so that nothing is skipped."""

    def __init__(self, inside: int, planes: int, stride: int, options: dict[str, Any]):
        self.stride, outside = stride, 4 * planes
        norms = {"rngs": options["rngs"], "dtype": options["dtype"]}
        self.conv1 = conv(inside, planes, 1, **options)
        self.bn1 = batch_norm(planes, **norms)
        self.conv2 = conv(planes, planes, 3, **options)
        self.bn2 = batch_norm(planes, **norms)
        self.conv3 = conv(planes, outside, 1, **options)
        self.bn3 = batch_norm(outside, **norms)
        shortcut = None
        if stride > 1 or inside != outside:
            shortcut = nnx.List([conv(inside, outside, 1, **options), batch_norm(outside, **norms)])
        self.downsample: Any = shortcut

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.bn1(self.conv1(x), use_running_average=True))
        out = nnx.relu(self.bn2(self.conv2(out), use_running_average=True))
        out = self.conv3(_average(out, self.stride))
        out = self.bn3(out, use_running_average=True)
        if self.downsample is not None:
            project, norm = self.downsample
            x = norm(project(_average(x, self.stride)), use_running_average=True)
        return nnx.relu(out + x)


class _AttentionPool(nnx.Module):
    """The mean of all positions asks them; `c_proj` is left to the tower."""

    def __init__(self, tokens: int, width: int, heads: int, out: int, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        self.positional_embedding = _param(rngs, (tokens, width), width**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (
            nnx.Linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3)
        )
        self.c_proj = nnx.Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([x.mean(1, keepdims=True), x], 1)
        x = (x + self.positional_embedding[...]).astype(x.dtype)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        return _attend(q, k, v, self.heads, causal=False)[:, 0]


class ModifiedResNet(nnx.Module):
    """CLIP's ResNet: three convolutions in the stem, pooling before strides, an attention pool.

    Batch statistics are always the running ones: this is for frozen features.

    References:
        Radford et al. (arXiv 2103.00020); names as in OpenAI's code.
    """

    def __init__(self, config: CLIPConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width = config.vision_width
        self.conv1 = conv(3, width // 2, 3, stride=2, **options)
        self.bn1 = batch_norm(width // 2, **options)
        self.conv2 = conv(width // 2, width // 2, 3, **options)
        self.bn2 = batch_norm(width // 2, **options)
        self.conv3 = conv(width // 2, width, 3, **options)
        self.bn3 = batch_norm(width, **options)
        stages, inside = [], width
        blocks: Any = config.vision_layers
        for stage, count in enumerate(blocks):
            planes, stage_blocks = width * 2**stage, []
            for block in range(count):
                stride = 2 if stage and not block else 1
                stage_blocks.append(_Bottleneck(inside, planes, stride, options))
                inside = 4 * planes
            stages.append(nnx.List(stage_blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        tokens = (config.image_size // 32) ** 2 + 1
        self.attnpool = _AttentionPool(
            tokens, inside, config.vision_heads, config.embed_dim, dtype, rngs
        )

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch features"]:
        return self.attnpool.c_proj(self.hidden(images))

    @property
    def last_projection(self) -> tuple[jax.Array, jax.Array]:
        last: Any = self.attnpool.c_proj
        return last.kernel[...], last.bias[...]

    def hidden(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch hidden"]:
        x = jnp.asarray(images)
        for layer, norm in (
            (self.conv1, self.bn1),
            (self.conv2, self.bn2),
            (self.conv3, self.bn3),
        ):
            x = nnx.relu(norm(layer(x), use_running_average=True))
        x = _average(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.attnpool(x)


class CLIP(nnx.Module):
    """Both towers. Called with pictures it is the vision tower.

    Args:
        config: sizes.

    >>> import numpy as np
    >>> config = CLIPConfig(
    ...     embed_dim=8, image_size=8, patch_size=4, vision_layers=1, vision_width=16,
    ...     vision_heads=2, text_width=16, text_heads=2, text_layers=1, context_length=6,
    ...     vocab_size=20,
    ... )
    >>> def both(images, tokens):
    ...     clip = CLIP(config, rngs=nnx.Rngs(0))
    ...     return clip.image_features(images), clip.text_features(tokens)
    >>> tokens = np.array([[18, 3, 19, 0, 0, 0]])
    >>> [features.shape for features in jax.eval_shape(both, np.zeros((2, 8, 8, 3)), tokens)]
    [(2, 8), (1, 8)]

    References:
        Radford et al. (arXiv 2103.00020).
    """

    def __init__(self, config: CLIPConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        tower = VisionTransformer if config.patch_size else ModifiedResNet
        self.config, self.dtype = config, dtype
        self.visual: Any = tower(config, dtype=dtype, rngs=rngs)
        width = config.text_width
        self.token_embedding = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.positional_embedding = _param(rngs, (config.context_length, width), 0.01)
        self.transformer = _Transformer(
            config.text_layers,
            width,
            config.text_heads,
            config.activation,
            causal=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_final = _norm(width, rngs)
        self.text_projection = _param(rngs, (width, config.embed_dim), width**-0.5)
        self.logit_scale = nnx.Param(jnp.log(1 / 0.07))

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch features"]:
        return self.image_features(images)

    def image_features(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch features"]:
        """float32 ``[batch, embed_dim]`` of normalised pictures; not of length one."""
        return jnp.asarray(self.visual(images), jnp.float32)

    def hidden(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[jax.Array, "batch hidden"]:
        """float32 ``[batch, hidden]``, what `last_projection` makes these of."""
        return jnp.asarray(self.visual.hidden(images), jnp.float32)

    @property
    def last_projection(self) -> tuple[jax.Array, jax.Array | None]:
        """``[hidden, embed_dim]`` and, of a ResNet, a bias ``[embed_dim]``."""
        return self.visual.last_projection

    def text_features(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[jax.Array, "batch features"]:
        """float32 ``[batch, embed_dim]`` of texts; not of length one.

        Args:
            tokens: ``[batch, context_length]``; what follows the last token of the vocabulary,
                which ends a text, plays no part.
        """
        tokens = jnp.asarray(tokens)
        x = self.token_embedding.embedding[...][tokens]
        x = x + self.positional_embedding[...][: tokens.shape[1]]
        x = self.transformer(x if self.dtype is None else x.astype(self.dtype))
        # The end has the largest id, so this is its first place.
        end = jnp.argmax(tokens, -1)
        x = jnp.take_along_axis(x, end[:, None, None], 1)[:, 0]
        return self.ln_final(x) @ self.text_projection[...]
