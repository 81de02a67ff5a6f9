"""Writes towers.npz beside this file: what transformers, timm and torchvision make of small towers.

    python tests/vision/goldens/make_tower_goldens.py

Needs torch, torchvision, transformers, timm and open_clip. Every weight is
`tower_weight(name, shape)`, by the names of the *saved file*, which are not those in memory; only
names, shapes and outputs are kept.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

from make_vision_goldens import images, weight  # noqa: E402

TOWER = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=30,
    max_position_embeddings=8,
)
# SigLIP's texts, padded with 1.
TOKENS = np.array([[5, 6, 7, 2, 1, 1, 1, 1], [9, 2, 1, 1, 1, 1, 1, 1]], np.int32)
# Wider and narrower than the 32 pixels there are positions for.
SIZES = {
    "dinov2": (40, 64),
    "dinov2_registers": (40, 24),
    "dinov3": (40, 24),
    "timm_dinov2": (40, 24),
    "timm_dinov3": (40, 24),
    "timm_fastvit_s3": (64, 64),
}


def tower_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight by its name and shape; tokens, tables and norms are no zeros and ones either."""
    if not shape:
        return np.float32(1.5)
    value = weight(name, shape)
    if "norm" in name and name.endswith("weight"):
        value = value.reshape(shape) if len(shape) == 1 else 0.3 * value
    return value


def pictures(name: str) -> np.ndarray:
    height, width = SIZES.get(name, (32, 32))
    return images(max(height, width))[:, :height, :width]


def models():
    """By name: class, configuration."""
    import transformers as t

    siglip = dict(TOWER, intermediate_size=48)
    dino = dict(TOWER, mlp_ratio=2, layerscale_value=0.5)
    dino3 = dict(TOWER, intermediate_size=48)
    convolutions = dict(hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 1, 1])
    resnet = dict(hidden_sizes=[64, 128, 256, 512], depths=[1, 1, 2, 1])
    deep = dict(resnet, hidden_sizes=[256, 512, 1024, 2048])
    return {
        "siglip": (
            t.SiglipModel,
            t.SiglipConfig(vision_config=siglip, text_config=dict(TEXT, projection_size=32)),
        ),
        "siglip_vision": (t.SiglipVisionModel, t.SiglipVisionConfig(**siglip)),
        "clip_vision": (
            t.CLIPVisionModelWithProjection,
            t.CLIPVisionConfig(**siglip, projection_dim=16),
        ),
        "clip_vision_bare": (t.CLIPVisionModel, t.CLIPVisionConfig(**siglip, hidden_act="gelu")),
        "vit": (t.ViTModel, t.ViTConfig(**siglip)),
        "vit_classifier": (t.ViTForImageClassification, t.ViTConfig(**siglip, num_labels=5)),
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**dino)),
        "dinov2_gated": (t.Dinov2Model, t.Dinov2Config(**dino, use_swiglu_ffn=True)),
        "dinov2_registers": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**dino, num_register_tokens=3),
        ),
        "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**dino3, num_register_tokens=3)),
        "dinov3_gated": (
            t.DINOv3ViTModel,
            t.DINOv3ViTConfig(**dino3, use_gated_mlp=True, hidden_act="silu"),
        ),
        "dinov3_convnext": (t.DINOv3ConvNextModel, t.DINOv3ConvNextConfig(**convolutions)),
        "convnext": (
            t.ConvNextForImageClassification,
            t.ConvNextConfig(**convolutions, num_labels=5),
        ),
        "convnextv2": (t.ConvNextV2Model, t.ConvNextV2Config(**convolutions)),
        "hf_resnet": (t.ResNetModel, t.ResNetConfig(**resnet, layer_type="basic")),
        "hf_resnet_bottleneck": (
            t.ResNetForImageClassification,
            t.ResNetConfig(**deep, layer_type="bottleneck", num_labels=5),
        ),
    }


