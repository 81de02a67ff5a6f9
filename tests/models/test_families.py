"""Every family against transformers' logits, cached steps, and the way out and in again."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax.models import load_model, save_pretrained
from tests._marks import EVERY_CHANGE
from tests.models._checkpoints import write_checkpoint
from tests.models._configs import GOLDEN_POSITIONS, HF_CONFIGS, TOKENS

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens.npz")


# One of each kind of block; what the others add is a rope, a bias, a window or a length.
SOME = ("smollm2", "mistral", "qwen3", "gemma3", "gpt2")
FAMILIES = [pytest.param(f, marks=[] if f in SOME else EVERY_CHANGE) for f in HF_CONFIGS]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    directory = write_checkpoint(request.param, tmp_path_factory.mktemp("hf") / request.param, 2)
    return request.param, load_model(str(directory))


@functools.partial(jax.jit, static_argnums=0)
def whole(graphdef, state):
    return nnx.merge(graphdef, state)(TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def in_steps(graphdef, state, tokens):
    """A prompt in two pieces, then single steps, through the cache."""
    model = nnx.merge(graphdef, state)
    cache = model.init_cache(2, 32)
    first, cache = model.hidden_states(tokens[:, :10], cache=cache)
    second, cache = model.hidden_states(tokens[:, 10:13], cache=cache)

    def step(cache, token):
        hidden, cache = model.hidden_states(token[:, None], cache=cache)
        return cache, hidden[:, 0]

    cache, rest = jax.lax.scan(step, cache, tokens[:, 13:].T)
    hidden = jnp.concatenate([first, second, rest.swapaxes(0, 1)], axis=1)
    return model.logits(hidden), cache.length


def test_family(family, tmp_path):
    name, model = family
    graphdef, state = nnx.split(model)
    logits = np.asarray(whole(graphdef, state))
    expected = GOLDENS[name]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits[:, GOLDEN_POSITIONS], expected, atol=1e-5 * scale)

    # longrope turns by the length so far: steps from below the original length are others.
    if name != "phi4_mini_long":
        stepped, length = in_steps(graphdef, state, TOKENS)
        np.testing.assert_allclose(stepped, logits, atol=1e-5 * scale)
        np.testing.assert_array_equal(length, [20, 20])

    on_host = nnx.merge(graphdef, jax.device_get(state))
    save_pretrained(on_host, None, tmp_path / "out", max_shard_bytes=20_000)
    again = load_model(str(tmp_path / "out"))
    assert again.config == model.config
    ours, theirs = (nnx.to_pure_dict(nnx.state(m)) for m in (model, again))
    chex.assert_trees_all_equal(ours, theirs)
