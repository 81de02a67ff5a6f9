"""FastViT, MobileCLIP's picture tower, with multi-branch convolutions merged when loaded."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.vision._layers import DepthwiseConv, Features, Images, conv, global_mean, layer_norm
from logitjax.vision._tower_names import Weights, count_of, renamed
from logitjax.vision._vit import ACTIVATIONS, Projected, attend

_gelu = ACTIVATIONS["gelu"]
# Channels of an attention head.
_HEAD = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastViTConfig:
    """Channels and blocks of the stages, their optional parts, and the last projection.

    Attributes:
        shrinks: Channels of squeeze and excitation before a stage; 0 for none.
        attention: Whether a stage has attention and positions instead of convolutions.
        hidden: Channels inside the MLP.
        layer_norm: Whether attention comes after a layer norm, as in MobileCLIP2-S3 and S4; batch
            norms are folded into the following projection.
        activated: Whether a stage starts with an additional GELU, as in MobileCLIP.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    hidden: tuple[int, ...]
    shrinks: tuple[int, ...]
    attention: tuple[bool, ...]
    squeezed: int
    num_features: int
    layer_norm: bool = False
    activated: bool = True
    embed_dim: int = 0
    image_size: int = 256


class _Excite(nnx.Module):
    """Squeeze and excitation: every channel times a factor computed from all means."""

    def __init__(self, width: int, inner: int, **options: Any):
        self.fc1 = nnx.Linear(width, inner, **options)
        self.fc2 = nnx.Linear(inner, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        means = global_mean(x).astype(x.dtype)[:, None, None]
        return x * jax.nn.sigmoid(self.fc2(nnx.relu(self.fc1(means))))


class _Block(nnx.Module):
    """Attention or a convolution that mixes positions, then a wide one and an MLP."""

    def __init__(self, width: int, hidden: int, attention: bool, norm: bool, **options: Any):
        self.attention = attention
        if attention:
            self.norm: Any = layer_norm(width, 1e-5, options["rngs"]) if norm else None
            self.qkv = nnx.Linear(width, 3 * width, **options)
            self.out = nnx.Linear(width, width, **options)
        else:
            self.mixer = DepthwiseConv(width, use_bias=True, **options)
        self.conv = DepthwiseConv(width, kernel=7, use_bias=True, **options)
        self.up = nnx.Linear(width, hidden, **options)
        self.down = nnx.Linear(hidden, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.attention:
            tokens = x.reshape(len(x), -1, x.shape[-1])
            normed = tokens if self.norm is None else self.norm(tokens).astype(x.dtype)
            q, k, v = jnp.split(self.qkv(normed), 3, -1)
            x = x + self.out(attend(q, k, v, x.shape[-1] // _HEAD)).reshape(x.shape)
        else:
            x = self.mixer(x)
        return x + self.down(_gelu(self.up(self.conv(x))))


class _Stage(nnx.Module):
    def __init__(self, config: FastViTConfig, number: int, **options: Any):
        width, attention = config.widths[number], config.attention[number]
        self.activated = config.activated
        wide: dict[str, Any] = {"kernel": 7, "use_bias": True, **options}
        # The stem downsamples for the first stage.
        self.large: Any = DepthwiseConv(width, stride=2, **wide) if number else None
        self.mix: Any = nnx.Linear(width, width, **options) if number else None
        shrink = config.shrinks[number]
        self.se: Any = _Excite(width, shrink, **options) if shrink else None
        self.positions: Any = DepthwiseConv(width, **wide) if attention else None
        sizes = width, config.hidden[number], attention, config.layer_norm
        self.blocks = nnx.List([_Block(*sizes, **options) for _ in range(config.depths[number])])

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.large is not None:
            x = self.large(x)
            x = x if self.se is None else self.se(x)
            x = _gelu(self.mix(_gelu(x) if self.activated else x))
        x = x if self.positions is None else self.positions(x)
        for block in self.blocks:
            x = block(x)
        return x


class FastViT(Projected):
    """FastViT and the towers of MobileCLIP-S0 to S4 (arXiv 2303.14189, 2311.17049, 2508.20691)."""

    def __init__(self, config: FastViTConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, last = config.widths[0], config.num_features
        self.num_features = config.embed_dim or last
        self.stem = nnx.List(
            [
                conv(3, width, 3, stride=2, use_bias=True, **options),
                DepthwiseConv(width, stride=2, use_bias=True, **options),
                nnx.Linear(width, width, **options),
            ]
        )
        stages = range(len(config.widths))
        self.stages = nnx.List([_Stage(config, number, **options) for number in stages])
        self.final = DepthwiseConv(last, use_bias=True, **options)
        self.se = _Excite(last, config.squeezed, **options)
        out = config.embed_dim
        self.projection = nnx.Linear(last, out, rngs=rngs) if out else None

    def hidden(self, images: Images) -> Features:
        x = jnp.asarray(images, self.dtype)
        for layer in self.stem:
            x = _gelu(layer(x))
        for stage in self.stages:
            x = stage(x)
        return global_mean(_gelu(self.se(self.final(x))))


_BRANCHES = re.compile(
    r"(.*)\.(?:conv_kxk\.\d+|conv_scale|large_conv|small_conv|identity)\.(weight|bias)$"
)
_LINEAR = re.compile(r"(\.|^)(up|down|mix|stem\.2|se\.fc\d)\.weight$")
# Factors of channels, and the projection into which they are folded.
_SCALES = (("layer_scale", "mlp.fc2"), ("layer_scale_1", "token_mixer.proj"))
_SCALES += (("layer_scale_2", "mlp.fc2"),)


def _ending(weights: Weights, suffix: str) -> list[str]:
    """Names with this suffix, which is removed."""
    return [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]


def affine(weights: dict[str, np.ndarray], norm: str) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of a batch norm, which is removed from the weights."""
    scale, bias, mean, var = (
        weights.pop(f"{norm}.{leaf}") for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(var + 1e-5)
    return factor, bias - mean * factor


def without_norms(weights: Weights) -> dict[str, np.ndarray]:
    """Weights with each pair of a convolution and a batch norm as a convolution with a bias."""
    folded = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    for part in _ending(folded, ".bn.running_var"):
        factor, folded[f"{part}.bias"] = affine(folded, f"{part}.bn")
        folded[f"{part}.weight"] = folded.pop(f"{part}.conv.weight") * factor[:, None, None, None]
    return folded


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    """The sum of centred kernels `[out, in, size, size]` of different sizes, or of biases."""
    if parts[0].ndim == 1:
        return np.sum(parts, 0)
    size = max(part.shape[-1] for part in parts)
    sides = [(size - part.shape[-1]) // 2 for part in parts]
    padded = [np.pad(p, [(0, 0), (0, 0), (n, n), (n, n)]) for n, p in zip(sides, parts)]
    return np.sum(padded, axis=0)


def _beside_itself(kernel: np.ndarray) -> np.ndarray:
    """A filter of each channel plus the identity."""
    kernel = kernel.copy()
    kernel[:, 0, kernel.shape[2] // 2, kernel.shape[3] // 2] += 1
    return kernel


def fastvit_names(weights: Weights) -> dict[str, np.ndarray]:
    """timm's FastViT in the names of `FastViT`: branches, norms and scales folded into kernels."""
    folded = without_norms(weights)
    for block in _ending(folded, ".identity.running_var"):
        factor, folded[f"{block}.identity.bias"] = affine(folded, f"{block}.identity")
        beside = folded.get(f"{block}.conv_kxk.0.weight")
        dense = beside is not None and beside.shape[1] > 1
        kernel = np.diag(factor) if dense else factor[:, None]
        folded[f"{block}.identity.weight"] = kernel[..., None, None]
    branches: dict[str, list[np.ndarray]] = {}
    for name in list(folded):
        if match := _BRANCHES.match(name):
            branches.setdefault(f"{match[1]}.{match[2]}", []).append(folded.pop(name))
    folded |= {name: _sum(parts) for name, parts in branches.items()}
    for block in _ending(folded, ".token_mixer.layer_scale.gamma"):
        mixer = f"{block}.token_mixer"
        scale = folded.pop(f"{mixer}.layer_scale.gamma").reshape(-1)
        for leaf in ("weight", "bias"):
            value = _sum([folded.pop(f"{mixer}.mixer.{leaf}"), -folded.pop(f"{mixer}.norm.{leaf}")])
            folded[f"{mixer}.{leaf}"] = value * scale.reshape(-1, *[1] * (value.ndim - 1))
        folded[f"{mixer}.weight"] = _beside_itself(folded[f"{mixer}.weight"])
    for part in _ending(folded, ".pos_enc.weight"):
        folded[f"{part}.pos_enc.weight"] = _beside_itself(folded[f"{part}.pos_enc.weight"])
    for block in _ending(folded, (last := ".token_mixer.qkv.weight")):
        name = block + last
        kernel = folded[name]
        offset = np.zeros(kernel.shape[1], kernel.dtype)
        if f"{block}.norm.running_var" in folded:
            factor, offset = affine(folded, f"{block}.norm")
            folded[name] = kernel * factor
        folded[f"{block}.token_mixer.qkv.bias"] = kernel @ offset
    for scale, layer in _SCALES:
        for block in _ending(folded, f".{scale}.gamma"):
            gamma = folded.pop(f"{block}.{scale}.gamma").reshape(-1)
            for name in (f"{block}.{layer}.{leaf}" for leaf in ("weight", "bias")):
                folded[name] = (folded[name].T * gamma).T
    named = renamed(folded, "fastvit")
    return {k: v.reshape(v.shape[:2]) if _LINEAR.search(k) else v for k, v in named.items()}


def fastvit_config(named: Weights, architecture: str) -> FastViTConfig:
    stages = [f"stages.{number}." for number in range(count_of(named, "stages"))]
    try:
        return FastViTConfig(
            widths=tuple(named[f"{stage}blocks.0.down.weight"].shape[0] for stage in stages),
            depths=tuple(count_of(named, f"{stage}blocks") for stage in stages),
            hidden=tuple(named[f"{stage}blocks.0.down.weight"].shape[1] for stage in stages),
            shrinks=tuple(len(named.get(f"{stage}se.fc1.bias", ())) for stage in stages),
            attention=tuple(f"{stage}blocks.0.qkv.weight" in named for stage in stages),
            squeezed=len(named["se.fc1.bias"]),
            num_features=len(named["final.bias"]),
            layer_norm=any(name.endswith("blocks.0.norm.weight") for name in named),
            activated="_mci" in architecture,
        )
    except KeyError as error:
        raise ValueError(f"a FastViT without {error.args[0]!r}") from None