def of_transformers(name: str, kind, config) -> dict[str, np.ndarray]:
    import safetensors.torch
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        kind(config).save_pretrained(scratch)
        path = pathlib.Path(scratch) / "model.safetensors"
        saved = safetensors.torch.load_file(path)
        made = {
            k: torch.from_numpy(
                np.array(tower_weight(k, tuple(v.shape)), np.float32).reshape(v.shape)
            )
            if v.is_floating_point()
            else v
            for k, v in saved.items()
        }
        safetensors.torch.save_file(made, path, metadata={"format": "pt"})
        model = kind.from_pretrained(scratch, attn_implementation=None).eval()
        settings = json.loads((pathlib.Path(scratch) / "config.json").read_text())
    pixels = torch.from_numpy(np.ascontiguousarray(pictures(name))).permute(0, 3, 1, 2)
    shapes = {k: list(v.shape) for k, v in saved.items() if v.is_floating_point()}
    arrays_of_model = {
        "shapes": np.array(json.dumps(shapes)),
        "config": np.array(json.dumps(settings)),
    }
    if name == "siglip":
        arrays_of_model["features"] = _features(model.get_image_features(pixel_values=pixels))
        tokens = torch.from_numpy(TOKENS).long()
        arrays_of_model["texts"] = _features(model.get_text_features(input_ids=tokens))
        return arrays_of_model
    out = model(pixel_values=pixels)
    if getattr(out, "logits", None) is not None:
        arrays_of_model["logits"] = out.logits.numpy()
    elif name == "clip_vision":
        arrays_of_model["features"] = out.image_embeds.numpy()
    elif name == "vit":
        arrays_of_model["features"] = out.last_hidden_state[:, 0].numpy()
    else:
        arrays_of_model["features"] = out.pooler_output.flatten(1).numpy()
    return arrays_of_model


def _features(output) -> np.ndarray:
    return (output if hasattr(output, "numpy") else output.pooler_output).numpy()


def of_torchvision(groups: int, width_per_group: int) -> dict[str, np.ndarray]:
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(
        Bottleneck, [1, 1, 2, 1], num_classes=5, groups=groups, width_per_group=width_per_group
    ).eval()
    state = model.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if v.is_floating_point()}
    made = {k: torch.from_numpy(tower_weight(k, tuple(shape))) for k, shape in shapes.items()}
    model.load_state_dict(made, strict=False)
    pixels = torch.from_numpy(images(32)).permute(0, 3, 1, 2)
    return {
        "shapes": np.array(json.dumps(shapes)),
        "config": np.array("{}"),
        "logits": model(pixels).numpy(),
    }


# By name: architecture, and what makes it small.
VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
PE = dict(VIT, ref_feat_shape=(4, 4))
FASTVIT = dict(layers=[1, 1, 2, 1], embed_dims=[8, 16, 32, 32])
TIMM = {
    "timm_vit": ("vit_small_patch16_224", dict(VIT, num_classes=5)),
    "timm_clip": ("vit_base_patch32_clip_quickgelu_224", dict(VIT, num_classes=5)),
    "timm_clip_large": ("vit_large_patch14_clip_224", dict(VIT, num_classes=5)),
    # Of its registers positions have rows too, of DINOv2's not even the class token.
    "timm_mean": (
        "vit_medium_patch16_reg4_gap_256",
        dict(VIT, num_classes=5, no_embed_class=False),
    ),
    "timm_siglip": ("vit_base_patch32_siglip_256", VIT),
    "timm_dinov2": ("vit_giant_patch14_reg4_dinov2", dict(VIT, dynamic_img_size=True)),
    "timm_dinov3": ("vit_small_plus_patch16_dinov3", VIT),
    "timm_eva": ("eva_giant_patch14_clip_224", dict(VIT, mlp_ratio=2, num_classes=5)),
    "timm_eva02": ("eva02_base_patch16_clip_224", dict(VIT, num_classes=5)),
    "timm_eva02_enormous": (
        "eva02_enormous_patch14_clip_224",
        dict(VIT, mlp_ratio=2, num_classes=0),
    ),
    "timm_eva02_small": ("eva02_small_patch14_224", dict(VIT, num_classes=0)),
    "timm_pe": ("vit_pe_core_base_patch16_224", dict(PE, num_classes=0)),
    "timm_pe_gigantic": ("vit_pe_core_gigantic_patch14_448", dict(PE, num_classes=0)),
    "timm_fastvit": ("fastvit_sa12", dict(FASTVIT, num_classes=5)),
    "timm_fastvit_s0": ("fastvit_mci0", dict(FASTVIT, num_classes=0)),
    "timm_fastvit_s3": (
        "fastvit_mci3",
        dict(layers=[1] * 5, embed_dims=[8, 8, 16, 32, 32], num_classes=0),
    ),
    # Its stem is for no other width.
    "timm_mci": (
        "vit_base_mci_224",
        dict(img_size=32, embed_dim=768, depth=1, num_heads=12, num_classes=0),
    ),
    "timm_convnext": (
        "convnext_nano",
        dict(depths=[1, 2, 1, 1], dims=[8, 12, 16, 20], num_classes=5),
    ),
    "timm_convnextv2": (
        "convnextv2_tiny",
        dict(depths=[1, 2, 1, 1], dims=[8, 12, 16, 20], num_classes=0),
    ),
}


