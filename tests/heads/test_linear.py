import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.heads import LinearHead, TiedHead
from logitjax.losses import Head

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 3, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 9)).astype(np.float32)
BIAS = RNG.normal(size=9).astype(np.float32)


def test_either_vocabulary_axis_and_bias():
    expected = HIDDEN @ KERNEL + BIAS
    np.testing.assert_allclose(Head(KERNEL, BIAS).logits(HIDDEN), expected, rtol=1e-5, atol=1e-5)
    tied = Head(KERNEL.T, BIAS).logits(HIDDEN)
    np.testing.assert_allclose(tied, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_in_is_float32_out():
    head = LinearHead(4, 9, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = head(HIDDEN)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, HIDDEN @ head.kernel[...], atol=0.1)


def test_heads_give_what_the_fused_losses_take():
    head = LinearHead(4, 9, use_bias=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(head(HIDDEN), head.as_linear().logits(HIDDEN), rtol=1e-6)
    tied = TiedHead()
    assert tied.as_linear(KERNEL.T).bias is None
    np.testing.assert_allclose(
        tied(HIDDEN, KERNEL.T), tied.as_linear(KERNEL.T).logits(HIDDEN), rtol=1e-6
    )
