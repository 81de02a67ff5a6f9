"""Towers in timm's format: names of their weights, sizes, and preprocessing."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitjax.vision import _tower_names as towers
from logitjax.vision._fastvit import FastViTConfig, fastvit_config, fastvit_names, without_norms
from logitjax.vision._preprocessing import Preprocessing
from logitjax.vision._tower_names import Weights
from logitjax.vision._vit import Pooling, Rotary, ViTConfig

# Families in timm's names that consist of these blocks. The following ones store their weights
# under the same names but use them differently: norms after the branches, other rotations.
_KNOWN = re.compile(r"(deit3?|flexivit|vit|eva|eva02)_")
_OTHERS = re.compile(r"_(rpn|rope|pe_(lang|spatial)|lingbot|sapiens2)(_|$)")
# Number of heads, by width, if they do not have 64 channels.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
_SIXTEEN = re.compile(r"giantopt|base_patch16_gap|pe_core_gigantic")
_GELU_TANH = re.compile(
    r"vit_((base_patch32|giantopt_patch16|so400m_patch16)_siglip|large_patch16_siglip_(gap_)?512)"
)
# Allowed keys of `model_args`; the weights show the rest.
_ARGUMENTS = {
    *("num_heads", "img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "num_classes"),
    *("class_token", "reg_tokens", "no_embed_class", "init_values", "pre_norm", "fc_norm"),
    *("global_pool", "qkv_bias", "dynamic_img_size", "in_chans", "ref_feat_shape"),
    *("layers", "embed_dims", "mlp_ratios"),
}
_POOLING: dict[str, Pooling] = {"token": "class", "avg": "mean", "map": "probe"}


def is_tower(weights: Weights) -> bool:
    """Whether these are the weights of a transformer or a FastViT from timm."""
    return any(
        re.match(r"patch_embed\.(proj|backbone\.0)\.|stages\.0\..*token_mixer", n) for n in weights
    )


def timm_tower(
    weights: Weights, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], ViTConfig | FastViTConfig]:
    """A tower of timm in the names of `ViT` or `FastViT`, and its sizes."""
    if "model_cfg" in settings:
        # As in open_clip, which uses the class head as projection.
        vision = settings["model_cfg"]["vision_cfg"]
        if vision.get("timm_proj"):
            raise ValueError(f"timm_proj: expected none, got {vision['timm_proj']!r}")
        settings = {"architecture": vision.get("timm_model_name")}
        settings["global_pool"] = vision.get("timm_pool") or "token"
    architecture = str(settings.get("architecture", ""))
    arguments = settings.get("model_args") or {}
    if strange := sorted(set(arguments) - _ARGUMENTS):
        raise ValueError(f"model_args: {strange[0]} is not supported")
    pool = arguments.get("global_pool", settings.get("global_pool", "token"))
    if architecture.startswith("fastvit_"):
        named = fastvit_names(weights)
        return named, fastvit_config(named, architecture)
    if not _KNOWN.match(architecture) or _OTHERS.search(architecture):
        raise ValueError(
            "of timm's transformers those called vit, deit, flexivit and eva are supported, with "
            "the config.json that says so"
        )
    if pool not in _POOLING:
        raise ValueError(f"global_pool: expected one of {', '.join(_POOLING)}, got {pool!r}")
    named = _vit_names(weights)
    width = named["patch.weight"].shape[0] if "patch.weight" in named else 0
    heads = 16 if _SIXTEEN.search(architecture) else _HEADS.get(width)
    activation = "silu" if "blocks.0.gate.weight" in named else "gelu"
    if "quickgelu" in architecture:
        activation = "quick_gelu"
    elif _GELU_TANH.match(architecture):
        activation = "gelu_pytorch_tanh"
    dino, core = "dinov3" in architecture, "_pe_core_" in architecture
    # All CLIPs except EVA's have the larger epsilon.
    larger = dino or core or re.search(r"^(?!eva).*_clip_", architecture)
    sizes = {
        "num_attention_heads": arguments.get("num_heads", heads),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5 if larger else 1e-6,
    }
    config = towers.vit_config(named, sizes)
    if dino != (config.positions == "none"):
        raise ValueError(f"pos_embed: expected {'none' if dino else 'a table'}")
    changes: dict[str, Any] = {"pooling": _POOLING[pool], "embed_bias": True}
    if pool == "avg" and "fc_norm.weight" in weights:
        changes["pooling"] = "mean_then_norm"
    if not dino:
        # timm resizes positions when it loads weights for pictures of another size.
        changes["positions"] = "antialias"
    # Rotary angles of both refer to the grid of the original training.
    grid = (arguments.get("ref_feat_shape") or (config.grid if core else 16,) * 2)[0]
    blocks = dataclasses.replace(config.blocks, post_norm="enormous" in architecture)
    if core:
        offset = int(config.class_token)
        changes["rotary"] = Rotary(theta=1e4, reach=grid, offset=offset, start=0, across_first=True)
        probe = dataclasses.replace(blocks, heads=8, hidden=len(named["pool.up.bias"]))
        changes |= {"pooling": "probe_all", "probe": probe}
    elif architecture.startswith("eva02_") and not blocks.post_norm:
        changes["rotary"] = Rotary(theta=1e4, reach=grid, offset=0, start=0)
    if "rotary" in changes:
        _pairs_apart(named, blocks.heads)
    if "stem.0.weight" in named:
        # Kernels are as wide as their strides.
        stem = tuple(named[f"stem.{number}.weight"].shape[-1] for number in (0, 1))
        changes |= {"stem": stem, "patch_size": config.patch_size * math.prod(stem)}
    return named, dataclasses.replace(config, blocks=blocks, **changes)


def _vit_names(weights: Weights) -> dict[str, np.ndarray]:
    named = towers.renamed(without_norms(weights), "timm_vit")
    for leaf in ("weight", "bias"):
        parts = [f"pool.{part}.{leaf}" for part in ("q", "kv")]
        if set(parts) <= set(named):
            named[f"pool.qkv.{leaf}"] = np.concatenate([named.pop(part) for part in parts])
    towers.join_projections(named)
    for name in [n for n in named if re.match(r"blocks\.\d+\.up\.", n)]:
        down = named.get(re.sub(r"up\..*", "down.weight", name))
        # One projection holds both halves of a SwiGLU.
        if down is not None and len(named[name]) == 2 * down.shape[-1]:
            gate, up = np.split(named.pop(name), 2)
            named |= {name.replace(".up.", ".gate."): gate, name: up}
    _tokens(named)
    return named


def _pairs_apart(named: dict[str, np.ndarray], heads: int) -> None:
    """Reorder channels of queries and keys, rotated in neighbouring pairs, into halves of a head.

    Attention is the same for any channel order shared by queries and keys.
    """
    for name in [n for n in named if re.match(r"blocks\.\d+\.qkv\.", n)]:
        q, k, v = np.split(named[name], 3)
        rows = np.arange(len(q)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
        named[name] = np.concatenate([q[rows], k[rows], v])


def _tokens(named: dict[str, np.ndarray]) -> None:
    """Tokens and positions in `ViT`'s form: a position for the class token, none for others."""
    towers.flatten_tokens(named)
    if "positions" not in named:
        return
    table, first = named["positions"], int("class_token" in named)
    more = len(table) - math.isqrt(len(table)) ** 2
    prefix = first + len(named.get("registers", ()))
    if more not in (0, prefix):
        raise ValueError(f"pos_embed: expected a square number of rows, or {prefix} more")
    if more > first:
        named["registers"] = named["registers"] + table[first:prefix]
    if first:
        start = table[:1] if more else np.zeros_like(table[:1])
        table = np.concatenate([start, table[more:]])
    named["positions"] = table if first else table[more:]


def timm_preprocessing(settings: Mapping[str, Any]) -> Preprocessing:
    message = settings.get("pretrained_cfg") or {}
    channels, height, width = message.get("input_size") or (3, 224, 224)
    mode, share = message.get("crop_mode") or "center", message.get("crop_pct") or 0.875
    if channels != 3 or height != width:
        raise ValueError(f"input_size: expected squares in colour, got {message['input_size']}")
    if mode not in ("center", "squash") or (mode == "squash" and share != 1):
        raise ValueError(f"crop_mode: expected center, or squash of all, got {mode!r} of {share}")
    # Rounded as in timm.
    default = Preprocessing(size=height, resize=math.floor(height / share))
    return Preprocessing.of_names(message, default, fit="squash" if mode == "squash" else "crop")
