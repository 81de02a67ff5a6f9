"""Tokens that are taken back and written again: what speculation does to a cache."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax.models import Cache, Decoder, DecoderConfig, _cache
from tests._modules import with_weights
from tests.models._configs import TOKENS

CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    windows=(5, None),
)


@functools.partial(jax.jit, static_argnums=0)
def feed(graphdef, state, tokens, positions, cache):
    model = nnx.merge(graphdef, state)
    hidden, cache = model.hidden_states(tokens, positions=positions, cache=cache)
    return model.logits(hidden), cache


@pytest.mark.parametrize("slack", [4, 2])
def test_a_rejected_draft_leaves_no_trace(slack):
    """With enough slack a block fits the ring; with less it is seen beside the ring."""
    model = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(1), layout="listed"))
    split = nnx.split(model)
    whole = np.asarray(jax.jit(lambda s: nnx.merge(split[0], s)(TOKENS))(split[1]))
    cache = jax.jit(lambda: Cache.init(CONFIG, 2, 32, ring_slack=slack))()
    assert cache.keys[0][0].shape[2] == 5 + slack
    _, cache = feed(*split, TOKENS[:, :9], np.tile(np.arange(9), (2, 1)), cache)
    starts = np.array([9, 9])
    # Rows accept different numbers of their drafts.
    for accepted in ([0, 2], [1, 1], [2, 0], [0, 0]):
        index = starts[:, None] + np.arange(3)
        truth = np.take_along_axis(TOKENS, index, axis=1)
        drafts = np.where(np.arange(3) > np.array(accepted)[:, None], 95 - truth, truth)
        logits, cache = feed(*split, drafts, index, cache)
        for row, count in enumerate(accepted):
            right = slice(starts[row], starts[row] + count + 1)
            np.testing.assert_allclose(
                np.asarray(logits)[row, : count + 1], whole[row, right], atol=1e-5
            )
        starts = starts + np.array(accepted) + 1


def test_a_ring_keeps_the_last_tokens_of_each_row():
    positions = np.array([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]])
    slots = jax.jit(_cache.write_slots, static_argnums=(1, 2))(positions, 4, 3)
    # Slot 4 is no slot: what goes there is dropped.
    np.testing.assert_array_equal(slots, [[4, 4, 2, 3, 0, 1], [4, 4, 0, 1, 2, 3]])


def test_a_query_sees_what_is_held_not_later_and_inside_its_window():
    queries, keys = np.array([[4, 2]]), np.array([[-1, 1, 2, 4, 5]])
    mask = jax.jit(_cache.position_mask, static_argnums=2)
    whole = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(mask(queries, keys, None)[0, 0], whole)
    window = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(mask(queries, keys, 3)[0, 0], window)
