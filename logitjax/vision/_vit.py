"""Vision transformers of several families, and SigLIP's two towers, which share their blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from logitjax.ops import Array
from logitjax.vision._layers import Features, Images, conv, layer_norm

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Pooling = Literal["class", "probe", "probe_all", "mean", "mean_then_norm"]
Positions = Literal["none", "fixed", "bicubic", "antialias"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    # As in OpenAI's CLIP.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A stack of transformer blocks with pre-norm attention and MLP.

    `hidden` are the channels inside the MLP. A `gated` MLP has a second projection of its input, as
    in SwiGLU; a `layer_scale` is a factor for each channel after both halves of a block; in a
    `causal` stack a position sees only earlier ones. EVA-02 has further norms before the last
    projection of attention (`attention_norm`) and MLP (`mlp_norm`); in its largest model the two
    norms of a block come after its halves (`post_norm`).
    """

    width: int
    layers: int
    heads: int
    hidden: int
    activation: Activation = "gelu"
    epsilon: float = 1e-6
    gated: bool = False
    layer_scale: bool = False
    causal: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    post_norm: bool = False

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of {self.width}, got {self.heads}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotation angles for the rows and columns of patches in queries and keys, for any size.

    Patch `n` of `N` along a side is at `start + (n + offset) reach / N`, and wave `m` rotates by
    `theta^(-4 m / width)` times that, `width` being a head's. The first quarter of the channels of
    a head takes the waves of y and the next those of x, or with `across_first` in reverse; the
    other half repeats both. The defaults are DINOv3's.
    """

    theta: float = 100.0
    reach: float = 4 * np.pi
    offset: float = 0.5
    start: float = -2 * np.pi
    across_first: bool = False

    def angles(self, rows: int, columns: int, width: int) -> np.ndarray:
        """Angles of all patches, float32 `[rows * columns, width]`."""
        sides = (
            self.start + (np.arange(n) + self.offset) * self.reach / n for n in (rows, columns)
        )
        points = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2, 1)
        if self.across_first:
            points = points[:, ::-1]
        waves = self.theta ** -(np.arange(width // 4) / (width // 4))
        return np.tile((points * waves).reshape(rows * columns, -1), 2).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A vision transformer.

    Attributes:
        grid: Number of patches of a side with learned positions; 0 for no such table.
        stem: Strides of convolutions before that of the patches, as in MobileCLIP-B; they are
            included in `patch_size`.
        registers: Number of tokens without a position after the class token.
        pre_norm: Whether a norm comes before the blocks, as in CLIP.
        pooling: Source of the features: the class token (`class`), the result of a learned probe
            that attends to all patches (`probe`, as in SigLIP) or to the class token too
            (`probe_all`, as in PE), or the mean of the patches, after the last norm (`mean`) or
            before it (`mean_then_norm`).
        probe: Heads and MLP of the probe; None for those of the blocks.
        embed_dim: Number of features after a last projection; 0 for none.
        embed_bias: Whether this projection has a bias, as in timm.
        positions: Resizing of positions for pictures of another size: `fixed` for none, `bicubic`
            like torch, `antialias` also with a filter as wide as the scale; `none` without a table.
        rotary: Rotation angles of patches, possibly in addition to the table.
    """

    blocks: BlockConfig
    patch_size: int
    grid: int
    stem: tuple[int, ...] = ()
    class_token: bool = True
    registers: int = 0
    patch_bias: bool = True
    pre_norm: bool = False
    pooling: Pooling = "class"
    probe: BlockConfig | None = None
    embed_dim: int = 0
    embed_bias: bool = False
    positions: Positions = "fixed"
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        turns = self.blocks.width // self.blocks.heads
        if self.rotary is not None and turns % 4:
            raise ValueError(f"heads: expected a multiple of 4 channels in each, got {turns}")

    @property
    def image_size(self) -> int:
        """Height and width of the pictures that the positions fit."""
        return self.grid * self.patch_size

    @property
    def num_features(self) -> int:
        return self.embed_dim or self.blocks.width


