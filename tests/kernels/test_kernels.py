"""The kernels for CPUs say what XLA says."""

import dataclasses
import pathlib
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import ops, vq
from logitjax.kernels import native as kernels
from logitjax.storage import digest
from logitjax.vq import _product_codes
from logitjax.vq._row_products import row_products
from tests._compiled import compiled


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
    ("compiler", "message"), [("", "no C\\+\\+ compiler"), ("false", "failed"), ("true", "failed")]
)
def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path, compiler, message):
    monkeypatch.setattr(kernels, "_library", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", compiler)
    # `true` does nothing and says that it worked.
    with pytest.raises(RuntimeError, match=message):
        kernels.build()
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_loaded_is_left_alone(monkeypatch, tmp_path, caplog):
    def loads(content, checksum):
        broken = tmp_path / "kernels.so"
        broken.write_bytes(content)
        kernels._checksum_of(broken).write_text(checksum or digest(broken))
        monkeypatch.setattr(kernels, "_library", lambda: broken)
        kernels._loaded.cache_clear()
        caplog.clear()
        try:
            with caplog.at_level("WARNING"):
                loaded = kernels._loaded()
        finally:
            kernels._loaded.cache_clear()
        assert "XLA does their work" in caplog.text
        return loaded

    whole = kernels.build()
    content, checksum = whole.read_bytes(), kernels._checksum_of(whole).read_text()
    # Loading the half that is left would end the process.
    assert not loads(content[: len(content) // 2], checksum)
    assert "checksum" in caplog.text
    assert not loads(b"not a library", None)
    # A library, whole, without these functions: that of NumPy.
    assert not loads(pathlib.Path(np._core._multiarray_umath.__file__).read_bytes(), None)


def test_a_damaged_library_is_built_again(monkeypatch, tmp_path):
    library = tmp_path / "kernels.so"
    monkeypatch.setattr(kernels, "_library", lambda: library)
    library.write_bytes(b"half of it")
    kernels._checksum_of(library).write_text("of all")

    def compile_it(command, **options):
        pathlib.Path(command[-1]).write_bytes(b"a library")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(kernels.subprocess, "run", compile_it)
    assert kernels.build() == library
    assert library.read_bytes() == b"a library"
    monkeypatch.delattr(kernels.subprocess, "run")
    assert kernels.build() == library  # which is whole now


def test_flags_of_the_compiler_make_a_library_of_its_own(monkeypatch):
    monkeypatch.delenv("CXXFLAGS", raising=False)
    kernels._library.cache_clear()
    plain = kernels._library()
    monkeypatch.setenv("CXXFLAGS", "-fsanitize=address -g")
    kernels._library.cache_clear()
    try:
        assert kernels._library() != plain
    finally:
        kernels._library.cache_clear()


# 300 groups need more than the 16 bits of one sum; 33 tokens a second block; 1 group half a pair.
@pytest.mark.parametrize(
    ("vocab", "groups", "positions"), [(33, 300, 2), (5, 1, 1), (700, 514, 3), (4096, 192, 1)]
)
def test_sums_of_look_ups_are_the_same_integers(rng, vocab, groups, positions):
    codes = rng.integers(0, 16, (vocab, groups))
    tables = rng.integers(0, 256, (positions, groups + groups % 2, 16)).astype(np.uint8)
    tables[:, groups:] = 0
    packed = compiled(_product_codes.pack_codes)(codes)
    by_hand = tables[:, np.arange(groups), :].transpose(1, 2, 0).astype(np.int64)
    expected = sum(by_hand[g, codes[:, g]] for g in range(groups)).T
    for sums in (kernels.lookup_sums, _product_codes._sums):
        summed = np.asarray(jax.jit(sums)(tables, packed))
        np.testing.assert_array_equal(summed[:, :vocab], expected)


def test_no_pairs_sum_to_zero():
    none = jnp.zeros((3, 0, 16), jnp.uint8), jnp.zeros((20, 0, 32), jnp.uint8)
    # Memory that a sum of ones has just left: what nobody writes shows.
    jnp.full((3, 640), -1, jnp.int32).block_until_ready()
    for _ in range(5):
        np.testing.assert_array_equal(kernels.lookup_sums(*none), np.zeros((3, 640)))


def test_zeros_and_nans_come_in_the_order_of_lax():
    special = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-40, -1e-40, 1], np.float32)
    values = np.resize(special, (2, 2000))
    ids = kernels.largest_ids(jnp.asarray(values), 2000)
    np.testing.assert_array_equal(ids, jax.lax.top_k(values, 2000)[1])


def test_shapes_that_do_not_fit_are_errors_of_the_kernel():
    def call(name, shape, dtype, *args):
        result = jax.ShapeDtypeStruct(shape, dtype)
        return jax.ffi.ffi_call(f"logitjax_{name}", result)(*args)

    vectors, rows = np.ones((2, 4), np.float32), np.ones((5, 4), np.float32)
    ids, none = np.zeros((2, 3), np.int32), np.ones((0, 4), np.float32)
    bytes_ = np.zeros((2, 4, 16), np.uint8), np.zeros((3, 2, 32), np.uint8)
    for message, arguments in {
        r"rows: expected at least one row .* got \[0, 4\]": (
            *("row_products", (2, 3), jnp.float32),
            vectors,
            none,
            ids,
        ),
        "vectors, rows, ids: expected": (
            *("row_products", (2, 3), jnp.float32),
            vectors,
            rows[:, :3],
            ids,
        ),
        "products: expected the shape of ids": (
            *("row_products", (2, 9), jnp.float32),
            vectors,
            rows,
            ids,
        ),
        r"sums: expected \[n, 32 count\]": (*("lookup_sums", (2, 128), jnp.int32), *bytes_),
        "tables, blocks: expected": (
            *("lookup_sums", (2, 96), jnp.int32),
            bytes_[0][:, :2],
            bytes_[1],
        ),
        "values, ids: expected": (*("largest_ids", (2, 5), jnp.int32), vectors),
    }.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(*arguments).block_until_ready()


def test_rows_that_do_not_exist_are_refused_before_the_kernel(used):
    vectors, rows, ids = map(jnp.asarray, (np.ones((2, 4)), np.ones((0, 4)), np.zeros((2, 3), int)))
    for function in (row_products, kernels.row_products):
        with pytest.raises(ValueError, match="rows: expected at least one row"):
            function(vectors, rows, ids)
        assert function(vectors, rows, ids[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_row_products_equal_a_gather(rng, used, dtype):
    vectors = rng.normal(size=(3, 75)).astype(np.float32)
    rows = rng.normal(size=(50, 75)).astype(dtype)
    ids = rng.integers(-3, 53, (3, 40))
    exact = (
        np.asarray(rows, np.float64)[np.clip(ids, 0, 49)]
        @ np.asarray(vectors, np.float64)[:, :, None]
    )
    products = jax.jit(row_products)(vectors, rows, ids)
    np.testing.assert_allclose(products, exact[..., 0], rtol=1e-5, atol=1e-5)
    alone = jax.vmap(lambda v, i: row_products(v[None], rows, i[None])[0])
    one_by_one = jax.jit(alone)(vectors, ids)
    np.testing.assert_array_equal(one_by_one, products)


# A scale for each 32 numbers, 64 or 56, and one a row where the width is no multiple.
@pytest.mark.parametrize(
    ("width", "group", "count"), [(64, 32, 1), (128, 64, 1), (112, 56, 1), (36, 32, 1), (36, 32, 3)]
)
@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
def test_products_with_codes_are_those_of_their_matrix(rng, used, width, group, count, kind):
    matrix = rng.normal(size=(70, width)) * 10.0 ** rng.integers(-3, 3, size=(70, 1))
    x = rng.normal(size=(count, width)).astype(np.float32)

    @jax.jit
    def products(matrix, x):
        bits = "int8" if kind == "int8" else "int4"
        codes = ops.Codes.of(matrix, bits, group_size=group)
        if kind == "uint4":
            # As in a file: steps of 16 bits, from a minimum on; some are subnormal.
            halves = codes.scales.astype(jnp.float16)
            nibbles = jnp.uint8(8) + codes.values.astype(jnp.uint8)
            codes = ops.Codes(nibbles.astype("uint4"), halves, 3 * halves[::-1])
        return codes.product(x), codes.dense(), jax.grad(lambda x: codes.product(x)[:, 5].sum())(x)

    product, dense, slope = (np.asarray(a, np.float64) for a in products(np.float32(matrix), x))
    atol = 1e-6 * (np.abs(x) @ np.abs(dense).T).max(0)
    assert (np.abs(product - x @ dense.T) <= atol).all()
    np.testing.assert_allclose(slope, np.broadcast_to(dense[5], x.shape), rtol=1e-6)


def test_products_of_few_rows_have_a_gradient_of_scales_and_take_bfloat16(rng, used):
    matrix, x = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 16), (2, 16)))

    @jax.jit
    def run(matrix, x):
        codes = ops.Codes.of(matrix, "int4", asymmetric=True, outer_axis=0)

        def total(scales, x):
            return jnp.sin(dataclasses.replace(codes, scales=scales).product(x)).sum()

        def dense(scales, x):
            return jnp.sin(x @ dataclasses.replace(codes, scales=scales).dense().T).sum()

        narrow = {n: getattr(codes, n).astype(jnp.bfloat16) for n in ("scales", "offsets")}
        half = dataclasses.replace(codes, **narrow).product(x.astype(jnp.bfloat16))
        gradients = [jax.grad(f, (0, 1))(codes.scales, x) for f in (total, dense)]
        return gradients, half, x @ codes.dense().T

    (ours, expected), half, whole = run(matrix, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected
    )
    np.testing.assert_allclose(half, whole, rtol=0.05, atol=0.1)


