"""Attention in blocks: a float64 oracle, every kind of mask, and no array of time x time."""

import contextlib
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import training
from logitjax.models import Decoder, _attention, _blocked_attention, config_from_hf
from logitjax.models._blocked_attention import blocked_attention
from logitjax.models._splash_attention import splash_attention
from tests._modules import with_weights
from tests.models._configs import HF_CONFIGS


def dense(query, key, value, q_ids, k_ids, start, *, scale, softcap, window):
    """The same in float64, with all scores at once."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = scale * jnp.einsum("bqhd,bshd->bhqs", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    row, column = start + np.arange(query.shape[1])[:, None], np.arange(key.shape[1])
    mask = (row >= column) & (row - column < (window or 1 << 30))
    mask = mask & (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids >= 0)[:, None, :]
    mask = mask[:, None]
    peak = jnp.where(mask, scores, -1e30).max(-1, keepdims=True)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - peak, 0.0)), 0.0)
    mass = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqs,bshd->bqhd", weights / jnp.where(mass > 0, mass, 1.0), value)


@pytest.mark.parametrize(
    ("time", "start", "softcap", "window", "block"),
    [(37, 0, None, None, 8), (37, 0, 5.0, 9, 16), (20, 17, 3.0, None, 8), (5, 0, None, 2, 512)],
)
def test_values_and_gradients_equal_float64(time, start, softcap, window, block):
    draw = np.random.default_rng(0)
    slots = start + time
    query, cotangent = draw.normal(size=(2, 2, time, 4, 6)).astype(np.float32)
    key, value = draw.normal(size=(2, 2, slots, 2, 6)).astype(np.float32)
    ids = np.sort(draw.integers(0, 3, (2, slots)))
    ids[0, -3:] = -1  # padding
    options = dict(scale=0.4, softcap=softcap, window=window)

    def loss(attend, *arrays):
        return (cotangent * attend(*arrays, ids[:, start:], ids, start, **options)).sum()

    of = functools.partial(jax.value_and_grad, argnums=(1, 2, 3))
    blocked = functools.partial(blocked_attention, block=block)
    blocked_outputs = jax.jit(of(loss), static_argnums=0)(blocked, query, key, value)
    with jax.enable_x64(True):
        wide = (np.asarray(x, np.float64) for x in (query, key, value))
        expected = jax.jit(of(loss), static_argnums=0)(dense, *wide)
    np.testing.assert_allclose(blocked_outputs[0], expected[0], rtol=2e-5)
    for one, other in zip(blocked_outputs[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (5.0, 70)])
def test_splash_attention_equals_blocked_attention(softcap, window):
    draw = np.random.default_rng(0)
    query, cotangent = draw.normal(size=(2, 2, 200, 4, 128)).astype(np.float32)
    key, value = draw.normal(size=(2, 2, 200, 2, 128)).astype(np.float32)
    ids = np.sort(draw.integers(0, 3, (2, 200)))
    ids[0, -30:] = -1  # padding
    options = dict(scale=0.1, softcap=softcap, window=window)
    weights = np.where(ids >= 0, 1, 0)[..., None, None] * cotangent

    def of(attend):
        def loss(*arrays):
            return (weights * attend(*arrays)).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(query, key, value)

    expected = of(lambda q, k, v: blocked_attention(q, k, v, ids, ids, **options))
    splash = of(lambda q, k, v: splash_attention(q, k, v, ids, interpret=True, **options))
    for one, other in zip(*map(jax.tree.leaves, (splash, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_kernel_that_no_partitioner_splits_waits_for_a_known_mesh(monkeypatch):
    """Eight devices might hold the operands; the kernel itself would be refused on a CPU."""
    monkeypatch.setattr(_attention.on_mesh, "platform_of", lambda *arrays: "tpu")
    query, key = np.ones((1, 4, 2, 8), np.float32), np.ones((1, 4, 1, 8), np.float32)
    context = mock.Mock(spec=_attention.AttentionContext)
    context.window, context.implementation, context.segments = None, None, np.ones((1, 4), int)
    out = jax.jit(
        lambda q, k: _attention._attend_in_blocks(q, k, k, context, scale=1.0, softcap=None)
    )
    np.testing.assert_allclose(out(query, key), query)


TOKENS = np.random.default_rng(1).integers(0, 60, (2, 40))
SEGMENTS = np.array([[1] * 11 + [2] * 29, [1] * 25 + [0] * 15])
POSITIONS = np.where(SEGMENTS > 0, np.arange(40), -1)


def measure(name, attention, mesh=None):
    """Hidden states of a small decoder, gradients of a sum of them, and the compiled text."""
    config = config_from_hf(HF_CONFIGS[name])
    model = with_weights(lambda: Decoder(config, rngs=nnx.Rngs(0), attention=attention))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def total(params, tokens):
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(tokens, positions=POSITIONS, segment_ids=SEGMENTS)
        hidden = jnp.where(SEGMENTS[..., None] > 0, hidden, 0.0)
        return jnp.sin(hidden).sum(), hidden

    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        program = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(params, TOKENS).compile()
        (_, hidden), gradients = program(params, TOKENS)
    return hidden, gradients, program.as_text()


# A window and soft caps; neither.
@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "smollm2"])
def test_a_decoder_in_blocks_equals_one_without_on_one_device_and_on_a_context_axis(
    name, monkeypatch
):
    monkeypatch.setattr(_blocked_attention, "BLOCK", 8)
    hidden, gradients, text = measure(name, None)
    square = re.compile(r"\[(?:\d+,)*40,40\]")
    assert square.search(text)
    mesh = training.make_mesh("data:2,context:4")
    for attention, where in (("blocked", None), ("blocked", mesh)):
        in_blocks = measure(name, attention, where)
        np.testing.assert_allclose(in_blocks[0], hidden, atol=1e-5)
        for one, other in zip(*map(jax.tree.leaves, (in_blocks[1], gradients)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(other).max()))
        # Neither scores nor masks of the whole square.
        assert not square.search(in_blocks[2])
