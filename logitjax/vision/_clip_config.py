"""Sizes of a CLIP model from its weights, renamed from other layouts to ours."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitjax.vision._tower_names import count_of, transformer_names, two_towers
from logitjax.vision._vit import StagesConfig, TowersConfig

Weights = Mapping[str, np.ndarray]


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
    vision, text = (
        {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
        for part in ("vision.", "text.")
    )
    table = None if tower is not None else vision.get("attnpool.positional_embedding")
    try:
        if table is None:
            channels = 64 if tower is not None else len(vision["norm.weight"])
            return two_towers(vision, text, *_settings(channels, settings), tower)
        width = len(vision["conv3.weight"])
        seen, read = _settings(32 * width, settings)
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


def _settings(
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
_NO_WEIGHTS = re.compile(
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
    weights = {k: v for k, v in weights.items() if not _NO_WEIGHTS.match(k)}
    if any(name.startswith("vision_model.") for name in weights):
        return _from_transformers(weights)
    rules = _OPENAI + (_OPENAI_VIT if "visual.class_embedding" in weights else ())
    named = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        # These two are transposed relative to torch's layers.
        turned = name in ("vision.projection.weight", "text.head.weight")
        named[name] = value.T if turned else value
    return named


def _from_transformers(weights: Weights) -> dict[str, np.ndarray]:
    named = {}
    for side, head in (("vision", "projection"), ("text", "head")):
        prefix = f"{side}_model."
        tower = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        named |= {f"{side}.{name}": value for name, value in transformer_names(tower).items()}
        projection = f"{'visual' if side == 'vision' else side}_projection.weight"
        if projection in weights:
            named[f"{side}.{head}.weight"] = weights[projection]
    return named | {k: v for k, v in weights.items() if k == "logit_scale"}
