"""Image classifiers: sizes, torch's numbers, checkpoints, and batch statistics over devices."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import vision
from logitjax.vision._resnet import CifarResNet
from logitjax.vision._torch_layout import blank, torch_names
from tests._compiled import compiled
from tests._modules import call, num_params, with_weights
from tests.vision.goldens.make_vision_goldens import SIZES, images, weight

GOLDENS = pathlib.Path(__file__).parent / "goldens"

PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "imagenet_resnet18": 11_689_512,
    "imagenet_resnet34": 21_797_672,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    classes = 1000 if name.startswith("imagenet") else 100
    model = nnx.eval_shape(lambda: vision.ImageClassifier.create(name, classes, rngs=nnx.Rngs(0)))
    assert num_params(model) == PARAMETERS[name]


def empty(name: str, **options) -> vision.ImageClassifier:
    """A network without the time its random initialisation takes to compile."""
    made = nnx.eval_shape(lambda: vision.ImageClassifier.create(name, rngs=nnx.Rngs(0), **options))
    graph, state = nnx.split(made)
    return nnx.merge(graph, jax.tree.map(_zeros, state))


def _zeros(leaf) -> jax.Array:
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


def torch_weights(model: vision.ImageClassifier) -> dict[str, np.ndarray]:
    shapes = blank(model, torch_names(model))
    return {name: weight(name, value.shape) for name, value in shapes.items()}


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "imagenet_resnet18"])
def test_forward_equals_torch(name):
    model = empty(name)
    model.load(torch_weights(model))
    logits = nnx.jit(lambda model, x: model(x))(model, images(SIZES[name]))
    expected = np.load(GOLDENS / "vision.npz")[name]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)


def test_weights_survive_a_round_trip_and_mistakes_are_named(tmp_path):
    from safetensors.numpy import save_file

    model = empty("resnet8")
    weights = torch_weights(model)
    save_file(weights, tmp_path / "model.safetensors")
    model.load(tmp_path / "model.safetensors")
    for name, path in torch_names(model).items():
        got = np.asarray(dict(nnx.to_flat_state(nnx.state(model)))[path][...])
        ours = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[got.ndim]
        np.testing.assert_array_equal(got, weights[name].transpose(ours), err_msg=name)

    lacking = {name: value for name, value in weights.items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"fc\.bias"):
        model.load(lacking)
    with pytest.raises(ValueError, match=r"layer9\.weight"):
        model.load(weights | {"layer9.weight": weights["fc.bias"]})
    other = weights | {"fc.weight": np.zeros((10, 64)), "fc.bias": np.zeros(10)}
    with pytest.raises(ValueError, match=r"fc\.(bias|weight)"):
        model.load(other)


def test_depthwise_equals_grouped_convolution():
    from logitjax.vision._layers import DepthwiseConv

    x = np.random.default_rng(0).normal(size=(1, 7, 8, 5)).astype(np.float32)
    for stride in (1, 2):
        layer = with_weights(
            lambda s=stride: DepthwiseConv(5, stride=s, rngs=nnx.Rngs(0)), size=1.0
        )
        expected = compiled(jax.lax.conv_general_dilated)(
            x,
            layer.kernel[...],
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=5,
        )
        np.testing.assert_allclose(call(layer, x), expected, atol=1e-5)


def gradient_and_statistics(model, x):
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss(params, x):
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(x, train=True)
        return jnp.square(logits - 1.0).mean(), nnx.state(model, nnx.BatchStat)

    return jax.value_and_grad(loss, has_aux=True)(params, x)


@pytest.mark.every_change
@pytest.mark.slow
def test_batch_statistics_are_those_of_the_global_batch():
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
    x *= np.arange(1, 9)[:, None, None, None]  # each device's own statistics would differ
    model = empty("resnet8")
    model.load(torch_weights(model))
    step = jax.jit(lambda x: gradient_and_statistics(model, x))
    (value, stats), gradient = step(x)

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, P("data")))
            (other, other_stats), other_gradient = step(split)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(other_stats), jax.tree.leaves(stats), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_batch_statistics_inside_shard_map():
    x = np.random.default_rng(1).normal(size=(8, 8, 8, 3)).astype(np.float32)
    x *= np.arange(1, 9)[:, None, None, None]
    whole, named = empty("resnet8"), empty("resnet8", axis_name="data")
    for model in (whole, named):
        model.load(torch_weights(model))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(x):
        graph, params, stats = nnx.split(named, nnx.Param, nnx.BatchStat)
        model = nnx.merge(graph, params, stats, copy=True)
        logits = model(x, train=True)
        return logits, nnx.state(model, nnx.BatchStat)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()), check_vma=False
    )
    logits, stats = jax.jit(split)(x)
    expected = nnx.jit(lambda model, x: model(x, train=True))(whole, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
    whole_stats = nnx.state(whole, nnx.BatchStat)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(whole_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="resnet20"):
        vision.ImageClassifier.create("resnet21", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="depth"):
        CifarResNet(21, rngs=nnx.Rngs(0))
