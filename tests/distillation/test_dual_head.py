"""Two heads: what inference keeps, and what the second one costs."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax import vision
from logitjax.distillation import DualHead, binary_kl
from logitjax.vision._torch_layout import torch_names
from tests._modules import call, num_params, with_weights


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
    if auxiliary == "mlp":
        aux = model.head.aux
        hidden = np.asarray(call(aux.hidden, features))
        kept = jax.random.bernoulli(options["key"], 0.9, hidden.shape)
        hidden = np.where(kept, hidden / 0.9, 0.0)
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        hidden = np.maximum(hidden * aux.norm.scale[...] + aux.norm.bias[...], 0.0)
        np.testing.assert_allclose(other, call(aux.out, hidden), rtol=1e-4, atol=1e-5)
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


def test_a_class_at_minus_infinity_is_left_out_and_one_at_zero_is_not():
    loss = jax.jit(binary_kl)
    student, teacher = np.float32([0.0, -np.inf, 2.0]), np.float32([1.0, 0.5, 2.0])
    value = loss(student, teacher)
    assert value > 0.05
    np.testing.assert_allclose(value, loss(student[::2], teacher[::2]), rtol=1e-6)
