import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.heads import LinearHead, TiedHead
from logitjax.losses import Head
from tests._modules import call, with_weights

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 3, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 9)).astype(np.float32)
BIAS = RNG.normal(size=9).astype(np.float32)


def test_either_vocabulary_axis_and_bias():
    expected = HIDDEN @ KERNEL + BIAS
    logits = jax.jit(Head.logits)
    np.testing.assert_allclose(logits(Head(KERNEL, BIAS), HIDDEN), expected, rtol=1e-5, atol=1e-5)
    tied = logits(Head(KERNEL.T, BIAS), HIDDEN)
    np.testing.assert_allclose(tied, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_in_is_float32_out():
    head = with_weights(lambda: LinearHead(4, 9, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), size=0.5)
    logits = call(head, HIDDEN)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, HIDDEN @ np.asarray(head.kernel[...]), atol=0.1)


def test_heads_give_what_the_fused_losses_take():
    head = with_weights(lambda: LinearHead(4, 9, use_bias=True, rngs=nnx.Rngs(0)), size=0.5)
    logits = jax.jit(Head.logits)
    np.testing.assert_allclose(call(head, HIDDEN), logits(head.as_linear(), HIDDEN), rtol=1e-6)
    tied = TiedHead()
    assert tied.as_linear(KERNEL.T).bias is None
    expected = logits(tied.as_linear(KERNEL.T), HIDDEN)
    np.testing.assert_allclose(call(tied, HIDDEN, KERNEL.T), expected, rtol=1e-6)
