"""Weights in 8 and 4 bits: products, models, adapters and checkpoints of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import models
from logitjax.decoding import Ensemble, generate
from logitjax.ops import Codes
from tests._marks import EVERY_CHANGE

BITS = pytest.mark.parametrize("bits", ["int8", pytest.param("int4", marks=EVERY_CHANGE)])


@BITS
def test_products_are_those_of_the_numbers_that_the_codes_stand_for(bits):
    rng = np.random.default_rng(0)
    matrix, x = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 24), (3, 64)))
    # Channels and rows of unlike sizes, and one of nothing.
    matrix *= 10.0 ** np.arange(-3, 3).repeat(4)
    matrix[:, 5], x[1] = 0, 1e-3 * x[1]

    @jax.jit
    def products(matrix, x):
        codes = Codes.of(matrix, bits, outer_axis=1)
        slope = jax.grad(lambda x: codes.product(x).sum())(x)
        return codes.dense(), codes.product(x), codes.product(x[0]), slope

    dense, several, one, slope = (np.asarray(a, np.float64) for a in products(matrix, x))
    # Half a step, of scales up to a third wider; of four bits a whole one, at the end without an 8.
    limit = np.abs(matrix).max(0) * {"int8": 0.501 / 96, "int4": 1.001 / 8}[bits]
    assert (np.abs(dense - matrix) <= limit + 1e-12).all()
    size = np.abs(x) @ np.abs(dense)
    assert (np.abs(several - x @ dense) <= 1e-4 * size.max(1, keepdims=True)).all()
    np.testing.assert_allclose(several[:, 20:], (x @ dense)[:, 20:], rtol=2e-3, atol=0.02)
    np.testing.assert_allclose(one, several[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, np.broadcast_to(dense.sum(1), x.shape), rtol=1e-4)


def test_weights_that_had_6_bits_are_met():
    rng = np.random.default_rng(0)
    wide = rng.integers(-31, 32, size=(40, 2, 32)).astype(np.float32)
    wide[:, :, 0] = 31
    wide = (wide * rng.uniform(1e-3, 1, size=(40, 2, 1))).reshape(40, 64)
    # Rounded to 127 steps of the largest they would be .004 off.
    dense = jax.jit(lambda matrix: Codes.of(matrix, "int8").dense())(wide)
    np.testing.assert_allclose(dense, wide, rtol=1e-5)


@BITS
@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("writing, reading and decoding of a coded model")
def test_a_small_model_decodes_takes_adapters_and_is_written(bits, tmp_path):
    model = models.load_model("tiny")
    small = models.quantize(model, bits)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(small))))
    assert stored < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    init = jax.jit(lambda key: models.Lora.init(model.config, 2, key=key))
    lora = jax.tree.map(lambda leaf: leaf + 0.02, init(jax.random.key(0)))

    @nnx.jit
    def logits(model, lora):
        tokens = jnp.arange(12)[None]
        return model.logits(model.hidden_states(tokens, lora=lora)[0])

    plain, coded = (np.asarray(logits(m, None)) for m in (model, small))
    assert 0 < np.abs(plain - coded).max() < {"int8": 0.02, "int4": 0.5}[bits] * np.ptp(plain)
    adapted = np.asarray(logits(model, lora)) - plain
    np.testing.assert_allclose(
        np.asarray(logits(small, lora)) - coded, adapted, atol=0.3 * np.ptp(adapted)
    )
    models.save_pretrained(small, None, tmp_path)
    written = models.load_model(str(tmp_path))
    np.testing.assert_allclose(logits(written, None), coded, atol=1e-3)
    # Beside a model of other weights; one that drafts need not be of the same kind.
    both = Ensemble(small, experts=[model], fuse=lambda large, *_, **__: (large, {}))
    assert generate(both, [[1, 2, 3]], max_new_tokens=4).rows()


def test_bits_that_nobody_has_are_refused():
    with pytest.raises(ValueError, match="bits: expected one of int8, int4, got 'int2'"):
        Codes.of(np.ones((2, 2)), "int2")
