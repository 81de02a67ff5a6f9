"""Pruning drops what does nothing: exact answers on decoders whose useless parts are known."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax import losses, models
from logitjax.distillation import Student, prune_layers, prune_width
from logitjax.distillation.training import _prune
from logitjax.distillation.training._prune import LayerPruning
from logitjax.models._tiny import tiny_config
from tests._marks import EVERY_CHANGE
from tests._modules import call, with_weights

cross_entropy = jax.jit(losses.cross_entropy)


def decoder(layers=4, **options):
    config = tiny_config(layers=layers)
    return with_weights(lambda: models.Decoder(config, rngs=nnx.Rngs(0), **options))


def batches(count=2):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, 256, (2, 12)).astype(np.int32)
        segments = np.where(np.arange(12) < 5, 1, 2) * np.ones_like(tokens)
        segments[1, 9:] = 0
        positions = np.where(np.arange(12) < 5, np.arange(12), np.arange(12) - 5)
        yield {
            "tokens": tokens,
            "segment_ids": segments,
            "positions": np.broadcast_to(positions, tokens.shape),
            "loss_mask": (segments > 0) & (positions > 0),
        }


def silence(block):
    """Makes a block the identity."""
    for linear in (block.attention.output, block.mlp.down):
        linear.kernel[...] = np.zeros(linear.kernel.shape, np.float32)


@pytest.mark.parametrize("layout", ["listed", pytest.param("stacked", marks=EVERY_CHANGE)])
def test_a_block_that_is_the_identity_goes_first(layout):
    model = decoder(layout="listed")
    silence(model.segments[0].layers[2])
    chosen = prune_layers(models.with_layout(model, layout), batches(), 1)
    assert chosen.dropped == (2,)
    assert chosen.kept == (0, 1, 3)
    assert abs(chosen.scores[2]) < 1e-6
    assert min(np.delete(chosen.scores, 2)) > 1e-3


def test_scores_are_one_minus_the_mean_cosine_of_the_streams():
    model = decoder(layers=2, layout="listed")
    chosen = prune_layers(model, batches(), 1)
    first = models.first_layers(model, 1)
    turns = []
    for batch in batches():
        options = {n: batch[n] for n in ("positions", "segment_ids")}
        before = call(model, batch["tokens"], batch["positions"], method="embed")
        before = np.asarray(before, np.float64)
        # The first block's stream, read without the norm behind it.
        bare = nnx.merge(*nnx.split(first))
        bare.final_norm = lambda x: x
        after = jax.jit(bare.hidden_states)(batch["tokens"], **options)[0]
        after = np.asarray(after, np.float64)
        cosine = (before * after).sum(-1)
        cosine /= np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
        turns.append((1 - cosine)[batch["segment_ids"] > 0])
    np.testing.assert_allclose(chosen.scores[0], np.concatenate(turns).mean(), rtol=1e-5)


def test_a_run_of_identities_is_found_whole():
    model = decoder(layers=5, layout="listed")
    for layer in (2, 3):
        silence(model.segments[0].layers[layer])
    chosen = prune_layers(model, batches(), 2)
    assert chosen.dropped == (2, 3)
    assert abs(chosen.scores[2]) < 1e-6


def test_too_few_layers_are_named():
    with pytest.raises(ValueError, match="the model has 4 layers, got 4"):
        prune_layers(decoder(), batches(), 4)
    with pytest.raises(ValueError, match="batches: expected calibration text"):
        prune_layers(decoder(), [], 1)


@pytest.mark.parametrize("layout", ["listed", pytest.param("stacked", marks=EVERY_CHANGE)])
def test_width_without_effect_can_go_without_a_trace(layout):
    """Heads and channels that put out nothing are the ones that go: the logits stay."""
    config = tiny_config(layers=2)
    model = decoder(layers=2, layout="listed")
    silent = np.arange(0, config.intermediate_size, 4)
    size = config.head_dim
    for block in model.segments[0].layers:
        for linear, columns in (
            (block.mlp.up, silent),
            (block.attention.value, slice(size)),  # the first key-value head
        ):
            kernel = np.array(linear.kernel[...])
            kernel[:, columns] = 0.0
            linear.kernel[...] = kernel
    model = models.with_layout(model, layout)
    kept = config.intermediate_size - len(silent)
    small = prune_width(model, batches(), kv_heads=1, mlp_channels=kept)
    assert small.layout == layout
    assert (small.config.num_heads, small.config.num_kv_heads) == (2, 1)
    tokens = next(batches())["tokens"]
    np.testing.assert_allclose(call(small, tokens), call(model, tokens), rtol=1e-4, atol=1e-5)


def test_a_narrower_model_is_written_and_read_back(tmp_path):
    small = prune_width(decoder(layers=2), batches(), kv_heads=1, mlp_channels=48)
    models.save_pretrained(small, None, tmp_path)
    again = models.load_model(str(tmp_path))
    tokens = next(batches())["tokens"]
    np.testing.assert_array_equal(call(again, tokens), call(small, tokens))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(small, nnx.Param))) < sum(
        x.size for x in jax.tree.leaves(nnx.state(decoder(layers=2), nnx.Param))
    )


@pytest.mark.parametrize("options", [{"kv_heads": 3}, {"mlp_channels": 0}])
def test_widths_that_do_not_exist_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name}: expected 1 to"):
        prune_width(decoder(), batches(), **options)


def test_the_cosine_by_hand():
    x, y = np.float32([[3, 0], [0, 0], [1e30, 1e30]]), np.float32([[3, 3], [1, 2], [0, -2e-20]])
    np.testing.assert_allclose(jax.jit(_prune._cosine)(x, y), [0.5**0.5, 0, -(0.5**0.5)], rtol=1e-6)


def test_what_is_below_the_cut_is_counted_through_the_whole_model():
    # Windows in the third layer alone: segments of two layers, of one, and of one.
    config = dataclasses.replace(tiny_config(layers=4), windows=(None, None, 8, None))
    model = with_weights(lambda: models.Decoder(config, rngs=nnx.Rngs(0), layout="listed"))
    assert len(model.segments) > 1
    below = LayerPruning(kept=(0, 1, 3), dropped=(2,), scores=()).below
    student = Student.of(model, freeze=below)
    names = {
        name.split("/attention")[0] for name in student.trained["model"] if "attention" in name
    }
    assert len(names) == 2
    assert not any(name.startswith("segments/0") for name in names)
