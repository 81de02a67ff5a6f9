"""Heads in pages: their choice, their exact part, and their kernels, interpreted and compiled."""

import importlib.util
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import vq
from logitjax.losses import Head
from logitjax.vq._page_kernels import page_mass, page_products
from logitjax.vq._paged import PagedHead, Pages
from logitjax.vq._targets import head_targets

# Not a multiple of a page, nor of 128.
VOCAB, WIDTH, COUNT, SIZE = 300, 24, 320, 16


# Fitting compiles some forty programs.
pytestmark = [pytest.mark.slow, pytest.mark.every_change]


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(VOCAB, WIDTH)).astype(jnp.bfloat16).astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    head = Head(rows, rng.normal(size=VOCAB).astype(np.float32), vocab_axis=0)
    tuning = vq.Tuning(steps=6, batch_size=COUNT, learning_rate=3e-3)
    targets = head_targets(hidden, head)
    paged, losses = PagedHead.fit(
        head,
        hidden,
        targets,
        page_size=SIZE,
        share=6.0,
        imitate=lambda head_of, params, rows: tuning.imitate(
            head_of, params, hidden, targets, constants=rows
        ),
    )
    assert losses[-1] < losses[0]
    return dict(hidden=hidden, paged=paged, full=hidden @ rows.T + head.bias, head=head)


def _reading(case, count):
    return PagedHead(case["paged"].pages[...], num_pages=count)


def _all(case):
    return _reading(case, case["paged"].pages[...].rows.shape[0])


def _nll(logits, labels):
    log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    return log_z - np.take_along_axis(logits, labels[:, None], -1)[:, 0]


