"""An assistant made of a model's first layers: whose arrays it uses, what adapters are worth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import models
from logitjax.models import Decoder, DecoderConfig, first_layers, with_layout
from logitjax.unlearning import Assistant
from tests._modules import with_weights

SPLIT = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    windows=(4, None, None),
    segment_boundaries=(1,),
)
TOKENS = np.arange(14).reshape(2, 7) % 5
K = 2


@functools.cache
def decoder(layout="listed"):
    return with_weights(lambda: Decoder(SPLIT, rngs=nnx.Rngs(0), layout=layout))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graphdef, state, lora):
    return nnx.merge(graphdef, state).hidden_states(jnp.asarray(TOKENS), lora=lora)[0]


def hidden_of(model, lora=None):
    return _hidden(*nnx.split(model), lora)


def pointers(model):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def disturbed(lora, seed=1, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: np.float32(size * rng.normal(size=leaf.shape)), lora)


def test_first_layers_are_the_same_buffers_and_leave_the_model_alone():
    model = decoder()
    before, hidden = pointers(model), hidden_of(model)
    small = first_layers(model, K)
    assert set(pointers(small)) < set(before)
    assert small.config.num_layers == K
    np.testing.assert_array_equal(hidden_of(small), hidden_of(models.keep_layers(model, range(K))))
    small.final_norm.scale[...] = np.zeros(SPLIT.hidden_size, np.float32)
    assert pointers(model) == before
    assert model.config == model.segments[0].layers[0].attention.config == SPLIT
    np.testing.assert_array_equal(hidden_of(model), hidden)


def test_stacked_layers_are_cut_where_a_segment_ends():
    model = decoder("stacked")
    small = first_layers(model, 1)
    assert set(pointers(small)) < set(pointers(model))
    listed = first_layers(with_layout(model, "listed"), 1)
    np.testing.assert_allclose(hidden_of(small), hidden_of(listed), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="segment_boundaries"):
        first_layers(model, 2)
    with pytest.raises(ValueError, match="between 1 and 3"):
        first_layers(model, 4)


@pytest.mark.parametrize(("layout", "count"), [("stacked", 1), ("listed", 2)])
def test_merged_adapters_are_a_model_of_their_own(layout, count):
    model = decoder(layout)
    fresh = Assistant.init(model, count, rank=3, alpha=6.0, key=jax.random.key(0))
    plain = hidden_of(fresh.base)
    np.testing.assert_array_equal(hidden_of(fresh.base, fresh.lora), plain)
    lora = disturbed(fresh.lora)
    adapted = hidden_of(fresh.base, lora)
    assert not np.allclose(adapted, plain, atol=1e-2)
    before = pointers(model)
    merged = lora.merged_into(fresh.base)
    np.testing.assert_allclose(hidden_of(merged), adapted, rtol=2e-4, atol=2e-4)
    np.testing.assert_array_equal(hidden_of(first_layers(model, count)), plain)
    assert pointers(model) == before
