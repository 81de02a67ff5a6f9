"""Known encoders that are not supported, recognised so that an error can name them."""

import re
from collections.abc import Iterable

# Family, its names in configurations, and names that only its weights have.
_FAMILIES = (
    ("SwinV2", r"swinv2", r"\.(cpb_mlp|continuous_position_bias_mlp)\."),
    ("Swin", r"swin(?!v2)", r"layers\.\d+\.blocks\..*relative_position_bias_table$"),
    ("EVA in BAAI's names", r"(?!)", r"\.(inner_attn_ln|ffn_ln)\.|blocks\.\d+\.mlp\.w[123]\."),
    ("PE-Lang or PE-Spatial", r"(^|_)pe[_-]?(lang|spatial)", r"(?!)"),
    ("PE in Meta's names", r"^pe[_-]?core", r"(^|\.)visual\.attn_pool\.probe$"),
    ("MobileCLIP in Apple's names", r"mobileclip", r"^image_encoder\.model\."),
    ("AIMv2", r"aimv2", r"(^|\.)(preprocessor\.patchifier|trunk\.post_trunk_norm)\."),
    ("I-JEPA", r"i_?jepa", r"^(encoder|predictor)\.module\.|^ijepa\."),
    ("InternViT", r"intern_?vi(t|sion)", r"\.layers\.\d+\.(attn\.qkv\.weight|ls1$)"),
)


def refused(called: Iterable[str], weights: Iterable[str]) -> str | None:
    """The family of a known but unsupported network; None for others."""
    kinds, names = [name.lower() for name in called], list(weights)
    for family, kind, weight in _FAMILIES:
        if any(re.search(kind, name) for name in kinds) or any(re.search(weight, n) for n in names):
            return family
    return None