def test_row_products_have_the_gradients_of_a_gather(rng, used):
    vectors = rng.normal(size=(2, 9)).astype(np.float32)
    rows = rng.normal(size=(20, 9)).astype(np.float32)
    ids = np.array([[3, 3, 0], [19, 1, 3]])
    weights = rng.normal(size=(2, 3)).astype(np.float32)

    def native_sum(vectors, rows):
        return (weights * row_products(vectors, rows, ids)).sum()

    def gathered_sum(vectors, rows):
        return (weights * jnp.einsum("nd,nmd->nm", vectors, rows[ids])).sum()

    gradients = jax.jit(jax.grad(native_sum, (0, 1)))(vectors, rows)
    expected = jax.jit(jax.grad(gathered_sum, (0, 1)))(vectors, rows)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_top_k_and_its_gradient_do_not_change(rng, monkeypatch):
    values = rng.normal(size=(2, 3, 5000)).astype(np.float32)

    def largest(values):
        return ops.top_k(values, 30)

    def gradient(values):
        return jax.grad(lambda v: (ops.top_k(v, 30)[0] ** 2).sum())(values)

    without = jax.jit(lambda v: (largest(v), gradient(v)))(values)
    monkeypatch.setenv("LOGITJAX_NATIVE", "1")
    program = jax.jit(lambda v: (largest(v), gradient(v)))
    assert "logitjax_largest_ids" in program.lower(values).as_text()
    chex.assert_trees_all_equal(program(values), without)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_screened_head_decodes_the_same(rng, monkeypatch):
    rows = rng.normal(size=(500, 24)).astype(np.float32)
    hidden = rng.normal(size=(4, 24)).astype(np.float32)
    product = compiled(vq.ProductCodes.fit)(
        *(rows, np.ones(500), np.eye(24)), groups=12, num_codes=16, iterations=3
    )
    screen = vq.ProductHead.from_fit(product)
    head = vq.ScreenedHead(screen, num_candidates=50)

    graphdef, state = nnx.split(head)

    def look(state, hidden, rows):
        head = nnx.merge(graphdef, state)
        return head.top_k(hidden, 5, rows), head.nll(hidden, np.arange(4), rows)

    # Traced anew: the setting is read then.
    arrays = (state, hidden, rows)
    without = jax.jit(lambda *x: look(*x))(*arrays)
    monkeypatch.setenv("LOGITJAX_NATIVE", "1")
    native = jax.jit(lambda *x: look(*x)).lower(*arrays)
    assert "logitjax_lookup_sums" in native.as_text()
    decoded = native.compile()(*arrays)
    np.testing.assert_array_equal(decoded[0].indices, without[0].indices)
    for one, other in zip(jax.tree.leaves(decoded), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
