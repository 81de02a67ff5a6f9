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


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("eager codes beside compiled ones")
def test_groups_with_offsets_meet_what_they_can_represent():
    rng = np.random.default_rng(0)
    # Sixteen steps from an offset, both short in bfloat16, and rows that are constant or zero.
    steps = rng.integers(0, 16, size=(30, 2, 64)).astype(np.float32)
    steps[..., :2] = 0, 15
    rows = steps * rng.integers(1, 9, (30, 2, 1)) / 64 + rng.integers(-9, 9, (30, 2, 1)) / 8
    rows[3], rows[4] = 0.75, 0
    rows = rows.reshape(30, 128).astype(np.float32)

    def of(rows):
        return Codes.of(rows, "int4", group_size=64, asymmetric=True)

    codes = jax.jit(of)(rows)
    np.testing.assert_allclose(codes.dense(), rows, atol=1e-6)
    # XLA's CPU compiler has been wrong about whole numbers, where eager functions are right.
    jax.tree.map(np.testing.assert_array_equal, codes, of(rows))
    again = Codes.from_arrays(codes.arrays(), "int4", 128)
    jax.tree.map(np.testing.assert_array_equal, codes, again)
    assert codes.nbytes == 30 * (128 / 2 + 2 * 2 * 2)
    x = rng.normal(size=(3, 128)).astype(np.float32)
    product = jax.jit(lambda codes, x: codes.product(x))
    np.testing.assert_allclose(product(codes, x), x @ rows.T, rtol=1e-4, atol=1e-4)
    small = np.asarray(product(codes, jnp.bfloat16(x)))
    np.testing.assert_allclose(small, x @ rows.T, atol=0.02 * np.abs(x @ rows.T).max())


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounding_for_the_covariance_makes_products_more_exact(bits):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 64)).astype(np.float32)
    # Hidden states of a few large directions.
    hidden = rng.normal(size=(400, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(400, 64))
    cov = np.cov(hidden.T).astype(np.float32)
    options = dict(group_size=32, asymmetric=bits == "int4")

    @jax.jit
    def both(rows, cov):
        return [Codes.of(rows, bits, cov=c, **options) for c in (None, cov)]

    error = [
        np.sqrt((np.square((hidden - hidden.mean(0)) @ (np.asarray(c.dense()) - rows).T)).mean())
        for c in both(rows, cov)
    ]
    assert error[1] < 0.5 * error[0]
    # Without correlations the nearest numbers are the best.
    plain, turned = both(rows, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(turned.values, plain.values)
    for codes in (plain, turned):
        assert np.abs(np.asarray(codes.dense()) - rows).max() < {"int8": 0.03, "int4": 0.5}[bits]
