"""Vision transformers as timm saves them: names of their weights, sizes, and their pictures."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitjax.vision._preprocessing import Preprocessing
from logitjax.vision._tower_names import Weights, flatten_tokens, renamed, vit_config
from logitjax.vision._vit import Pooling, ViTConfig

_NAMES = (
    (r"^patch_embed\.proj\.", "patch."),
    (r"^cls_token$", "class_token"),
    (r"^reg_token$", "registers"),
    (r"^pos_embed$", "positions"),
    (r"^norm_pre\.", "pre_norm."),
    (r"^fc_norm\.", "norm."),
    (r"^head\.", "fc."),
    (r"\.attn\.qkv\.", ".qkv."),
    (r"\.attn\.proj\.", ".out."),
    (r"\.(ls(?=\d\.gamma)|gamma_(?=\d$))(\d)(\.gamma)?$", r".scale\2"),
    (r"\.mlp\.fc1_g\.", ".gate."),
    (r"\.mlp\.fc1(_x)?\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"^attn_pool\.latent$", "pool.probe"),
    (r"^attn_pool\.proj\.", "pool.out."),
    (r"^attn_pool\.", "pool."),
)
# Families of its names that are made of the blocks we have. Those that follow keep their weights by
# the same names and do something else with them: norms after the branches, other rotations.
_KNOWN = re.compile(r"(deit3?|flexivit|vit)_")
_OTHERS = re.compile(r"_(rpn|rope|pe|lingbot|sapiens2)(_|$)")
# Heads that are not of 64 channels, by the width.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
_GELU_TANH = re.compile(
    r"vit_((base_patch32|giantopt_patch16|so400m_patch16)_siglip|large_patch16_siglip_(gap_)?512)"
)
# What `model_args` may say: of these, the rest shows in the weights.
_ARGUMENTS = {
    *("num_heads", "img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "num_classes"),
    *("class_token", "reg_tokens", "no_embed_class", "init_values", "pre_norm", "fc_norm"),
    *("global_pool", "qkv_bias", "dynamic_img_size", "in_chans"),
}
_POOLING: dict[str, Pooling] = {"token": "class", "avg": "mean", "map": "probe"}


def timm_vit(
    weights: Weights, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], ViTConfig]:
    """A vision transformer of timm in the names of `ViT`, and its sizes."""
    architecture = str(settings.get("architecture", ""))
    if not _KNOWN.match(architecture) or _OTHERS.search(architecture):
        raise ValueError(
            "of timm's transformers those called vit, deit and flexivit are supported, with the "
            "config.json that says so"
        )
    arguments = settings.get("model_args") or {}
    if strange := sorted(set(arguments) - _ARGUMENTS):
        raise ValueError(f"model_args: {strange[0]} is not supported")
    named = renamed(weights, _NAMES)
    for leaf in ("weight", "bias"):
        parts = [f"pool.{part}.{leaf}" for part in ("q", "kv")]
        if set(parts) <= set(named):
            named[f"pool.qkv.{leaf}"] = np.concatenate([named.pop(part) for part in parts])
    for name in [n for n in named if n.endswith(".qkv.weight")]:
        named.setdefault(name.replace("weight", "bias"), np.zeros_like(named[name][:, 0]))
    for name in [n for n in named if re.match(r"blocks\.\d+\.up\.", n)]:
        down = named.get(re.sub(r"up\..*", "down.weight", name))
        # One projection for both halves of a SwiGLU.
        if down is not None and len(named[name]) == 2 * down.shape[-1]:
            gate, up = np.split(named.pop(name), 2)
            named |= {name.replace(".up.", ".gate."): gate, name: up}
    _tokens(named)
    width = named["patch.weight"].shape[0] if "patch.weight" in named else 0
    heads = 16 if re.search(r"giantopt|base_patch16_gap", architecture) else _HEADS.get(width)
    activation = "silu" if "blocks.0.gate.weight" in named else "gelu"
    if "quickgelu" in architecture:
        activation = "quick_gelu"
    elif _GELU_TANH.match(architecture):
        activation = "gelu_pytorch_tanh"
    rotary = "dinov3" in architecture
    config = vit_config(
        named,
        {
            "num_attention_heads": arguments.get("num_heads", heads),
            "hidden_act": activation,
            "layer_norm_eps": 1e-5 if rotary or "_clip_" in architecture else 1e-6,
        },
    )
    message = arguments.get("global_pool", settings.get("global_pool", "token"))
    if message not in _POOLING:
        raise ValueError(f"global_pool: expected one of {', '.join(_POOLING)}, got {message!r}")
    if rotary != (config.positions == "rotary"):
        raise ValueError(f"pos_embed: expected {'none' if rotary else 'a table'}")
    pooling = _POOLING[message]
    if pooling == "mean" and "fc_norm.weight" in weights:
        pooling = "mean_then_norm"
    # timm resizes positions where weights are loaded for pictures of another size.
    positions = "rotary" if rotary else "antialias"
    return named, dataclasses.replace(config, pooling=pooling, positions=positions)


def _tokens(named: dict[str, np.ndarray]) -> None:
    """Tokens and positions as `ViT` has them: a position for the class token, none for others."""
    flatten_tokens(named)
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
    # As timm rounds.
    default = Preprocessing(size=height, resize=math.floor(height / share))
    return Preprocessing.of_names(message, default, fit="squash" if mode == "squash" else "crop")
