"""Two heads: separate gradients, what inference keeps, blocks, sharded batches."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import vision
from logitjax.distillation import DualHead, binary_kl, binary_kl_norm, dual_head_loss
from logitjax.losses import cross_entropy
from logitjax.vision._torch_layout import torch_names
from tests._marks import EVERY_CHANGE
from tests._modules import call, num_params, with_weights

FEATURES, CLASSES = 6, 10


def arrays(*batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(*batch, FEATURES)).astype(np.float32)
    teacher = 3 * rng.normal(size=(*batch, CLASSES)).astype(np.float32)
    return features, rng.integers(CLASSES, size=batch), teacher


def kernels() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"fc": (FEATURES, CLASSES), "aux": (FEATURES, CLASSES)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def objective(weights, features, labels, teacher, **options):
    loss, parts = dual_head_loss(
        features,
        lambda h: h @ weights["fc"],
        lambda h: h @ weights["aux"],
        labels,
        teacher,
        alpha=0.3,
        **options,
    )
    return loss.sum(), (loss, parts)


def test_each_head_learns_from_its_own_loss_and_features_from_both():
    features, labels, teacher = arrays(8)
    weights = kernels()
    grad = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (heads, trunk), (loss, parts) = grad(weights, features, labels, teacher)

    @jax.jit
    def apart(fc, aux, features):
        task, pull_task = jax.vjp(lambda w, h: cross_entropy(h @ w, labels), fc, features)
        logit, pull_logit = jax.vjp(lambda w, h: binary_kl_norm(h @ w, teacher), aux, features)
        ones = jnp.ones(8)
        return task, logit, pull_task(ones), pull_logit(0.3 * ones)

    found = jax.device_get(apart(weights["fc"], weights["aux"], features))
    task, logit, (fc, trunk_task), (aux, trunk_logit) = found
    np.testing.assert_allclose(loss, task + np.float32(0.3) * logit, rtol=1e-6)
    np.testing.assert_allclose(parts["cross_entropy"], task, rtol=1e-6)
    np.testing.assert_allclose(heads["fc"], fc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(heads["aux"], aux, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trunk, trunk_task + trunk_logit, rtol=1e-4, atol=1e-5)


def test_blocks_change_nothing_and_save_memory():
    features, labels, teacher = arrays(2, 7)
    labels[0, 3] = -1
    options = {"loss": functools.partial(binary_kl, reduction="mean")}
    grad = jax.grad(objective, argnums=(0, 1), has_aux=True)
    weights = kernels()
    whole = jax.jit(functools.partial(grad, **options))(weights, features, labels, teacher)
    for size in (3, 9):
        run = jax.jit(functools.partial(grad, block_size=size, **options))
        blocked = run(weights, features, labels, teacher)
        chex.assert_trees_all_close(blocked, whole, atol=1e-5)
    assert np.asarray(whole[1][1]["cross_entropy"])[0, 3] == 0

    def scratch(block_size):
        shapes = [(1, 64, FEATURES), (1, 64), (1, 64, FEATURES)]
        kinds = [jnp.float32, jnp.int32, jnp.float32]
        args = [jax.ShapeDtypeStruct(s, k) for s, k in zip(shapes, kinds)]
        wide = {k: jax.ShapeDtypeStruct((FEATURES, 4096), jnp.float32) for k in weights}

        def loss(weights, features, labels, teacher):
            head = lambda h: h @ weights["fc"]  # noqa: E731
            return objective(
                weights, features, labels, teacher, teacher_head=head, block_size=block_size
            )[0]

        compiled = jax.jit(jax.grad(loss)).lower(wide, *args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(8) < scratch(None) / 3


whole_batch = jax.jit(jax.grad(objective, has_aux=True))


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=EVERY_CHANGE)]
)
def test_batch_split_over_devices(kind):
    args = arrays(8, 4)
    expected = whole_batch(kernels(), *args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in args]
        step = jax.jit(functools.partial(jax.grad(objective, has_aux=True), block_size=2))
        got = step(kernels(), *split)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("auxiliary", ["linear", "mlp"])
def test_inference_uses_and_keeps_the_first_head_only(auxiliary):
    make = functools.partial(DualHead, auxiliary=auxiliary)
    model = with_weights(
        lambda: vision.ImageClassifier.create("resnet8", 10, head=make, rngs=nnx.Rngs(0)), size=0.3
    )
    extra = {"linear": 64 * 10 + 10, "mlp": 64 * 200 + 200 + 2 * 200 + 200 * 10 + 10}[auxiliary]
    counted = num_params(model)
    features = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    options = dict(method="both", train=True, key=jax.random.key(0))
    logits, other = jax.device_get(call(model.head, features, **options))
    np.testing.assert_allclose(logits, call(model.head, features), rtol=1e-5, atol=1e-6)
    assert other.shape == logits.shape
    assert np.abs(other - logits).max() > 0.01
    exported = torch_names(model)
    assert {name for name in exported if name.startswith("fc")} == {"fc.weight", "fc.bias"}
    model.head = model.head.without_auxiliary()
    assert counted - num_params(model) == extra
    np.testing.assert_allclose(call(model.head, features), logits, rtol=1e-5, atol=1e-6)


def test_published_cost_of_the_auxiliary_heads():
    def count(auxiliary):
        head = nnx.eval_shape(lambda: DualHead(64, 100, auxiliary=auxiliary, rngs=nnx.Rngs(0)))
        return num_params(head.aux)

    assert (count("linear"), count("mlp")) == (6_500, 33_500)


def test_wrong_arguments_are_named():
    with pytest.raises(Exception, match="auxiliary"):  # or the type checker's, where it is on
        DualHead(4, 5, auxiliary="deep", rngs=nnx.Rngs(0))
    features, labels, teacher = arrays(4)
    with pytest.raises(ValueError, match="block_size"):
        objective(kernels(), features, labels, teacher, block_size=0)


def test_a_teachers_head_gets_no_gradient_whatever_the_loss():
    features, labels, _ = arrays(4)

    def total(w):
        def squares(student, teacher):
            return jnp.square(student - teacher).sum(-1)

        options = {"teacher_head": lambda h: h @ w, "loss": squares}
        return objective(kernels(), features, labels, features, **options)[0]

    assert not np.asarray(jax.jit(jax.grad(total))(kernels()["aux"])).any()


def test_a_class_at_minus_infinity_is_left_out_and_one_at_zero_is_not():
    loss = jax.jit(binary_kl)
    student, teacher = np.float32([0.0, -np.inf, 2.0]), np.float32([1.0, 0.5, 2.0])
    value = loss(student, teacher)
    assert value > 0.05
    np.testing.assert_allclose(value, loss(student[::2], teacher[::2]), rtol=1e-6)
