"""Packed product quantisation: the layout, the rounding, and whose gradients it has."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import vq
from logitjax.vq._product_packed import unpack_codes
from logitjax.vq._screened import screened_logits


def _setup(vocab=70, groups=5, codes=16, part=3, positions=2, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(positions, groups * part)), jnp.float32)
    codebooks = jnp.asarray(rng.normal(size=(groups, codes, part)), jnp.float32)
    chosen = jnp.asarray(rng.integers(0, codes, (vocab, groups)))
    return hidden, codebooks, chosen, jnp.asarray(rng.normal(size=vocab), jnp.float32)


@hypothesis.given(st.sampled_from([(1, 1), (32, 2), (33, 5), (100, 4)]), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(size, seed):
    vocab, groups = size
    codes = np.random.default_rng(seed).integers(0, 16, (vocab, groups))
    packed = vq.pack_codes(jnp.asarray(codes))
    assert packed.shape == (-(-vocab // 32), -(-groups // 2), 32)
    np.testing.assert_array_equal(unpack_codes(packed, vocab, groups), codes)


def test_the_layout_by_hand():
    codes = np.zeros((32, 4), int)
    codes[5, 2], codes[21, 2], codes[21, 3] = 7, 9, 4
    expected = np.zeros((1, 2, 32), np.uint8)
    expected[0, 1, 5] = 7 + (9 << 4)
    expected[0, 1, 16 + 5] = 4 << 4
    np.testing.assert_array_equal(vq.pack_codes(jnp.asarray(codes)), expected)


def test_codes_that_need_more_than_half_a_byte_are_refused():
    with pytest.raises(ValueError, match="codes: expected 0 to 15, got 0 to 16"):
        vq.pack_codes(jnp.array([[0, 16]]))
    with pytest.raises(TypeError, match="codes"):
        vq.pack_codes(jnp.array([[0.5]]))


def test_a_traced_code_out_of_range_leaves_the_others_as_they_are():
    codes = jnp.zeros((32, 2), jnp.int32).at[3, 0].set(300).at[19, 1].set(-1).at[19, 0].set(2)
    packed = jax.jit(vq.pack_codes)(codes)
    np.testing.assert_array_equal(unpack_codes(packed, 32, 2), np.clip(codes, 0, 15))


@pytest.mark.parametrize("groups", [1, 5, 6])
@pytest.mark.parametrize("codes", [2, 16])
@pytest.mark.parametrize("positions", [2, 9])
def test_logits_are_those_of_tables_rounded_by_hand(groups, codes, positions):
    hidden, codebooks, chosen, bias = _setup(groups=groups, codes=codes, positions=positions)
    tables = np.einsum(
        "ngp,gkp->ngk",
        np.asarray(hidden, np.float64).reshape(positions, groups, 3),
        np.asarray(codebooks, np.float64),
    )
    low = tables.min(-1, keepdims=True)
    step = (tables - low).max((1, 2)) / 255
    whole = np.round((tables - low) / step[:, None, None])
    looked_up = sum(whole[:, g, np.asarray(chosen)[:, g]] for g in range(groups))
    expected = step[:, None] * looked_up + low.sum((1, 2))[:, None] + np.asarray(bias, np.float64)
    packed = vq.pack_codes(chosen)
    found = jax.jit(vq.packed_logits)(hidden, codebooks, packed, bias)
    # A table's entry that lies between two integers may be rounded the other way.
    np.testing.assert_allclose(found, expected, atol=1.01 * step.max())
    assert np.median(abs(found - expected)) < 1e-4
    exact = vq.product_logits(hidden, codebooks, chosen, bias)
    assert (abs(found - exact) <= groups * step[:, None] / 2 + 1e-4).all()


def test_tables_that_say_nothing():
    hidden, codebooks, chosen, bias = _setup()
    packed = vq.pack_codes(chosen)
    found = vq.packed_logits(hidden, jnp.ones_like(codebooks), packed, bias)
    expected = vq.product_logits(hidden, jnp.ones_like(codebooks), chosen, bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradients_are_those_of_what_was_rounded():
    hidden, codebooks, chosen, bias = _setup()
    packed = vq.pack_codes(chosen)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 70)), jnp.float32)

    def total(logits, codes):
        return lambda h, c, b: (weights * logits(h, c, codes, b)).sum()

    found = jax.jit(jax.grad(total(vq.packed_logits, packed), (0, 1, 2)))(hidden, codebooks, bias)
    expected = jax.grad(total(vq.product_logits, chosen), (0, 1, 2))(hidden, codebooks, bias)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_vmap_and_batch_axes():
    hidden, codebooks, chosen, bias = _setup(positions=6)
    packed = vq.pack_codes(chosen)
    together = vq.packed_logits(hidden.reshape(2, 3, -1), codebooks, packed, bias)
    alone = jax.vmap(lambda h: vq.packed_logits(h, codebooks, packed, bias))(hidden)
    assert together.shape == (2, 3, 70)
    np.testing.assert_allclose(together.reshape(6, 70), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [64, 100])
def test_codes_of_another_vocabulary_are_refused(vocab):
    hidden, codebooks, chosen, _ = _setup()
    with pytest.raises(ValueError, match="are packed as"):
        vq.packed_logits(hidden, codebooks, vq.pack_codes(chosen), jnp.zeros(vocab))


def test_the_module_stores_half_a_byte_a_code():
    hidden, codebooks, chosen, bias = _setup(vocab=64, groups=6)
    packed = vq.ProductHead.from_fit(codebooks, chosen, bias, packed=True)
    loose = vq.ProductHead.from_fit(codebooks, chosen, bias)
    saved = loose.cost().stored_bytes - packed.cost().stored_bytes
    assert saved == packed.codes[...].nbytes == loose.codes[...].nbytes / 2
    labels = jnp.array([3, 60])
    np.testing.assert_allclose(packed.nll(hidden, labels), loose.nll(hidden, labels), rtol=1e-6)
    np.testing.assert_allclose(packed(hidden), loose(hidden), atol=0.2)
    grads = nnx.grad(lambda head: head.nll(hidden, labels).sum())(packed)
    assert jnp.abs(grads.codebooks[...]).max() > 0
    with pytest.raises(ValueError, match="at most 16"):
        vq.ProductHead(8, 20, groups=4, num_codes=17, packed=True, rngs=nnx.Rngs(0))


def test_packing_is_traceable():
    codes = jnp.array([[1, 2, 3]] * 5)
    np.testing.assert_array_equal(jax.jit(vq.pack_codes)(codes), vq.pack_codes(codes))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_positions_may_be_split_over_a_mesh(kind):
    hidden, codebooks, chosen, bias = _setup(positions=8)
    packed = vq.pack_codes(chosen)
    rows = vq.product_kernel(codebooks, chosen) + 0.01
    mesh = jax.make_mesh((8,), ("data",), (kind,))

    def everything(hidden, codebooks, chosen, packed, bias, rows):
        options = {
            "screen": lambda hidden: vq.packed_logits(hidden, codebooks, packed, bias),
            "rescore": vq.exact_rows(rows),
            "num_candidates": 9,
        }
        return (
            vq.product_logits(hidden, codebooks, chosen, bias),
            screened_logits(hidden, **options),
            vq.screened_topk(hidden, 3, **options),
        )

    head = (codebooks, chosen, packed, bias, rows)
    local = everything(hidden, *head)
    with jax.set_mesh(mesh):
        split = jax.device_put(hidden, NamedSharding(mesh, P("data")))
        head = jax.device_put(head, NamedSharding(mesh, P()))
        found = jax.jit(everything)(split, *head)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(local), strict=True):
        assert one.sharding.spec[0] == "data"
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
