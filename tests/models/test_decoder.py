import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import models
from logitjax.models import Decoder, config_from_hf, from_nnx, with_layout
from tests._modules import call, with_weights
from tests.models._configs import HF_CONFIGS, TOKENS

CONFIG = config_from_hf(HF_CONFIGS["smollm2"])
MIXED = config_from_hf(HF_CONFIGS["gemma3"])


@functools.cache
def decoder(name: str) -> Decoder:
    return made(config_from_hf(HF_CONFIGS[name]))


def made(config, **options) -> Decoder:
    return with_weights(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, tokens, positions=None, segment_ids=None):
    model = nnx.merge(graphdef, params)
    return model(tokens, positions=positions, segment_ids=segment_ids)


def run(model, *args):
    apply_fn, params = from_nnx(model)
    return logits(apply_fn.graphdef, params, *args)


def test_segments_follow_the_pattern_of_windows():
    assert [(s.pattern, s.repeats) for s in MIXED.segments] == [
        (((6, True), (6, True), (None, True)), 2),
        (((6, True),), 2),
    ]


def test_listed_equals_stacked_and_comes_back_exactly():
    model = decoder("gemma3")
    listed = with_layout(model, "listed")
    back = with_layout(listed, "stacked")
    before, after = nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(back))
    chex.assert_trees_all_equal(before, after)
    assert nnx.graphdef(model) == nnx.graphdef(back)
    np.testing.assert_allclose(run(model, TOKENS), run(listed, TOKENS), rtol=2e-5, atol=5e-6)


def test_a_cache_turns_its_keys_anew_when_a_row_outgrows_its_original_length():
    """longrope: beyond 16 tokens all keys have the long factors, those read before them too.

    One layer: what deeper ones have read before is of the short factors, as in transformers.
    """
    config = config_from_hf(HF_CONFIGS["phi4_mini_long"])
    model = made(dataclasses.replace(config, num_layers=1))
    graphdef, state = nnx.split(model)

    @jax.jit
    def in_two(state, tokens):
        model = nnx.merge(graphdef, state)
        _, cache = model.hidden_states(tokens[:, :10], cache=model.init_cache(2, 32))
        hidden, _ = model.hidden_states(tokens[:, 10:], cache=cache)
        return model.logits(hidden)

    whole = run(model, TOKENS)[:, 10:]
    np.testing.assert_allclose(in_two(state, TOKENS), whole, rtol=1e-5, atol=2e-6)


def test_checkpointing_keeps_values_and_gradients():
    def gradient(remat):
        apply_fn, params = from_nnx(made(CONFIG, remat=remat))
        return jax.jit(jax.grad(lambda p: apply_fn(p, TOKENS).var()))(params)

    plain = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            plain,
            gradient(remat),
        )


def test_compute_dtype_apart_from_parameter_dtype():
    model = made(CONFIG, dtype=jnp.bfloat16)
    hidden, _ = call(model, TOKENS, method="hidden_states")
    assert hidden.dtype == jnp.bfloat16
    logits = call(model, hidden, method="logits")
    assert logits.dtype == jnp.float32
    assert model.embedding[...].dtype == jnp.float32
    np.testing.assert_allclose(logits, run(made(CONFIG), TOKENS), atol=0.01)


def test_kept_layers_are_copies_in_the_order_asked():
    model = decoder("gemma3")
    small = models.keep_layers(model, [5, 0, 7])
    assert small.config.windows == (None, 6, 6)
    listed = with_layout(model, "listed")
    ours = with_layout(small, "listed")
    blocks = [layer for s in listed.segments for layer in s.layers]
    kept = [layer for s in ours.segments for layer in s.layers]
    for index, layer in zip([5, 0, 7], kept, strict=True):
        np.testing.assert_array_equal(layer.mlp.up.kernel[...], blocks[index].mlp.up.kernel[...])
    assert small.embedding[...].unsafe_buffer_pointer() != (
        model.embedding[...].unsafe_buffer_pointer()
    )
    assert run(small, TOKENS).shape == (2, 20, 96)
    everything = models.keep_layers(model, range(8))
    np.testing.assert_allclose(run(everything, TOKENS), run(model, TOKENS), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="indices: expected layers of 0 to 7"):
        models.keep_layers(model, [8])


def test_head_of_gives_the_logits_with_their_cap():
    for name in ("smollm2", "llama3", "gemma2"):
        model = decoder(name)
        head = model.head_of()
        hidden, _ = call(model, TOKENS, method="hidden_states")
        assert head.bias is None
        assert head.soft_cap == model.config.logits_softcap
        logits = call(model, hidden, method="logits")
        by_head = jax.jit(lambda head, hidden: head.logits(hidden))(head, hidden)
        np.testing.assert_allclose(by_head, logits, rtol=1e-4, atol=1e-5)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="layout: expected"):
        Decoder(CONFIG, rngs=nnx.Rngs(0), layout="flat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'bert'"):
        config_from_hf({"model_type": "bert"})
    model = decoder("smollm2")
    with pytest.raises(ValueError, match="segment_ids"):
        model.hidden_states(TOKENS, segment_ids=TOKENS, cache=model.init_cache(2, 32))


def test_kernels_start_at_the_published_size():
    state = jax.jit(lambda: nnx.state(Decoder(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))()
    for path, leaf in jax.tree.leaves_with_path(state):
        if "kernel" in jax.tree_util.keystr(path):
            np.testing.assert_allclose(np.std(leaf), 0.02, rtol=0.1)