def of_timm(name: str, architecture: str, arguments: dict) -> dict[str, np.ndarray]:
    import timm
    import torch
    from timm.models._hub import save_for_hf

    model = timm.create_model(architecture, **arguments).eval()
    state = model.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items()}
    made = {
        k: torch.from_numpy(np.array(tower_weight(k, tuple(shape)), np.float32).reshape(shape))
        for k, shape in shapes.items()
    }
    model.load_state_dict(made)
    with tempfile.TemporaryDirectory() as scratch:
        save_for_hf(model, scratch)
        settings = json.loads((pathlib.Path(scratch) / "config.json").read_text())
    pixels = torch.from_numpy(np.ascontiguousarray(pictures(name))).permute(0, 3, 1, 2)
    kind = "logits" if model.num_classes else "features"
    return {
        "shapes": np.array(json.dumps(shapes)),
        "config": np.array(json.dumps(settings)),
        kind: model(pixels).numpy(),
    }


# Of open_clip: the tower of timm, as above, its pooling, and what its texts have.
OPEN_CLIP = {
    "open_clip_eva": ("timm_eva02", "token", {}),
    "open_clip_pe": ("timm_pe", "map", {}),
    "open_clip_mobileclip": ("timm_fastvit_s0", "avg", dict(no_causal_mask=True)),
    "open_clip_mobileclip2_l": ("timm_clip_large", "token", dict(no_causal_mask=True)),
}


def of_open_clip(name: str, tower: str, pool: str, text: dict) -> dict[str, np.ndarray]:
    import timm
    import torch
    from open_clip.model import CustomTextCLIP

    architecture, arguments = TIMM[tower]
    vision = dict(timm_model_name=architecture, timm_pool=pool, timm_proj=None, image_size=32)
    text = dict(context_length=8, vocab_size=30, width=32, heads=2, layers=2, **text)
    original, arguments = timm.create_model, {**arguments, "num_classes": 16}
    # It takes no sizes of a tower. Of 64 channels or fewer there is one head.
    arguments |= {"num_heads": 1} if "num_heads" in arguments else {}
    timm.create_model = lambda name, **options: original(name, **{**options, **arguments})
    model = CustomTextCLIP(16, vision, text).eval()
    timm.create_model = original
    state = model.state_dict()
    shapes = {k: list(v.shape) for k, v in state.items() if v.is_floating_point()}
    made = {k: np.array(tower_weight(k, tuple(shape)), "f4") for k, shape in shapes.items()}
    model.load_state_dict(
        {k: torch.from_numpy(made[k].reshape(shapes[k])) if k in made else state[k] for k in state}
    )
    pixels = torch.from_numpy(np.ascontiguousarray(pictures(name))).permute(0, 3, 1, 2)
    settings = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    settings["preprocess_cfg"] = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    return {
        "shapes": np.array(json.dumps(shapes)),
        "config": np.array(json.dumps(settings)),
        "features": model.encode_image(pixels).numpy(),
        "texts": model.encode_text(torch.from_numpy(TOKENS).long()).numpy(),
    }


def main() -> None:
    import torch

    goldens = {}
    with torch.no_grad():
        goldens_by_model = {name: of_transformers(name, *made) for name, made in models().items()}
        goldens_by_model["resnext"] = of_torchvision(32, 4)
        goldens_by_model["wide_resnet"] = of_torchvision(1, 128)
        goldens_by_model |= {name: of_timm(name, *made) for name, made in TIMM.items()}
        goldens_by_model |= {name: of_open_clip(name, *made) for name, made in OPEN_CLIP.items()}
    for name, arrays in goldens_by_model.items():
        goldens |= {f"{name}/{key}": value for key, value in arrays.items()}
    np.savez_compressed(HERE / "towers.npz", **goldens)


if __name__ == "__main__":
    main()
