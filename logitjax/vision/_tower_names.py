"""Transformer towers and CLIPs: conversion of weight names, and sizes read from the weights."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
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
_RULES: dict[str, list[tuple[str, str]]] = tomllib.loads(
    (resources.files("logitjax.vision") / "names.toml").read_text()
)
# Masks, and position ids.
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|mask_token)$|^pooler\.")


def renamed(weights: Weights, *tables: str) -> dict[str, np.ndarray]:
    """Weights renamed by all rules of some tables of `names.toml`, one after another."""
    rules, named = [rule for table in tables for rule in _RULES[table]], {}
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
    named = renamed(weights, "transformer")
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
    named = renamed(weights, "convnext")
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


def clip_names(weights: Weights) -> dict[str, np.ndarray]:
    """A CLIP checkpoint of OpenAI, open_clip or transformers in the names of `CLIP`."""
    weights = {k: v for k, v in weights.items() if not _NO_CLIP_WEIGHTS.match(k)}
    if any(name.startswith("vision_model.") for name in weights):
        return _from_transformers(weights)
    tables = ("openai", "openai_vit") if "visual.class_embedding" in weights else ("openai",)
    # These two are stored transposed, unlike the layers of torch.
    turned = ("vision.projection.weight", "text.head.weight")
    return {k: v.T if k in turned else v for k, v in renamed(weights, *tables).items()}


def _from_transformers(weights: Weights) -> dict[str, np.ndarray]:
    named = {}
    for side, head in (("vision", "projection"), ("text", "head")):
        tower = transformer_names(below(weights, f"{side}_model."))
        named |= {f"{side}.{name}": value for name, value in tower.items()}
        projection = f"{'visual' if side == 'vision' else side}_projection.weight"
        if projection in weights:
            named[f"{side}.{head}.weight"] = weights[projection]
    return named | {k: v for k, v in weights.items() if k == "logit_scale"}
