import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import models
from logitjax.models import Decoder, config_from_hf, with_layout
from tests._modules import with_weights
from tests.models._configs import HF_CONFIGS, TOKENS

CONFIG = config_from_hf(HF_CONFIGS["qwen3"])


def filled(config, **options):
    init = jax.jit(lambda key: models.Lora.init(config, 3, key=key, alpha=6.0, **options))
    lora = init(jax.random.key(1))
    rng = np.random.default_rng(2)
    layers = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), lora.layers)
    return models.Lora(layers=layers, scale=lora.scale)


@functools.partial(jax.jit, static_argnums=0)
def hidden(graphdef, params, lora, rows):
    model = nnx.merge(graphdef, params)
    return model.hidden_states(jnp.asarray(TOKENS), lora=lora, lora_rows=rows)[0]


def apply(model, lora=None, rows=None):
    return hidden(*nnx.split(model), lora, rows)


def test_fresh_adapters_change_nothing_and_rows_choose():
    model = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    plain = np.asarray(apply(model))
    fresh = jax.jit(lambda key: models.Lora.init(CONFIG, 3, key=key))(jax.random.key(1))
    np.testing.assert_array_equal(apply(model, fresh), plain)
    lora = filled(CONFIG)
    full = np.asarray(apply(model, lora))
    assert not np.allclose(full, plain)
    mixed = np.asarray(apply(model, lora, np.array([True, False])))
    np.testing.assert_allclose(mixed[0], full[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mixed[1], plain[1], rtol=1e-5, atol=1e-5)
    listed = with_layout(model, "listed")
    converted = lora.with_layout(CONFIG, "listed")
    np.testing.assert_allclose(apply(listed, converted), full, rtol=1e-4, atol=5e-5)
    back = converted.with_layout(CONFIG, "stacked")
    chex.assert_trees_all_equal(back, lora)


def test_adapters_equal_merged_kernels():
    model = with_weights(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0), layout="listed"))
    lora = filled(CONFIG, layout="listed", targets=("query", "down"))
    adapted = apply(model, lora)
    for segment, members in zip(model.segments, lora.layers, strict=True):
        for layer, member in zip(segment.layers, members, strict=True):
            for name, linear in (("query", layer.attention.query), ("down", layer.mlp.down)):
                update = member[name]["a"] @ member[name]["b"] * np.asarray(lora.scale)
                linear.kernel = nnx.Param(jax.device_put(np.float32(linear.kernel[...] + update)))
    np.testing.assert_allclose(apply(model), adapted, rtol=1e-4, atol=1e-4)


def test_unknown_target_is_named():
    with pytest.raises(ValueError, match=r"targets: expected .* got \['heads'\]"):
        models.Lora.init(CONFIG, 2, key=jax.random.key(0), targets=("heads",))
