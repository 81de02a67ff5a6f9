"""Towers of transformers, timm and torchvision, against their numbers, and what is refused."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from safetensors.numpy import save_file

from logitjax import models, vision
from logitjax.vision import _refused
from logitjax.vision._clip_tokenizer import SigLIPTokenizer
from logitjax.vision._preprocessing import (
    Preprocessing,
    open_clip_preprocessing,
    processor_preprocessing,
)
from logitjax.vision._resnet import ResNet
from logitjax.vision._vit import BlockConfig, SigLIP, TowersConfig, ViT, ViTConfig, resize_matrix
from tests._modules import num_params
from tests.vision.goldens.make_tower_goldens import TOKENS, pictures, tower_weight

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "towers.npz")
FAMILIES = sorted({name.split("/")[0] for name in GOLDENS})


def weights_of(name):
    shapes = json.loads(str(GOLDENS[f"{name}/shapes"]))
    made = {k: np.asarray(tower_weight(k, tuple(shape))) for k, shape in shapes.items()}
    return {k: v.reshape(shapes[k]).copy() for k, v in made.items()}


def saved(path, name, *, rename=lambda name: name, without=()):
    weights = {rename(k): v for k, v in weights_of(name).items() if k not in without}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(str(GOLDENS[f"{name}/config"]))
    return str(path)


def assert_close(actual, expected, rtol=2e-5):
    error = np.abs(np.asarray(actual, np.float32) - expected).max() / np.abs(expected).max()
    assert error < rtol


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_the_original(tmp_path, name):
    encoder = vision.load_encoder(saved(tmp_path, name))
    pixels = pictures(name)
    if f"{name}/logits" in GOLDENS:
        assert encoder.num_classes == 5
        assert_close(jax.jit(encoder.model)(pixels), GOLDENS[f"{name}/logits"])
        return
    features = jax.jit(encoder.model)(pixels)
    assert features.shape[1] == encoder.num_features
    assert_close(features, GOLDENS[f"{name}/features"])
    if f"{name}/texts" in GOLDENS:
        assert_close(encoder.text_features(TOKENS), GOLDENS[f"{name}/texts"])
        if name == "siglip":
            with pytest.raises(ValueError, match=r"tokens: expected \[batch, 8\], padded"):
                encoder.text_features(TOKENS[:, :5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2_registers", "siglip_vision", "convnextv2"])
def test_bfloat16_is_near(tmp_path, name):
    encoder = vision.load_encoder(saved(tmp_path, name), dtype=jnp.bfloat16)
    assert_close(jax.jit(encoder.model)(pictures(name)), GOLDENS[f"{name}/features"], rtol=3e-2)


@pytest.mark.slow
def test_names_with_and_without_their_prefix_are_one_network(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = vision.load_encoder(saved(tmp_path / "a", "siglip_vision"))
    bare = vision.load_encoder(
        saved(tmp_path / "b", "siglip_vision", rename=lambda k: f"vision_model.{k}")
    )
    assert plain.fingerprint == bare.fingerprint
    assert plain.preprocessing.fit == "squash"
    assert plain.preprocessing.size == 32
    assert plain.projection is None
    with pytest.raises(ValueError, match="has no linear projection at its end"):
        plain.before_projection()
    with pytest.raises(ValueError, match=r"size: .* is made for 32 pixels, got 48"):
        vision.load_encoder(str(tmp_path / "a"), size=48)


def test_what_the_files_say_of_pictures_is_kept(tmp_path):
    path = saved(tmp_path, "dinov2")
    assert vision.load_encoder(path).preprocessing.resize == 256
    settings = {
        "size": {"shortest_edge": 48},
        "crop_size": {"height": 40, "width": 40},
        "resample": 2,
        "image_mean": [0.1, 0.2, 0.3],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    made = vision.load_encoder(path).preprocessing
    assert (made.size, made.resize, made.fit) == (40, 48, "crop")
    assert (made.interpolation, made.mean) == ("bilinear", (0.1, 0.2, 0.3))
    assert vision.load_encoder(path, size=80).preprocessing.resize == 96


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        # As transformers' processors of the kind do it.
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
         (224, 256, "crop")),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.95},
         (224, 235, "crop")),
        ({"image_processor_type": "ConvNextImageProcessorFast", "size": {"shortest_edge": 384},
          "crop_pct": 0.875}, (384, 384, "squash")),
        ({"size": {"height": 48, "width": 48}}, (48, 48, "squash")),
        ({"size": 256, "crop_size": 224}, (224, 256, "crop")),
    ],
)  # fmt: skip
def test_pictures_are_scaled_as_the_processor_does(tmp_path, settings, made):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocessing = processor_preprocessing(epath.Path(tmp_path), Preprocessing(size=8, resize=8))
    assert (preprocessing.size, preprocessing.resize, preprocessing.fit) == made


def test_pictures_that_are_squashed_and_cut_are_refused(tmp_path):
    settings = {"size": {"height": 256, "width": 256}, "crop_size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="size: expected shortest_edge beside a crop_size"):
        processor_preprocessing(epath.Path(tmp_path), Preprocessing(size=8, resize=8))


def test_what_open_clip_says_of_pictures_is_kept():
    plain = Preprocessing(size=8, resize=8)
    settings = {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5]}
    made = open_clip_preprocessing(plain, settings)
    assert (made.fit, made.interpolation, made.mean) == ("squash", "bilinear", (0.5, 0.5, 0.5))
    assert made.std == plain.std
    for wrong in ({"resize_mode": "longest"}, {"interpolation": "random"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            open_clip_preprocessing(plain, wrong)


def test_what_timm_says_of_pictures_is_kept(tmp_path):
    path = saved(tmp_path, "timm_vit")
    made = vision.load_encoder(path).preprocessing
    assert (made.size, made.resize, made.fit, made.mean) == (32, 35, "crop", (0.5, 0.5, 0.5))
    settings = json.loads(str(GOLDENS["timm_vit/config"]))

    def checkpoint_with(**changes):
        changed = settings | {"pretrained_cfg": settings["pretrained_cfg"] | changes}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return path

    made = vision.load_encoder(
        checkpoint_with(crop_mode="squash", crop_pct=1, interpolation="bilinear")
    )
    assert made.preprocessing.fit == "squash"
    assert made.preprocessing.interpolation == "bilinear"
    for changes, message in [
        ({"crop_mode": "border"}, "crop_mode: expected center, or squash of all, got 'border'"),
        ({"input_size": [3, 32, 64]}, "input_size: expected squares in colour"),
        ({"interpolation": "lanczos"}, "interpolation: expected bilinear or bicubic"),
    ]:
        with pytest.raises(ValueError, match=message):
            vision.load_encoder(checkpoint_with(**changes))


def test_networks_that_are_not_known_are_called_by_their_name(tmp_path):
    def refused(name, message, **changes):
        saved(tmp_path, name, **{k: v for k, v in changes.items() if k != "config"})
        if "config" in changes:
            (tmp_path / "config.json").write_text(json.dumps(changes["config"]))
        with pytest.raises(ValueError, match=message):
            vision.load_encoder(str(tmp_path))

    refused(
        "vit",
        r"DPTModel: .*embeddings\.cls_token",
        rename=lambda k: k.replace("patch_embeddings.projection", "patches"),
        config={"architectures": ["DPTModel"]},
    )
    refused(
        "siglip",
        r"SiglipModel: weights lack 1 entries, the first is 'text\.head\.bias'",
        without=("text_model.head.bias",),
    )
    refused(
        "siglip_vision",
        r"SiglipVisionModel: weights lack blocks\.0\.k\.weight",
        without=("encoder.layers.0.self_attn.k_proj.weight",),
    )
    refused(
        "vit",
        r"ViTModel: hidden_act: expected one of gelu, .*got 'swish'",
        config={"architectures": ["ViTModel"], "hidden_act": "swish"},
    )
    refused(
        "vit",
        r"swinv2_tiny: SwinV2 is not supported; docs/vision\.md lists what is",
        rename=lambda k: f"visual.trunk.{k}",
        config={"model_cfg": {"vision_cfg": {"timm_model_name": "swinv2_tiny"}}},
    )
    texts = json.loads(str(GOLDENS["open_clip_eva/config"]))
    texts["model_cfg"]["text_cfg"]["pool_type"] = "last"
    # SigLIP's texts, which end elsewhere.
    refused("open_clip_eva", "pool_type: open_clip's option is not supported", config=texts)
    timm = json.loads(str(GOLDENS["timm_vit/config"])) | {"model_args": {}}
    for changes, message in [
        # Its rotations do not show in the weights.
        ({"architecture": "vit_pe_lang_large_patch14_448"}, "vit_pe_lang.*: PE-Lang or PE-S"),
        ({"architecture": "swin_tiny_patch4_window7_224"}, "swin_tiny.*: Swin is not"),
        ({"architecture": "swinv2_tiny_window8_256"}, "swinv2_tiny.*: SwinV2 is not"),
        ({"architecture": "vit_relpos_base_patch16_rpn_224"}, r"rpn_224: of timm's"),
        ({"model_args": {"act_layer": "relu"}}, r"model_args: act_layer is not supported"),
        ({"global_pool": "avgmax"}, r"global_pool: expected one of token, avg, map, got 'avgmax'"),
    ]:
        refused("timm_vit", message, config=timm | changes)
    refused("timm_vit", r"without a configuration: of timm's", config={})
    refused("timm_dinov3", r"vit_small_patch16_224: pos_embed: expected a table", config=timm)


def test_positions_are_resized_as_torch_does():
    down = resize_matrix(4, 8, antialias=False)
    np.testing.assert_allclose(down.sum(1), 1, rtol=1e-6)
    # Worked by hand at offset .25 with a = -.75; the first column holds the repeated edge.
    row = [-0.10546875, 0.87890625, 0.26171875, -0.03515625]
    np.testing.assert_allclose(down[3, :4], row, rtol=1e-6)
    wide = np.eye(6, dtype=np.float32)
    expected = jax.image.resize(wide, (4, 6), "cubic")
    np.testing.assert_allclose(resize_matrix(6, 4, antialias=True), expected, atol=1e-6)


class _Pieces(models.Tokenizer):
    """A tokenizer of letters."""

    def __init__(self, *specials):
        self.specials = {name: number for number, name in enumerate(specials)}

    def token_id(self, token):
        return self.specials.get(token)

    def encode(self, text, add_bos=False):
        return [ord(letter) for letter in text]


def test_texts_of_siglip_are_padded_to_the_end_as_it_was_trained():
    first = SigLIPTokenizer(_Pieces("<unk>", "</s>"), 8)
    np.testing.assert_array_equal(first(["A, b!"]), [[97, 32, 98, 1, 1, 1, 1, 1]])
    second = SigLIPTokenizer(_Pieces("<pad>", "<eos>"), 6)
    np.testing.assert_array_equal(second(["A, b!"]), [[97, 44, 32, 98, 33, 1]])
    np.testing.assert_array_equal(second(["a"]), [[97, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(second(["abcdefgh"]), [[97, 98, 99, 100, 101, 1]])
    with pytest.raises(ValueError, match="not a tokenizer of SigLIP"):
        SigLIPTokenizer(_Pieces("<pad>"))


@pytest.mark.slow
def test_towers_have_the_published_sizes():
    base = BlockConfig(width=768, layers=12, heads=12, hidden=3072)
    config = ViTConfig(blocks=base, patch_size=16, grid=14, class_token=False, pooling="probe")
    assert num_params(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))) == 92_884_224
    sizes: Any = dict(vocab_size=32_000, context_length=64, embed_dim=768)
    both = TowersConfig(vision=config, text=base, **sizes)
    assert num_params(nnx.eval_shape(lambda: SigLIP(both, rngs=nnx.Rngs(0)))) == 203_155_970
    small = BlockConfig(width=384, layers=12, heads=6, hidden=1536, layer_scale=True)
    config = ViTConfig(blocks=small, patch_size=14, grid=37, registers=4)
    # The published number is timm's, whose table has no row for the class token.
    assert num_params(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))) == 22_057_344 + 384
    small = BlockConfig(width=384, layers=12, heads=6, hidden=1536, layer_scale=True)
    config = ViTConfig(blocks=small, patch_size=16, grid=0, registers=4, positions="none")
    # DINOv3 has no bias of keys, and timm, whose number it is, none of queries and values.
    biases = 12 * 3 * 384
    assert num_params(nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))) == 21_586_944 + biases
    blocks = (3, 4, 6, 3)
    made = dict(bottleneck=True, widen=2, groups=32)
    backbone = nnx.eval_shape(lambda: ResNet(blocks, rngs=nnx.Rngs(0), **made))
    assert num_params(backbone) == 25_028_904 - 2049 * 1000


@pytest.mark.parametrize(
    ("family", "called", "weight"),
    [
        ("SwinV2", "Swinv2Model", "encoder.layers.0.blocks.0.attn.cpb_mlp.0.weight"),
        ("EVA in BAAI's names", None, "visual.blocks.0.mlp.w1.weight"),
        ("PE in Meta's names", "PE-Core-L14-336", "visual.attn_pool.probe"),
        ("MobileCLIP in Apple's names", "mobileclip_s0", "image_encoder.model.head.proj"),
        ("AIMv2", "Aimv2Model", "preprocessor.patchifier.proj.weight"),
        ("I-JEPA", "IJepaModel", "encoder.module.patch_embed.proj.weight"),
        ("InternViT", "InternVisionModel", "vision_model.encoder.layers.0.attn.qkv.weight"),
    ],
)
def test_an_encoder_that_is_not_built_is_named_by_its_configuration_or_its_weights(
    family, called, weight
):
    assert called is None or _refused.refused([called], ["patch_embed.proj.weight"]) == family
    assert _refused.refused([], [weight]) == family
    ours = ["blocks.0.attn.qkv.weight", "encoder.layer.0.norm1.weight", "text_model.head.weight"]
    assert (
        _refused.refused(["ViTModel", "vit_base_patch16_siglip_224", "Dinov2Model"], ours) is None
    )
