"""The kernels for CPUs say what XLA says."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import kernels, ops, vq
from logitjax.vq import _product_packed
from logitjax.vq._row_products import row_products


@pytest.fixture(scope="module", autouse=True)
def _built():
    try:
        kernels.build()
    except RuntimeError as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    kernels._loaded.cache_clear()
    assert kernels._loaded()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def used(monkeypatch):
    monkeypatch.setenv("LOGITJAX_NATIVE", "1")
    assert kernels.in_use()


def test_in_use_on_one_device_only(monkeypatch):
    assert jax.device_count() == 8
    monkeypatch.delenv("LOGITJAX_NATIVE", raising=False)
    assert not kernels.in_use()
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernels.in_use()
    monkeypatch.setenv("LOGITJAX_NATIVE", "0")
    assert not kernels.in_use()


def test_asked_for_and_not_built_is_an_error(monkeypatch, used):
    monkeypatch.setattr(kernels, "_loaded", lambda: False)
    with pytest.raises(RuntimeError, match=r"python -m logitjax\.kernels"):
        kernels.in_use()
    with pytest.raises(RuntimeError, match="not built"):
        kernels.largest_ids(jnp.ones((1, 2)), 1)


@pytest.mark.parametrize(
    ("compiler", "said"), [("", "no C\\+\\+ compiler"), ("false", "failed"), ("true", "failed")]
)
def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path, compiler, said):
    monkeypatch.setattr(kernels, "_library", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", compiler)
    # `true` does nothing and says that it worked.
    with pytest.raises(RuntimeError, match=said):
        kernels.build()
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_loaded_is_left_alone(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "kernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(kernels, "_library", lambda: broken)
    kernels._loaded.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert not kernels._loaded()
    finally:
        kernels._loaded.cache_clear()
    assert "XLA does their work" in caplog.text


# 300 groups need more than the 16 bits of one sum; 33 tokens a second block; 1 group half a pair.
@pytest.mark.parametrize(
    ("vocab", "groups", "positions"), [(33, 300, 2), (5, 1, 1), (700, 514, 3), (4096, 192, 1)]
)
def test_sums_of_look_ups_are_the_same_integers(rng, vocab, groups, positions):
    codes = rng.integers(0, 16, (vocab, groups))
    tables = rng.integers(0, 256, (positions, groups + groups % 2, 16)).astype(np.uint8)
    tables[:, groups:] = 0
    packed = vq.pack_codes(jnp.asarray(codes))
    by_hand = tables[:, np.arange(groups), :].transpose(1, 2, 0).astype(np.int64)
    expected = sum(by_hand[g, codes[:, g]] for g in range(groups)).T
    for sums in (kernels.lookup_sums, _product_packed._sums):
        found = jax.jit(sums)(jnp.asarray(tables), packed)
        np.testing.assert_array_equal(found[:, :vocab], expected)


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_largest_ids_are_those_of_lax(data):
    rows, count = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 7, 100, 3000]))
    k = data.draw(st.integers(1, count))
    seed, decimals = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0, 1, 5]))
    rng = np.random.default_rng(seed)
    # Rounded: ties, by the dozen. Adding zero makes -0.0 0.0, which lax tells apart.
    values = np.round(rng.normal(size=(rows, count)), decimals).astype(np.float32) + np.float32(0)
    values[:, :: data.draw(st.sampled_from([2, 5, 10**6]))] = -np.inf
    np.testing.assert_array_equal(
        kernels.largest_ids(jnp.asarray(values), k), jax.lax.top_k(values, k)[1]
    )


def test_nan_is_largest_and_all_equal_come_in_order():
    values = jnp.zeros((1, 2000)).at[0, 1500].set(jnp.nan).at[0, 3].set(-jnp.inf)
    assert kernels.largest_ids(values, 4).tolist() == [[1500, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_row_products_equal_a_gather(rng, used, dtype):
    vectors = jnp.asarray(rng.normal(size=(3, 75)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(50, 75)), dtype)
    ids = jnp.asarray(rng.integers(-3, 53, (3, 40)))
    exact = (
        np.asarray(rows, np.float64)[np.clip(ids, 0, 49)]
        @ np.asarray(vectors, np.float64)[:, :, None]
    )
    found = jax.jit(row_products)(vectors, rows, ids)
    np.testing.assert_allclose(found, exact[..., 0], rtol=1e-5, atol=1e-5)
    one_by_one = jax.vmap(lambda v, i: row_products(v[None], rows, i[None])[0])(vectors, ids)
    np.testing.assert_array_equal(one_by_one, found)


def test_row_products_have_the_gradients_of_a_gather(rng, used):
    vectors = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(20, 9)), jnp.float32)
    ids = jnp.asarray([[3, 3, 0], [19, 1, 3]])
    weights = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)

    def native_sum(vectors, rows):
        return (weights * row_products(vectors, rows, ids)).sum()

    def gathered_sum(vectors, rows):
        return (weights * jnp.einsum("nd,nmd->nm", vectors, rows[ids])).sum()

    found = jax.jit(jax.grad(native_sum, (0, 1)))(vectors, rows)
    expected = jax.grad(gathered_sum, (0, 1))(vectors, rows)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_top_k_and_its_gradient_do_not_change(rng, monkeypatch):
    values = jnp.asarray(rng.normal(size=(2, 3, 5000)), jnp.float32)

    def largest(values):
        return ops.top_k(values, 30)

    def gradient(values):
        return jax.grad(lambda v: (ops.top_k(v, 30)[0] ** 2).sum())(values)

    without = largest(values), gradient(values)
    monkeypatch.setenv("LOGITJAX_NATIVE", "1")
    program = jax.jit(lambda v: (largest(v), gradient(v)))
    assert "logitjax_largest_ids" in program.lower(values).as_text()
    chex.assert_trees_all_equal(program(values), without)


def test_a_screened_head_decodes_the_same(rng, monkeypatch):
    rows = jnp.asarray(rng.normal(size=(2000, 24)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(4, 24)), jnp.float32)
    codebooks, codes = vq.fit_product_codes(
        rows, jnp.ones(2000), jnp.eye(24), groups=12, num_codes=16, iterations=3
    )
    screen = vq.ProductHead.from_fit(codebooks, codes, packed=True)
    head = vq.ScreenedHead(screen, num_candidates=50)
    without = head.top_k(hidden, 5, rows), head.nll(hidden, jnp.arange(4), rows)
    monkeypatch.setenv("LOGITJAX_NATIVE", "1")
    found = head.top_k(hidden, 5, rows), head.nll(hidden, jnp.arange(4), rows)
    np.testing.assert_array_equal(found[0].indices, without[0].indices)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
