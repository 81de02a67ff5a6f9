"""Deciding in turns of some rows is deciding."""

import jax
import numpy as np
import pytest

from logitjax.fusion import DynamicFusion, _rows
from tests._marks import EVERY_CHANGE
from tests.fusion.test_dynamic import language_like

VOCAB = 96


@pytest.mark.parametrize(
    ("multi", "experts", "entries"),
    [
        ("joint", 1, 1),
        pytest.param("joint", 1, 5 * VOCAB, marks=EVERY_CHANGE),
        pytest.param("joint", 2, 1, marks=EVERY_CHANGE),
        ("single", 2, 5 * VOCAB),
    ],
)
def test_turns_are_the_whole(monkeypatch, multi, experts, entries):
    rng = np.random.default_rng(1)
    large, expert, base = (x.reshape(2, 3, VOCAB) for x in language_like(rng, 6, VOCAB))
    if experts == 2:
        expert = np.stack([expert, base + 0.5 * rng.normal(size=base.shape).astype(np.float32)])
    where = np.arange(VOCAB) < 90 if entries > 1 else None
    logits = (large, expert, base)
    fuse = DynamicFusion(multi=multi)
    whole, whole_info = jax.jit(lambda *logits: fuse(*logits, vocab_where=where))(*logits)
    monkeypatch.setattr(_rows, "MOST_ENTRIES", entries)
    turns = jax.jit(lambda *logits: fuse(*logits, vocab_where=where)).lower(*logits)
    assert "dynamic_slice" in turns.as_text()
    fused, info = turns.compile()(*logits)
    assert set(info) == set(whole_info)
    for name, values in info.items():
        assert values.shape == whole_info[name].shape, name
        np.testing.assert_allclose(values, whole_info[name], rtol=2e-4, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(fused, whole, rtol=1e-4, atol=1e-3)


def test_rows_in_turns_are_those_of_each_alone(monkeypatch):
    large, expert, base = language_like(np.random.default_rng(2), 6, VOCAB)
    monkeypatch.setattr(_rows, "MOST_ENTRIES", 2 * VOCAB)
    fuse = jax.jit(lambda *logits: DynamicFusion()(*logits))
    _, info = jax.device_get(fuse(large, expert, base))
    for i in range(6):
        _, alone = jax.device_get(fuse(large[i], expert[i], base[i]))
        np.testing.assert_allclose(info["alpha"][:, i], alone["alpha"], rtol=1e-4)
        assert info["sweeps"] >= alone["sweeps"]


def test_turns_let_gradients_and_vmap_through(monkeypatch):
    large, expert, base = language_like(np.random.default_rng(3), 4, VOCAB)
    cotangent = np.random.default_rng(4).normal(size=large.shape).astype(np.float32)

    def loss(large):
        return (DynamicFusion()(large, expert, base)[0] * cotangent).sum()

    monkeypatch.setattr(_rows, "MOST_ENTRIES", VOCAB)
    # Alphas count as constants.
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(large), cotangent, rtol=1e-6)

    def fuse(*logits):
        return DynamicFusion()(*logits)[0]

    batched = jax.jit(jax.vmap(fuse))(*(x.reshape(2, 2, VOCAB) for x in (large, expert, base)))
    flat = jax.jit(fuse)(large, expert, base)
    np.testing.assert_allclose(np.reshape(batched, (4, VOCAB)), flat, rtol=1e-4, atol=1e-3)
