"""Packed product quantisation: the layout, the rounding, and whose gradients it has."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import vq
from logitjax.vq import ProductCodes, _product_codes
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE
from tests._modules import call

pack_codes, unpack = compiled(_product_codes.pack_codes), compiled(_product_codes.unpack_codes)
packed_logits = compiled(ProductCodes.logits)


def _setup(vocab=70, groups=5, codes=16, part=3, positions=2, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(positions, groups * part)).astype(np.float32)
    codebooks = rng.normal(size=(groups, codes, part)).astype(np.float32)
    chosen = rng.integers(0, codes, (vocab, groups)).astype(np.int32)
    return hidden, codebooks, chosen, rng.normal(size=vocab).astype(np.float32)


def rows_of(codebooks, chosen):
    """The rows by the definition, of codes that are not packed."""
    return codebooks[np.arange(len(codebooks)), chosen].reshape(len(chosen), -1)


@hypothesis.given(st.sampled_from([(1, 1), (32, 2), (33, 5), (100, 4)]), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(size, seed):
    vocab, groups = size
    codes = np.random.default_rng(seed).integers(0, 16, (vocab, groups))
    packed = pack_codes(codes)
    assert packed.shape == (-(-vocab // 32), -(-groups // 2), 32)
    np.testing.assert_array_equal(unpack(packed, vocab, groups), codes)


def test_the_layout_by_hand():
    codes = np.zeros((32, 4), int)
    codes[5, 2], codes[21, 2], codes[21, 3] = 7, 9, 4
    expected = np.zeros((1, 2, 32), np.uint8)
    expected[0, 1, 5] = 7 + (9 << 4)
    expected[0, 1, 16 + 5] = 4 << 4
    np.testing.assert_array_equal(pack_codes(codes), expected)


def test_codes_that_need_more_than_half_a_byte_are_refused():
    with pytest.raises(ValueError, match="codes: expected 0 to 15, got 0 to 16"):
        _product_codes.pack_codes(np.array([[0, 16]]))
    with pytest.raises(TypeError, match="codes"):
        _product_codes.pack_codes(np.array([[0.5]]))


def test_a_traced_code_out_of_range_leaves_the_others_as_they_are():
    codes = np.zeros((32, 2), np.int32)
    codes[3, 0], codes[19] = 300, (2, -1)
    np.testing.assert_array_equal(unpack(pack_codes(codes), 32, 2), np.clip(codes, 0, 15))


@pytest.mark.parametrize(
    ("groups", "codes", "positions"), [(1, 16, 2), (5, 2, 9), (6, 2, 2), (6, 16, 9)]
)
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
    packed = ProductCodes(codebooks, pack_codes(chosen), bias)
    logits = np.asarray(packed_logits(packed, hidden))
    # A table's entry that lies between two integers may be rounded the other way.
    np.testing.assert_allclose(logits, expected, atol=1.01 * step.max())
    assert np.median(abs(logits - expected)) < 1e-4
    np.testing.assert_array_equal(compiled(ProductCodes.kernel)(packed), rows_of(codebooks, chosen))
    exact = hidden @ rows_of(codebooks, chosen).T + bias
    assert (abs(logits - exact) <= groups * step[:, None] / 2 + 1e-4).all()


def test_tables_that_say_nothing():
    hidden, codebooks, chosen, bias = _setup()
    codebooks = np.ones_like(codebooks)
    logits = packed_logits(ProductCodes(codebooks, pack_codes(chosen), bias), hidden)
    expected = hidden @ rows_of(codebooks, chosen).T + bias
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_what_was_rounded():
    hidden, codebooks, chosen, bias = _setup()
    packed = pack_codes(chosen)
    weights = np.random.default_rng(1).normal(size=(2, 70)).astype(np.float32)

    def total(h, c, b):
        return (weights * ProductCodes(c, packed, b).logits(h)).sum()

    def plain(h, c, b):
        return (weights * (h @ rows_of(c, chosen).T + b)).sum()

    arrays = hidden, codebooks, bias
    gradients, expected = (jax.jit(jax.grad(x, (0, 1, 2)))(*arrays) for x in (total, plain))
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_vmap_and_batch_axes():
    hidden, codebooks, chosen, bias = _setup(positions=6)
    packed = ProductCodes(codebooks, pack_codes(chosen), bias)
    together = packed_logits(packed, hidden.reshape(2, 3, -1))
    alone = jax.jit(jax.vmap(packed.logits))(hidden)
    assert together.shape == (2, 3, 70)
    np.testing.assert_allclose(np.reshape(together, (6, 70)), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [64, 100])
def test_codes_of_another_vocabulary_are_refused(vocab):
    hidden, codebooks, chosen, _ = _setup()
    with pytest.raises(ValueError, match="codes: expected shape"):
        ProductCodes(codebooks, pack_codes(chosen), np.zeros(vocab, np.float32)).logits(hidden)


@pytest.mark.many_programs("a module from a fit, and its gradients")
def test_the_module_stores_half_a_byte_a_code():
    hidden, codebooks, chosen, bias = _setup(vocab=64, groups=6)
    packed = vq.ProductHead.from_fit(ProductCodes(codebooks, pack_codes(chosen), bias))
    cost = packed.cost()
    assert cost.stored_bytes - 4 * cost.parameters == packed.codes[...].nbytes == 64 * 6 / 2
    labels = np.array([3, 60])
    exact = hidden @ rows_of(codebooks, chosen).T + bias
    nll = np.log(np.exp(exact).sum(-1)) - exact[np.arange(2), labels]
    np.testing.assert_allclose(call(packed, hidden, labels, method="nll"), nll, rtol=1e-4)
    np.testing.assert_allclose(call(packed, hidden), exact, atol=0.2)
    grads = nnx.jit(nnx.grad(lambda head: head.nll(hidden, labels).sum()))(packed)
    assert np.abs(grads.codebooks[...]).max() > 0
    with pytest.raises(ValueError, match="num_codes: expected a number from 1 to 16, got 17"):
        vq.ProductHead(8, 20, groups=4, num_codes=17, rngs=nnx.Rngs(0))


def test_packing_is_traceable():
    codes = np.array([[1, 2, 3]] * 5)
    np.testing.assert_array_equal(pack_codes(codes), _product_codes.pack_codes(codes))


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=EVERY_CHANGE)]
)
def test_positions_may_be_split_over_a_mesh(kind):
    hidden, codebooks, chosen, bias = _setup(positions=8)
    packed = ProductCodes(codebooks, pack_codes(chosen), bias)
    rows = rows_of(codebooks, chosen) + np.float32(0.01)
    mesh = jax.make_mesh((8,), ("data",), (kind,))

    def everything(hidden, packed, rows):
        screen = vq.ScreenedHead(packed.logits, rows=rows, num_candidates=9)
        return packed.logits(hidden), screen(hidden), screen.top_k(hidden, 3)

    head = (packed, rows)
    local = jax.jit(everything)(hidden, *head)
    with jax.set_mesh(mesh):
        split = jax.device_put(hidden, NamedSharding(mesh, P("data")))
        head = jax.device_put(head, NamedSharding(mesh, P()))
        on_mesh = jax.jit(everything)(split, *head)
    for one, other in zip(jax.tree.leaves(on_mesh), jax.tree.leaves(local), strict=True):
        assert one.sharding.spec[0] == "data"
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