def test_pages_hold_each_token_once_and_end_in_padding(case):
    pages = case["paged"].pages[...]
    count, size, width = pages.rows.shape
    assert (size, width, count * size) == (SIZE, 128, 384)
    np.testing.assert_array_equal(np.sort(pages.places), np.arange(VOCAB))
    stored = np.asarray(pages.rows.reshape(-1, width)[pages.places], np.float32)
    np.testing.assert_array_equal(stored[:, :WIDTH], case["head"].kernel)
    digits = stored[:, WIDTH : WIDTH + 3]
    np.testing.assert_array_equal(digits @ [128**2, 128, 1], np.arange(VOCAB))
    mass, _ = map(np.asarray, jax.jit(Pages.mass)(pages, case["hidden"]))
    assert np.isneginf(mass[:, -(-VOCAB // SIZE) :]).all()
    assert not np.isnan(mass).any()


@pytest.mark.parametrize("count", [1, 5, 37])
def test_all_pages_are_the_full_head(case, count):
    head, hidden, full = _all(case), case["hidden"][:count], case["full"][:count]
    labels = np.arange(count, dtype=np.int32)
    logits, top, nll = jax.jit(lambda h, y: (head(h), head.top_k(h, 4), head.nll(h, y)))(
        hidden, labels
    )
    np.testing.assert_allclose(logits, full, rtol=1e-4, atol=1e-4)
    best = -np.sort(-full, -1)[:, :4]
    np.testing.assert_allclose(top.values, best, rtol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(full, top.indices, -1), best, rtol=1e-4)
    np.testing.assert_allclose(top.log_z, np.log(np.exp(full).sum(-1)), rtol=1e-4)
    np.testing.assert_allclose(nll, _nll(full, labels), rtol=1e-3, atol=1e-4)


def test_one_read_serves_a_batch_and_its_logits_are_exact(case):
    head, hidden = _reading(case, 6), case["hidden"][:8]
    logits, top = jax.jit(lambda h: (head(h), head.top_k(h, 3)))(hidden)
    pages = np.asarray(head.pages[...].places) // SIZE
    exact = np.abs(np.asarray(logits) - case["full"][:8]) < 1e-4
    # Pages whose every token is exact at every position: those that were read.
    read = [page for page in np.unique(pages) if exact[:, pages == page].all()]
    assert len(read) == 6
    among = np.where(np.isin(pages, read), case["full"][:8], -np.inf)
    np.testing.assert_array_equal(top.indices, np.argsort(-among, -1)[:, :3])
    np.testing.assert_allclose(top.log_z, np.log(np.exp(logits).sum(-1)), rtol=1e-4)


def test_a_row_of_nan_leaves_its_neighbours_their_pages(case):
    hidden = np.concatenate([case["hidden"][:3], np.full((1, WIDTH), np.nan, np.float32)])
    head = _reading(case, 6)
    top = jax.jit(lambda h: [head.top_k(h, 3), head.top_k(h[:3], 3)])(hidden)
    np.testing.assert_array_equal(top[0].indices[:3], top[1].indices)
    assert np.isnan(top[0].values[3]).any()


def test_enough_pages_are_read_for_the_likeliest_token(case):
    paged = case["paged"]
    best = case["full"].argmax(-1)
    one = jax.jit(jax.vmap(lambda h: paged.top_k(h, 1).indices[0]))(case["hidden"])
    together = jax.jit(lambda h: paged.top_k(h, 1).indices[:, 0])(case["hidden"])
    assert (one == best).mean() > 0.99
    # Pages of 16 unlike positions.
    assert (together == best).mean() > 0.94


def test_gradients_are_finite_and_those_of_the_full_head(case):
    head, hidden = _all(case), case["hidden"][:3]
    labels = np.arange(3, dtype=np.int32)
    rows, bias = case["head"].kernel, case["head"].bias

    def full(hidden):
        return -jax.nn.log_softmax(hidden @ rows.T + bias)[np.arange(3), labels].sum()

    few = _reading(case, 2)
    got, want, some = jax.jit(
        lambda h: (
            jax.grad(lambda h: head.nll(h, labels, temperature=1.0).sum())(h),
            jax.grad(full)(h),
            jax.grad(lambda h: few.nll(h, labels, z_loss=1e-3).sum())(h),
        )
    )(hidden)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert np.isfinite(some).all()


def test_it_is_saved_and_loaded(case, tmp_path):
    case["paged"].save(tmp_path)
    loaded = vq.load_head(tmp_path)
    assert isinstance(loaded, PagedHead)
    pages, want = loaded.pages[...], case["paged"].pages[...]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), pages, want)
    assert (pages.codes.dtype, pages.rows.dtype) == (jnp.int4, jnp.bfloat16)
    assert loaded.num_pages == case["paged"].num_pages == 16


def test_costs_are_those_of_sketch_and_pages(case):
    few, more = _reading(case, 2).cost(), _reading(case, 3).cost()
    assert more.read_bytes - few.read_bytes == SIZE * (128 * 2 + 4)
    assert not few.exact
    assert _all(case).cost().exact


def test_errors_name_the_argument(case):
    head = _reading(case, 1)
    with pytest.raises(ValueError, match="k: expected"):
        head.top_k(case["hidden"], SIZE + 1)
    with pytest.raises(ValueError, match="labels: expected shape"):
        head.nll(case["hidden"], np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="num_pages: expected"):
        _reading(case, 0)
    capped = Head(case["head"].kernel, vocab_axis=0, soft_cap=3.0)
    targets = head_targets(case["hidden"], case["head"])
    with pytest.raises(ValueError, match="head: expected one without a soft cap"):
        PagedHead.fit(capped, case["hidden"], targets)
    with pytest.raises(ValueError, match="page_size: expected a divisor of 128"):
        PagedHead.fit(case["head"], case["hidden"], targets, page_size=48)


@pytest.mark.parametrize("chosen", [1, 8, 11])
def test_the_kernels_match_dense_products(case, chosen):
    pages, hidden = case["paged"].pages[...], case["hidden"][:5]
    ids = np.sort(np.random.default_rng(1).permutation(24)[:chosen]).astype(np.int32)
    wide = np.pad(hidden, ((0, 1), (0, 128 - WIDTH)))
    # The last position reads tokens.
    wide[-1, WIDTH : WIDTH + 3] = [128**2, 128, 1]

    @jax.jit
    def run(wide, hidden, pages, ids):
        given = hidden, pages.projection, pages.codes, pages.lines
        mass = page_mass(*given, SIZE, interpret=True)
        return page_products(wide, pages.rows, ids, interpret=True), mass, pages.mass(hidden)

    products, (mass, log_z), (want, whole) = run(wide, hidden, pages, ids)
    rows = np.float32(pages.rows[ids]).reshape(-1, 128)
    near = np.float32(wide.astype(jnp.bfloat16)) @ rows.T
    np.testing.assert_allclose(products, near, rtol=1e-4, atol=1e-4)
    tokens = dict(zip(np.asarray(pages.places), range(VOCAB)))
    at = (ids[:, None] * SIZE + np.arange(SIZE)).reshape(-1)
    assert products[-1].tolist() == [tokens.get(place, 0) for place in at]
    # Hidden states and their coordinates are rounded to bfloat16.
    np.testing.assert_allclose(mass, want, atol=0.1)
    np.testing.assert_allclose(log_z, whole, atol=0.1)
    assert np.isneginf(mass[:, -(-VOCAB // SIZE) :]).all()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize("topology", ["v5p:1x1x1", "v6e:1x1"])
@pytest.mark.parametrize("positions", [1, 16])
def test_a_tpu_reads_three_tenths_of_the_rows(topology, positions):
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    # SmolLM2's head.
    vocab, width, size, chosen = 49152, 576, 8, 48

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    pages = Pages(
        rows=array(jnp.bfloat16, vocab // size, size, 640),
        bias=None,
        codes=array(jnp.int4, width, vocab),
        lines=array(jnp.float32, vocab // 2048, 2, 2048),
        projection=array(jnp.bfloat16, width, width),
        places=array(jnp.int32, vocab),
    )

    def greedy(pages: Pages, hidden: jax.Array) -> jax.Array:
        head = PagedHead(pages, num_pages=chosen, dtype=jnp.bfloat16)
        return head.top_k(hidden, 1).indices

    with jax.set_mesh(mesh):
        traced = jax.jit(greedy).trace(pages, array(jnp.bfloat16, positions, width))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text, costs = compiled.as_text() or "", dict(compiled.cost_analysis() or {})
    assert "logitjax_page_mass" in text
    assert "logitjax_page_products" in text
    # The kernels declare what their blocks hold: codes, scales and biases, and the pages' rows.
    declared = vocab * (width // 2 + 8) + chosen * size * 640 * 2
    assert declared < costs["bytes accessed"] <= 0.3 * math.prod((vocab, width, 2))
