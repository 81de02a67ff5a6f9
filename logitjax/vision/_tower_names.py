"""Transformer towers and CLIPs: conversion of weight names, and sizes read from the weights."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitjax.vision._convnext import ConvNeXtConfig
from logitjax.vision._vit import (
    Activation,
    BlockConfig,
    Pooling,
    Positions,
    Rotary,
    StagesConfig,
    TowersConfig,
    ViTConfig,
)

Weights = Mapping[str, np.ndarray]

# Prefixes of transformers' wrapper models.
PREFIX = re.compile(r"^(vision_model|vit|dinov2|dinov2_with_registers|resnet|convnext(v2)?)\.")
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
_TRANSFORMER = (
    # CLIP and SigLIP.
    (r"^embeddings\.class_embedding$", "class_token"),
    (r"^embeddings\.patch_embedding\.", "patch."),
    (r"^embeddings\.position_embedding\.weight$", "positions"),
    # The spelling is transformers'.
    (r"^pre_layrnorm\.", "pre_norm."),
    (r"^post_layernorm\.", "norm."),
    (r"^final_layer_norm\.", "norm."),
    (r"^embeddings\.token_embedding\.", "tokens."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".out."),
    (r"\.self_attn\.([qkv])_proj\.", r".\1."),
    (r"^head\.probe$", "pool.probe"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"pool.qkv.\1"),
    (r"^head\.attention\.out_proj\.", "pool.out."),
    (r"^head\.layernorm\.", "pool.norm."),
    (r"^head\.mlp\.", "pool.mlp."),
    (r"^visual_projection\.", "projection."),
    # ViT and DINOv2.
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\.", r".\1."),
    (r"\.attention\.output\.dense\.", ".out."),
    (r"\.intermediate\.dense\.", ".up."),
    (r"\.output\.dense\.", ".down."),
    (r"\.layer_scale(\d)\.lambda1$", r".scale\1"),
    (r"\.mlp\.weights_out\.", ".down."),
    (r"\.mlp\.fc1\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "fc."),
    # DINOv3, without the prefix on the hub.
    (r"^embeddings\.patch_embeddings\.(weight|bias)$", r"patch.\1"),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".\1."),
    (r"\.attention\.o_proj\.", ".out."),
    (r"\.mlp\.(gate|up|down)_proj\.", r".\1."),
)
_CONVNEXT = (
    (r"^embeddings\.patch_embeddings\.", "patch."),
    (r"^embeddings\.layernorm\.", "patch_norm."),
    # DINOv3, without the prefix on the hub.
    (r"^model\.", ""),
    (r"^stages\.0\.downsample_layers\.0\.", "patch."),
    (r"^stages\.0\.downsample_layers\.1\.", "patch_norm."),
    (r"\.downsample_layers\.0\.", ".norm."),
    (r"\.downsample_layers\.1\.", ".reduce."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
    (r"\.layer_norm\.", ".norm."),
    (r"^layer_norm\.", "norm."),
    (r"\.gamma$", ".factor"),
    # timm.
    (r"^stem\.0\.", "patch."),
    (r"^stem\.1\.", "patch_norm."),
    (r"\.downsample\.0\.", ".norm."),
    (r"\.downsample\.1\.", ".reduce."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc1\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "fc."),
    (r"^encoder\.stages\.", "stages."),
    (r"\.downsampling_layer\.0\.", ".norm."),
    (r"\.downsampling_layer\.1\.", ".reduce."),
    (r"\.layers\.", ".blocks."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv1\.", ".up."),
    (r"\.pwconv2\.", ".down."),
    (r"\.layer_scale_parameter$", ".factor"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "fc."),
)
# From transformers' to torchvision's names.
RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d)\.layers\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d)\.convolution\.", lambda match: f".conv{int(match[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda match: f".bn{int(match[1]) + 1}."),
    (r"^classifier\.1\.", "fc."),
)
# Masks, and position ids.
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|mask_token)$|^pooler\.")


def renamed(weights: Weights, rules: Any) -> dict[str, np.ndarray]:
    """Weights renamed by pairs of patterns and replacements, one after another."""
    named = {}
    for name, value in weights.items():
        name = PREFIX.sub("", name)
        if _NO_WEIGHTS.search(name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    return named


def below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    """Weights with a prefix, which is removed."""
    return {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}


def transformer_names(weights: Weights) -> dict[str, np.ndarray]:
    """A tower of CLIP, SigLIP, ViT or DINO in the names of `ViT`, with joined projections."""
    named = renamed(weights, _TRANSFORMER)
    join_projections(named, biased="positions" in named)
    # Joins SwiGLU's halves.
    for name in [n for n in named if ".mlp.weights_in." in n]:
        gate, up = np.split(named.pop(name), 2)
        named[name.replace("mlp.weights_in", "gate")] = gate
        named[name.replace("mlp.weights_in", "up")] = up
    flatten_tokens(named)
    if not len(named.get("registers", "some")):
        del named["registers"]
    return named


def join_projections(named: dict[str, np.ndarray], *, biased: bool = False) -> None:
    """Join queries, keys and values in place; a bias missing in DINOv3 or EVA is 0."""
    for name in [] if biased else [n for n in named if re.search(r"\.(q|k|v|qkv)\.weight$", n)]:
        bias = name.replace(".weight", ".bias")
        first = bias.replace(".qkv.", ".q.")
        if first != bias and first in named:
            # EVA stores the biases of queries and values separately from the joint weights.
            bias = bias.replace(".qkv.", ".k.")
        named.setdefault(bias, np.zeros_like(named.get(first, named[name][:, 0])))
    for name in [n for n in named if re.search(r"\.q\.(weight|bias)$", n)]:
        q, k, v = (re.sub(r"\.q\.", f".{part}.", name) for part in "qkv")
        if k not in named or v not in named:
            raise ValueError(f"weights lack {k if k not in named else v}, which goes with {q}")
        joined = np.concatenate([named.pop(part) for part in (q, k, v)])
        named[re.sub(r"\.q\.", ".qkv.", name)] = joined


def flatten_tokens(named: dict[str, np.ndarray]) -> None:
    """Tokens and tables, possibly `[1, tokens, width]`, as vectors and `[tokens, width]`."""
    for name in ("class_token", "pool.probe"):
        if name in named:
            named[name] = named[name].reshape(-1)
    for name in ("positions", "registers"):
        if name in named:
            named[name] = named[name].reshape(-1, named[name].shape[-1])


def convnext_names(weights: Weights) -> dict[str, np.ndarray]:
    """A ConvNeXt of transformers or timm in the names of `ConvNeXt`."""
    named = renamed(weights, _CONVNEXT)
    for name, value in named.items():
        if ".grn." in name:
            named[name] = value.reshape(-1)
        elif re.search(r"\.(up|down)\.weight$", name):  # 1x1 convolutions in some of timm's
            named[name] = value.reshape(value.shape[:2])
    return named


def count_of(named: Weights, prefix: str) -> int:
    """Count the numbers that follow a prefix, such as those of blocks."""
    result = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in named)
    return len({match[1] for match in result if match})


def _blocks(named: Weights, settings: Mapping[str, Any], default: BlockConfig) -> BlockConfig:
    """Infer sizes from shapes; heads, activation and the norms' epsilon come from the settings."""
    width = named["norm.weight"].shape[0]
    activation = settings.get("hidden_act")
    gated = "blocks.0.gate.weight" in named
    # DINOv2 ignores the value in its file.
    if gated and "positions" in named:
        activation = "silu"
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
        )
    return dataclasses.replace(
        default,
        width=width,
        layers=count_of(named, "blocks"),
        # Heads of 64 channels by default.
        heads=int(settings.get("num_attention_heads") or max(1, width // 64)),
        hidden=named["blocks.0.up.weight"].shape[0],
        activation=_ACTIVATIONS.get(str(activation), default.activation),
        epsilon=float(settings.get("layer_norm_eps") or default.epsilon),
        gated=gated,
        layer_scale="blocks.0.scale1" in named,
        attention_norm="blocks.0.attention_norm.weight" in named,
        mlp_norm="blocks.0.mlp_norm.weight" in named,
    )


# Defaults of the families without settings: activation and epsilon.
_CLIP = BlockConfig(width=1, layers=1, heads=1, hidden=1, activation="quick_gelu", epsilon=1e-5)
_SIGLIP = dataclasses.replace(_CLIP, activation="gelu_tanh", epsilon=1e-6)
_DINO = dataclasses.replace(_CLIP, activation="gelu", epsilon=1e-6)
_DINO3 = dataclasses.replace(_DINO, epsilon=1e-5)
_VIT = dataclasses.replace(_CLIP, activation="gelu", epsilon=1e-12)


def vit_config(named: Weights, settings: Mapping[str, Any]) -> ViTConfig:
    try:
        patch, class_token = named["patch.weight"], "class_token" in named
        pooling: Pooling = "probe" if "pool.probe" in named else "class"
        family = _VIT
        if "blocks.0.scale1" in named:
            family = _DINO if "positions" in named else _DINO3
        elif pooling == "probe":
            family = _SIGLIP
        elif "pre_norm.weight" in named:
            family = _CLIP
        grid, rotary = 0, None
        positions: Positions = "none"
        if family is _DINO3:
            rotary = Rotary(theta=float(settings.get("rope_theta") or 100.0))
        else:
            # Pictures are squares.
            grid = round((len(named["positions"]) - class_token) ** 0.5)
            positions = "fixed"
        if family is _DINO:
            positions = "antialias" if "registers" in named else "bicubic"
        projection = named.get("projection.weight")
        return ViTConfig(
            blocks=_blocks(named, settings, family),
            patch_size=patch.shape[-1],
            grid=grid,
            class_token=class_token,
            registers=len(named.get("registers", ())),
            patch_bias="patch.bias" in named,
            pre_norm="pre_norm.weight" in named,
            pooling=pooling,
            embed_dim=0 if projection is None else len(projection),
            positions=positions,
            rotary=rotary,
        )
    except KeyError as error:
        raise ValueError(f"a vision tower without {error.args[0]!r}") from None


def two_towers(
    vision: Weights,
    text: Weights,
    seen: Mapping[str, Any],
    read: Mapping[str, Any],
    tower: Any = None,
) -> TowersConfig:
    """Sizes of both towers in our names, from their settings; `tower` is a known picture tower."""
    clip = tower is not None or "pre_norm.weight" in vision
    texts = dataclasses.replace(_CLIP, causal=read.get("causal", True)) if clip else _SIGLIP
    try:
        return TowersConfig(
            vision=tower or vit_config(vision, seen),
            text=_blocks(text, read, texts),
            vocab_size=len(text["tokens.weight"]),
            context_length=len(text["positions"]),
            embed_dim=len(text["head.weight"]),
        )
    except KeyError as error:
        raise ValueError(f"a text tower without {error.args[0]!r}") from None


def convnext_config(named: Weights, settings: Mapping[str, Any]) -> ConvNeXtConfig:
    stages, last = range(count_of(named, "stages")), settings.get("layer_norm_eps")
    try:
        return ConvNeXtConfig(
            depths=tuple(count_of(named, f"stages.{s}.blocks") for s in stages),
            widths=tuple(len(named[f"stages.{s}.blocks.0.norm.weight"]) for s in stages),
            patch_size=named["patch.weight"].shape[-1],
            response_norm="stages.0.blocks.0.grn.weight" in named,
            epsilon=1e-5 if settings.get("architecture") == "convnext_xxlarge" else 1e-6,
            last_epsilon=None if last is None else float(last),
        )
    except KeyError as error:
        raise ValueError(f"a ConvNeXt without {error.args[0]!r}") from None


# Keys of open_clip's files that change a network in unsupported ways.
_STRANGE = re.compile(
    r"no_ln_pre|final_ln|pool_type|ls_init|attentional|proj_|(norm|act)_kwargs|embed_cls|eos_id|"
    r"hf_(model|pool|proj)"
)


def clip_config(
    weights: Weights, settings: Mapping[str, Any] | None = None, tower: Any = None
) -> TowersConfig:
    """Sizes by the names of `CLIP`; heads and activation from the settings beside the weights.

    Without settings heads have 64 channels, and the activation is that of OpenAI's models. `tower`
    is the known configuration of a picture tower.
    """
    vision, text = below(weights, "vision."), below(weights, "text.")
    table = None if tower is not None else vision.get("attnpool.positional_embedding")
    try:
        if table is None:
            channels = 64 if tower is not None else len(vision["norm.weight"])
            return two_towers(vision, text, *_clip_settings(channels, settings), tower)
        width = len(vision["conv3.weight"])
        seen, read = _clip_settings(32 * width, settings)
        tower = StagesConfig(
            blocks=tuple(count_of(vision, f"layer{stage}") for stage in (1, 2, 3, 4)),
            width=width,
            heads=seen["num_attention_heads"] or max(1, width // 2),
            grid=round((len(table) - 1) ** 0.5),
            embed_dim=len(vision["attnpool.c_proj.bias"]),
        )
    except KeyError as error:
        raise ValueError(f"not the weights of a CLIP model: {error.args[0]!r} is missing") from None
    return two_towers(vision, text, seen, read, tower)


def _clip_settings(
    channels: int, settings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Heads and activations of both towers in transformers' names; None by default."""
    settings, activation, causal = settings or {}, "quick_gelu", True
    heads: list[int | None] = [None, None]
    if "model_cfg" in settings:  # open_clip
        model = settings["model_cfg"]
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        if strange := [key for key in (*vision, *text) if _STRANGE.match(key)]:
            raise ValueError(f"{strange[0]}: open_clip's option is not supported")
        heads = [channels // vision.get("head_width", 64), text.get("heads")]
        activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
        causal = not text.get("no_causal_mask", False)
    elif "vision_config" in settings:  # transformers leaves out what has its default
        vision, text = settings["vision_config"] or {}, settings.get("text_config") or {}
        heads = [vision.get("num_attention_heads", 12), text.get("num_attention_heads", 8)]
        activation = vision.get("hidden_act", "quick_gelu")
    seen, read = ({"num_attention_heads": n, "hidden_act": activation} for n in heads)
    return seen, read | {"causal": causal}


# Further numbers in OpenAI's archives, and masks.
_NO_CLIP_WEIGHTS = re.compile(
    r"(input_resolution|context_length|vocab_size|attn_mask|logit_bias|.*position_ids)$"
)
_OPENAI = (
    # For models with a separate text module.
    (r"^text\.", ""),
    (r"^visual\.", "vision."),
    (r"^(transformer|ln_final)\.", r"text.\1."),
    (r"^token_embedding\.", "text.tokens."),
    (r"^positional_embedding$", "text.positions"),
    (r"\.ln_(final|post)\.", ".norm."),
    (r"^text_projection$", "text.head.weight"),
    (r"\.transformer\.resblocks\.", ".blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".qkv.\1"),
    (r"\.attn\.out_proj\.", ".out."),
    (r"\.mlp\.c_fc\.", ".up."),
    (r"\.mlp\.c_proj\.", ".down."),
)
# Only for a vision transformer: a ResNet has other layers of these names.
_OPENAI_VIT = (
    (r"^vision\.class_embedding$", "vision.class_token"),
    (r"^vision\.conv1\.", "vision.patch."),
    (r"^vision\.positional_embedding$", "vision.positions"),
    (r"^vision\.ln_pre\.", "vision.pre_norm."),
    (r"^vision\.proj$", "vision.projection.weight"),
)


def clip_names(weights: Weights) -> dict[str, np.ndarray]:
    """A CLIP checkpoint of OpenAI, open_clip or transformers in the names of `CLIP`."""
    weights = {k: v for k, v in weights.items() if not _NO_CLIP_WEIGHTS.match(k)}
    if any(name.startswith("vision_model.") for name in weights):
        return _from_transformers(weights)
    rules = _OPENAI + (_OPENAI_VIT if "visual.class_embedding" in weights else ())
    # These two are stored transposed, unlike the layers of torch.
    turned = ("vision.projection.weight", "text.head.weight")
    return {k: v.T if k in turned else v for k, v in renamed(weights, rules).items()}


def _from_transformers(weights: Weights) -> dict[str, np.ndarray]:
    named = {}
    for side, head in (("vision", "projection"), ("text", "head")):
        tower = transformer_names(below(weights, f"{side}_model."))
        named |= {f"{side}.{name}": value for name, value in tower.items()}
        projection = f"{'visual' if side == 'vision' else side}_projection.weight"
        if projection in weights:
            named[f"{side}.{head}.weight"] = weights[projection]
    return named | {k: v for k, v in weights.items() if k == "logit_scale"}
