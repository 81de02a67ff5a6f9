import jax
import numpy as np
import pytest
from flax import nnx

from logitjax.decoding import greedy_generate
from logitjax.models import Decoder, config_from_hf, with_layout
from tests.models._configs import HF_CONFIGS

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def model():
    # Local layers with rings of 6 slots, shorter than the longer prompt.
    config = config_from_hf(HF_CONFIGS["gemma3"] | {"num_hidden_layers": 3})
    return Decoder(config, rngs=nnx.Rngs(3), layout="listed")


def slow_greedy(model, prompt, count):
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + count):
        tokens[0, n] = np.argmax(forward(state, tokens)[0, n - 1])
    return tokens[0, len(prompt) : len(prompt) + count]


def test_ragged_prompts_equal_the_uncached_model(model):
    out = greedy_generate(model, PROMPTS, max_new_tokens=12)
    for row, prompt in zip(out, PROMPTS, strict=True):
        np.testing.assert_array_equal(row, slow_greedy(model, prompt, 12))


def test_rows_stop_at_the_end_token(model):
    free = np.asarray(greedy_generate(model, PROMPTS, max_new_tokens=12))
    eos = int(free[0, 3])
    out = np.asarray(greedy_generate(model, PROMPTS, max_new_tokens=12, eos_id=eos))
    for row, expected in zip(out, free, strict=True):
        found = np.flatnonzero(expected == eos)
        stop = found[0] if len(found) else 12
        np.testing.assert_array_equal(row[:stop], expected[:stop])
        assert (row[stop:] == eos).all()


def test_stacked_models_are_converted(model):
    out = greedy_generate(model, PROMPTS, max_new_tokens=12)
    stacked = with_layout(model, "stacked")
    np.testing.assert_array_equal(greedy_generate(stacked, PROMPTS, max_new_tokens=12), out)


def test_empty_prompts_are_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        greedy_generate(model, [[], [1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens"):
        greedy_generate(model, [1], max_new_tokens=0)
