"""Scaling and normalisation of pictures, from the files of transformers and open_clip."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from logitjax.storage import read_json
from logitjax.vision._preprocessing import Preprocessing


def processor_preprocessing(path: epath.Path, default: Preprocessing) -> Preprocessing:
    """Read transformers' ``preprocessor_config.json``, with the family's values as defaults."""
    file = path / "preprocessor_config.json"
    if not path.is_dir() or not file.exists():
        return default
    content = read_json(file, form=dict)

    def side(value: Any) -> int | None:
        if isinstance(value, Mapping):
            value = value.get("height") or value.get("shortest_edge")
        return int(value) if value else None

    scaled, cut = side(content.get("size")), side(content.get("crop_size"))
    size, resize, fit = default.size, default.resize, default.fit
    processor = f"{content.get('image_processor_type')} {content.get('feature_extractor_type')}"
    if "convnext" in processor.lower() and scaled:
        # Smaller pictures are cropped from larger ones, larger ones lose their proportions.
        share = content.get("crop_pct") or 224 / 256
        size, fit = scaled, "crop" if scaled < 384 else "squash"
        resize = int(scaled / share) if fit == "crop" else scaled
    elif scaled and cut and content.get("do_center_crop", True):
        size, resize, fit = cut, max(scaled, cut), "crop"
        message = content["size"]
        if scaled > cut and isinstance(message, Mapping) and "height" in message:
            raise ValueError(
                f"{file}: size: expected shortest_edge beside a crop_size that is smaller, got "
                f"{message}"
            )
    elif scaled:
        size, resize, fit = scaled, scaled, "squash"
    entries: dict[Any, Any] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
    mean: Any = tuple(content.get("image_mean") or default.mean)
    std: Any = tuple(content.get("image_std") or default.std)
    return Preprocessing(
        size=size,
        resize=resize,
        mean=mean,
        std=std,
        interpolation=entries.get(content.get("resample"), default.interpolation),
        fit=fit,
    )


def open_clip_preprocessing(default: Preprocessing, fields: Mapping[str, Any]) -> Preprocessing:
    """Read open_clip's ``preprocess_cfg``, with OpenAI's values as defaults."""
    mode = fields.get("resize_mode")
    if mode not in (None, "shortest", "squash"):
        raise ValueError(f"resize_mode: expected shortest or squash, got {mode!r}")
    return Preprocessing.of_names(fields, default, fit="squash" if mode == "squash" else "crop")
