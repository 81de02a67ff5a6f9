"""Sizes of a CLIP model, read off its weights, whose names in other layouts become ours."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from logitjax.vision._tower_names import count_of, transformer_names
from logitjax.vision._vit import BlockConfig, ViTConfig

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Sizes of both towers.

    The vision tower has the blocks and channels of a transformer, or those of a ResNet's stages and
    stem, whose `patch_size` is 0 and whose `vision_heads` are of its attention pool. The last token
    of the vocabulary ends a text. All models of OpenAI have `quick_gelu`.
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

    @property
    def vision_tower(self) -> ViTConfig:
        """The vision tower, if it is a transformer."""
        assert isinstance(self.vision_layers, int)
        return ViTConfig(
            blocks=self._blocks(self.vision_width, self.vision_layers, self.vision_heads),
            patch_size=self.patch_size,
            grid=self.image_size // self.patch_size,
            patch_bias=False,
            pre_norm=True,
            embed_dim=self.embed_dim,
        )

    @property
    def text_blocks(self) -> BlockConfig:
        """Blocks of the text tower."""
        blocks = self._blocks(self.text_width, self.text_layers, self.text_heads)
        return dataclasses.replace(blocks, causal=True)

    def _blocks(self, width: int, layers: int, heads: int) -> BlockConfig:
        sizes: Any = dict(width=width, layers=layers, heads=heads, hidden=4 * width)
        return BlockConfig(**sizes, activation=self.activation, epsilon=1e-5)


def clip_config(weights: Weights, settings: Mapping[str, Any] | None = None) -> CLIPConfig:
    """Sizes by the names of `CLIP`; heads and activation by the settings beside the weights."""
    try:
        return _config(weights, dict(settings or {}))
    except KeyError as error:
        raise ValueError(f"not the weights of a CLIP model: {error.args[0]!r} is missing") from None


def _config(weights: Weights, settings: dict[str, Any]) -> CLIPConfig:
    patches = "vision.attnpool.positional_embedding" not in weights
    if patches:
        width, _, _, patch = weights["vision.patch.weight"].shape
        grid = round((weights["vision.positions"].shape[0] - 1) ** 0.5)
        layers: Any = count_of(weights, "vision.blocks")
        image_size, heads = grid * patch, max(1, width // 64)
    else:
        width, patch = weights["vision.layer1.0.conv1.weight"].shape[0], 0
        grid = round((weights["vision.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        layers = tuple(count_of(weights, f"vision.layer{stage}") for stage in (1, 2, 3, 4))
        image_size, heads = 32 * grid, max(1, width * 32 // 64)
    vocab_size, text_width = weights["text.tokens.weight"].shape
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
        embed_dim=len(weights["text.head.weight"]),
        image_size=image_size,
        vision_layers=layers,
        vision_width=width,
        vision_heads=heads,
        patch_size=patch,
        text_width=text_width,
        text_heads=text_heads,
        text_layers=count_of(weights, "text.blocks"),
        context_length=len(weights["text.positions"]),
        vocab_size=vocab_size,
        activation=activation,  # pyright: ignore[reportArgumentType]
    )


# Numbers that OpenAI's archives carry along, and masks.
_NO_WEIGHTS = re.compile(
    r"(input_resolution|context_length|vocab_size|attn_mask|logit_bias|.*position_ids)$"
)
_OPENAI = (
    (r"^text\.", ""),  # of models with a separate text module
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
# Of a vision transformer alone: a ResNet has other layers of these names.
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
        # These two are kept the other way round than the layers of torch.
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
