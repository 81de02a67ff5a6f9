"""Sizes of a CLIP model, read off its weights, and the names of its weights in other layouts."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of both towers.

    Attributes:
        embed_dim: length of image and text features.
        image_size: height and width of pictures.
        vision_layers: blocks of a transformer, or of the four stages of a ResNet.
        vision_width: channels of the transformer, or of the ResNet's stem.
        vision_heads: number of heads of the transformer, or of the ResNet's attention pool.
        patch_size: patch size of the transformer; 0 for a ResNet.
        text_width: channels of the text tower.
        text_heads: number of heads of its attention.
        text_layers: its blocks.
        context_length: tokens of a text.
        vocab_size: vocabulary size of the tokenizer; its last token ends a text.
        activation: ``quick_gelu`` in all models of OpenAI.
    """

    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    vision_heads: int
    patch_size: int = 0
    text_width: int
    text_heads: int
    text_layers: int
    context_length: int = 77
    vocab_size: int = 49408
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        for name, width, heads in (
            ("vision_heads", self.vision_channels, self.vision_heads),
            ("text_heads", self.text_width, self.text_heads),
        ):
            if heads < 1 or width % heads:
                raise ValueError(f"{name}: expected a divisor of {width}, got {heads}")

    @property
    def vision_channels(self) -> int:
        """Channels that the vision tower's attention sees."""
        return self.vision_width if self.patch_size else 32 * self.vision_width


def _count(names: Any, prefix: str) -> int:
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names]
    return len({match[1] for match in found if match})


def clip_config(weights: Weights, settings: Mapping[str, Any] | None = None) -> CLIPConfig:
    """The sizes of a checkpoint in OpenAI's names."""
    try:
        return _config(weights, dict(settings or {}))
    except KeyError as error:
        raise ValueError(f"not the weights of a CLIP model: {error.args[0]!r} is missing") from None


def _config(weights: Weights, settings: dict[str, Any]) -> CLIPConfig:
    patches = "visual.attnpool.positional_embedding" not in weights
    if patches:
        width, _, _, patch = weights["visual.conv1.weight"].shape
        grid = round((weights["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        layers: Any = _count(weights, "visual.transformer.resblocks")
        image_size, heads = grid * patch, max(1, width // 64)
    else:
        width, patch = weights["visual.layer1.0.conv1.weight"].shape[0], 0
        grid = round((weights["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        layers = tuple(_count(weights, f"visual.layer{stage}") for stage in (1, 2, 3, 4))
        image_size, heads = 32 * grid, max(1, width * 32 // 64)
    vocab_size, text_width = weights["token_embedding.weight"].shape
    text_heads, activation = max(1, text_width // 64), "quick_gelu"
    if "model_cfg" in settings:  # open_clip
        model = settings["model_cfg"]
        vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
        head_width = vision.get("head_width", 64)
        heads = (width if patches else 32 * width) // head_width
        text_heads = text.get("heads", text_heads)
        activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    elif "vision_config" in settings:  # transformers leaves out what has its default
        vision, text = settings["vision_config"] or {}, settings.get("text_config") or {}
        heads = vision.get("num_attention_heads", 12)
        text_heads = text.get("num_attention_heads", 8)
        activation = vision.get("hidden_act", "quick_gelu")
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"a CLIP model with the unknown activation {activation!r}")
    return CLIPConfig(
        embed_dim=weights["text_projection"].shape[1],
        image_size=image_size,
        vision_layers=layers,
        vision_width=width,
        vision_heads=heads,
        patch_size=patch,
        text_width=text_width,
        text_heads=text_heads,
        text_layers=_count(weights, "transformer.resblocks"),
        context_length=weights["positional_embedding"].shape[0],
        vocab_size=vocab_size,
        activation=activation,  # pyright: ignore[reportArgumentType]
    )


# Numbers that OpenAI's archives carry along, and masks.
_NO_WEIGHTS = re.compile(
    r"(input_resolution|context_length|vocab_size|attn_mask|logit_bias|.*position_ids)$"
)
_TRANSFORMERS = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def openai_names(weights: Weights) -> dict[str, np.ndarray]:
    """A CLIP checkpoint of OpenAI, open_clip or transformers in the names of the first.

    The joint projection of attention is called ``attn.in_proj.weight`` here.
    """
    weights = {k: v for k, v in weights.items() if not _NO_WEIGHTS.match(k)}
    if any(name.startswith("vision_model.") for name in weights):
        weights = _from_transformers(weights)
    named = {}
    for name, value in weights.items():
        name = name.removeprefix("text.") if name.startswith("text.") else name
        named[re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name)] = value
    return named


def _from_transformers(weights: Weights) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if name in ("visual_projection.weight", "text_projection.weight"):
            new = "visual.proj" if name.startswith("visual") else "text_projection"
            named[new] = value.T
            continue
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    for name in [n for n in named if ".attn.q_proj." in n]:
        parts = [named.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        named[name.replace("q_proj", "in_proj")] = np.concatenate(parts)
    return named