def _zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def _norm(config: BlockConfig, rngs: nnx.Rngs, width: int = 0) -> nnx.LayerNorm:
    return layer_norm(width or config.width, config.epsilon, rngs)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    angles: np.ndarray | None = None,
    *,
    causal: bool = False,
) -> jax.Array:
    """Multi-head attention; `angles` rotate queries and keys of patches."""

    def split(x: jax.Array, angles: np.ndarray | None = None) -> jax.Array:
        x = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
        return x if angles is None else _turned(x, angles)

    parts = split(q, angles), split(k, angles), split(v)  # [batch, tokens, heads, width]
    return jax.nn.dot_product_attention(*parts, is_causal=causal).reshape(q.shape)


def _turned(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotate the patches, the last tokens of `[batch, tokens, heads, width]`, by these angles."""
    patches = x[:, -len(angles) :].astype(jnp.float32)
    first, second = jnp.split(patches, 2, -1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # over heads
    patches = patches * cos + jnp.concatenate([-second, first], -1) * sin
    # Class token and registers are not rotated.
    return jnp.concatenate([x[:, : -len(angles)], patches.astype(x.dtype)], 1)


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and added to its input."""

    def __init__(self, config: BlockConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, hidden = config.width, config.hidden
        self.norm1, self.norm2 = _norm(config, rngs), _norm(config, rngs)
        self.qkv = nnx.Linear(width, 3 * width, **options)
        self.out = nnx.Linear(width, width, **options)
        self.up = nnx.Linear(width, hidden, **options)
        self.gate: Any = nnx.Linear(width, hidden, **options) if config.gated else None
        self.down = nnx.Linear(hidden, width, **options)
        self.attention_norm: Any = _norm(config, rngs) if config.attention_norm else None
        self.mlp_norm: Any = _norm(config, rngs, hidden) if config.mlp_norm else None
        self.scale1: Any = _zeros(width) if config.layer_scale else None
        self.scale2: Any = _zeros(width) if config.layer_scale else None

    def __call__(self, x: jax.Array, angles: np.ndarray | None = None) -> jax.Array:
        if self.config.post_norm:
            x = x + _normed(self._attention(x, angles), self.norm1)
            return x + _normed(self._mlp(x), self.norm2)
        x = x + _scaled(self._attention(_normed(x, self.norm1), angles), self.scale1)
        return x + _scaled(self._mlp(_normed(x, self.norm2)), self.scale2)

    def _attention(self, x: jax.Array, angles: np.ndarray | None) -> jax.Array:
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        attended = attend(q, k, v, self.config.heads, angles, causal=self.config.causal)
        return self.out(_normed(attended, self.attention_norm))

    def _mlp(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        up = self.up(x)
        inner = activation(up) if self.gate is None else activation(self.gate(x)) * up
        return self.down(_normed(inner, self.mlp_norm))


def _normed(x: jax.Array, norm: Any) -> jax.Array:
    return x if norm is None else norm(x).astype(x.dtype)


def _scaled(x: jax.Array, scale: Any) -> jax.Array:
    return x if scale is None else x * scale[...].astype(x.dtype)


class _Probe(nnx.Module):
    """A learned query that attends to all patches, followed by an MLP."""

    def __init__(self, config: BlockConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.probe = _zeros(config.width)
        self.qkv = nnx.Linear(config.width, 3 * config.width, **options)
        self.out = nnx.Linear(config.width, config.width, **options)
        self.norm = _norm(config, rngs)
        self.up = nnx.Linear(config.width, config.hidden, **options)
        self.down = nnx.Linear(config.hidden, config.width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        # All of `qkv` is applied to both: the query is one of 3 (N + 1) required rows.
        q = jnp.split(self.qkv(probe), 3, -1)[0]
        _, k, v = jnp.split(self.qkv(x), 3, -1)
        x = self.out(attend(q, k, v, self.config.heads))[:, 0]
        inner = ACTIVATIONS[self.config.activation](self.up(self.norm(x).astype(x.dtype)))
        return x + self.down(inner)


class Projected(nnx.Module):
    """A picture tower with a method `hidden` and possibly a linear projection at its end."""

    classifier_name = "fc"
    projection: Any

    def __call__(self, images: Images, *, train: bool = False) -> Features:
        # Nothing here depends on the batch.
        del train
        x = self.hidden(images)
        return x if self.projection is None else self.projection(x)

    @property
    def last_projection(self) -> tuple[jax.Array, jax.Array | None] | None:
        """`[hidden, embed_dim]` and a bias or None; None without a projection."""
        return None if self.projection is None else kernel_and_bias(self.projection)

    def hidden(self, images: Images) -> Features:
        """The features before a projection, float32 `[batch, hidden]`."""
        raise NotImplementedError


class ViT(Projected):
    """A vision transformer: CLIP's, SigLIP's, EVA-CLIP's, PE's and MobileCLIP-B's tower, ViT, DINO.

    Dosovitskiy et al. (arXiv 2010.11929), Oquab et al. (2304.07193), Darcet et al. (2309.16588),
    Zhai et al. (2303.15343), Simeoni et al. (2508.10104), Fang et al. (2303.11331), Bolya et al.
    (2504.13181), Vasu et al. (2311.17049).
    """

    def __init__(self, config: ViTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.num_features = config.num_features
        width = config.blocks.width
        self.stem, last = nnx.List([]), config.patch_size
        inside, options = 3, {"pad": 0, "dtype": dtype, "rngs": rngs}
        for step in config.stem:
            self.stem.append(conv(inside, width // 4, step, stride=step, use_bias=True, **options))
            inside, last = width // 4, last // step
        bias = config.patch_bias
        self.patch = conv(inside, width, last, stride=last, use_bias=bias, **options)
        self.class_token: Any = _zeros(width) if config.class_token else None
        self.registers: Any = _zeros(config.registers, width) if config.registers else None
        tokens = config.grid**2 + config.class_token
        self.positions: Any = _zeros(tokens, width) if config.grid else None
        self.pre_norm: Any = _norm(config.blocks, rngs) if config.pre_norm else None
        self.blocks = nnx.List(
            [Block(config.blocks, dtype=dtype, rngs=rngs) for _ in range(config.blocks.layers)]
        )
        self.norm = _norm(config.blocks, rngs)
        probe = (config.probe or config.blocks) if "probe" in config.pooling else None
        self.pool: Any = _Probe(probe, dtype=dtype, rngs=rngs) if probe else None
        out, bias = config.embed_dim, config.embed_bias
        self.projection = nnx.Linear(width, out, use_bias=bias, rngs=rngs) if out else None

    def hidden(self, images: Images) -> Features:
        config = self.config
        x = jnp.asarray(images, self.dtype)
        for layer in self.stem:
            x = ACTIVATIONS["gelu"](layer(x))
        patches = self.patch(x)
        batch, rows, columns, width = patches.shape
        x = patches.reshape(batch, -1, width)

        def token(values: jax.Array) -> jax.Array:
            return jnp.broadcast_to(values.astype(x.dtype), (batch, len(values), width))

        if self.class_token is not None:
            x = jnp.concatenate([token(self.class_token[...][None]), x], 1)
        angles = config.rotary and config.rotary.angles(rows, columns, width // config.blocks.heads)
        if self.positions is not None:
            x = x + self._positions(rows, columns).astype(x.dtype)
        if self.registers is not None:
            first = int(config.class_token)
            x = jnp.concatenate([x[:, :first], token(self.registers[...]), x[:, first:]], 1)
        if self.pre_norm is not None:
            x = self.pre_norm(x).astype(x.dtype)
        for block in self.blocks:
            x = block(x, angles)
        if config.pooling == "class":
            # The class token comes first.
            return self.norm(x[:, 0])
        if config.pooling != "probe_all":
            x = x[:, config.class_token + config.registers :]
        if config.pooling == "mean_then_norm":
            return self.norm(x.astype(jnp.float32).mean(1))
        normed = self.norm(x)
        if self.pool is None:
            return normed.mean(1)
        return jnp.asarray(self.pool(normed.astype(x.dtype)), jnp.float32)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        grid, table = self.config.grid, self.positions[...]
        if (rows, columns) == (grid, grid):
            return table
        if self.config.positions == "fixed":
            expected = self.config.image_size
            size = (rows * self.config.patch_size, columns * self.config.patch_size)
            raise ValueError(f"images: expected {expected} x {expected} pixels, got {size}")
        antialias = self.config.positions == "antialias"
        # The class token has no place in the picture.
        first, rest = table[: -(grid**2)], table[-(grid**2) :].reshape(grid, grid, -1)
        down, across = (resize_matrix(grid, n, antialias=antialias) for n in (rows, columns))
        rest = jnp.einsum("ig,jh,ghd->ijd", down, across, rest, precision="highest")
        return jnp.concatenate([first, rest.reshape(rows * columns, -1)])


def resize_matrix(source: int, target: int, *, antialias: bool) -> np.ndarray:
    """Weights `[target, source]` of torch's bicubic interpolation along an axis.

    Without `antialias` a = -.75 and the edge is repeated; with it a = -.5, the kernel is as wide as
    the target's step, and only its part inside the picture counts.
    """
    a, step = (-0.5 if antialias else -0.75), source / target
    wide = max(step, 1.0) if antialias else 1.0
    # torch's align_corners=False.
    centre = (np.arange(target) + 0.5) * step - 0.5
    # Two more pixels beyond each edge, filled by repetition.
    places = np.arange(-2, source + 2) if not antialias else np.arange(source)
    x = np.abs(places - centre[:, None]) / wide
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((target, source))
    for location, column in zip(np.clip(places, 0, source - 1), weights.T):
        matrix[:, location] += column
    return matrix.astype(np.float32)


def kernel_and_bias(linear: nnx.Linear) -> tuple[jax.Array, jax.Array | None]:
    return linear.kernel[...], None if linear.bias is None else linear.bias[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """CLIP's ResNet: blocks per stage, channels of the stem, heads of the attention pool."""

    blocks: tuple[int, ...]
    width: int
    heads: int
    # Height and width of the last stage, a 32nd of the picture's.
    grid: int
    embed_dim: int

    def __post_init__(self) -> None:
        if self.heads < 1 or 32 * self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of {32 * self.width}, got {self.heads}")

    @property
    def image_size(self) -> int:
        return 32 * self.grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowersConfig:
    """Sizes of CLIP, or SigLIP of a fixed size; texts and pictures have equally many features.

    `vision` is a `ViTConfig`, a `StagesConfig` or a `FastViTConfig`.
    """

    vision: Any
    text: BlockConfig
    vocab_size: int
    context_length: int
    embed_dim: int


class TextTower(nnx.Module):
    """Features of texts: CLIP's at the end of a text or, with a bias, SigLIP's at the end of the
    row."""

    def __init__(
        self,
        blocks: BlockConfig,
        vocab_size: int,
        context_length: int,
        embed_dim: int,
        *,
        use_bias: bool = True,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.ends, self.dtype = not use_bias, dtype
        self.tokens = nnx.Embed(vocab_size, blocks.width, rngs=rngs)
        self.positions = _zeros(context_length, blocks.width)
        self.blocks = nnx.List(
            [Block(blocks, dtype=dtype, rngs=rngs) for _ in range(blocks.layers)]
        )
        self.norm = _norm(blocks, rngs)
        self.head = nnx.Linear(blocks.width, embed_dim, use_bias=use_bias, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """The input of `head`, float32 `[batch, width]`."""
        x = self.tokens.embedding[...][tokens] + self.positions[...][: tokens.shape[1]]
        x = x if self.dtype is None else x.astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        # CLIP's end token has the largest id, so `argmax` finds it first. SigLIP sees the padding.
        end = jnp.argmax(tokens, -1) if self.ends else jnp.full(len(tokens), x.shape[1] - 1)
        return self.norm(jnp.take_along_axis(x, end[:, None, None], 1)[:, 0])


class SigLIP(nnx.Module):
    """Both towers (arXiv 2303.15343, 2502.14786); called with pictures it is the vision tower."""

    def __init__(self, config: TowersConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.vision = ViT(config.vision, dtype=dtype, rngs=rngs)
        sizes = (config.vocab_size, config.context_length, config.embed_dim)
        self.text = TextTower(config.text, *sizes, dtype=dtype, rngs=rngs)
        self.logit_scale, self.logit_bias = _zeros(1), _zeros(1)

    def __call__(self, images: Images) -> Features:
        return self.vision(images)

    def text_features(
        self, tokens: Int[Array, "batch length"]
    ) -> Float[jax.Array, "batch features"]:
        """Features of texts, float32 `[batch, embed_dim]`, not normalised."""
        tokens = jnp.asarray(tokens)
        if tokens.shape[1] != self.config.context_length:
            raise ValueError(
                f"tokens: expected [batch, {self.config.context_length}], padded, got "
                f"{tokens.shape}"
            )
        return jnp.asarray(self.text(tokens), jnp.float32)
