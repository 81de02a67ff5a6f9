"""Heads that find the most likely token without all logits: greedy decoding asks them for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax.decoding import DecodeOptions, DraftControl, Engine, Request, Sampling, generate
from logitjax.heads import VocabularyHead
from logitjax.models import load_model
from logitjax.ops import TopK
from logitjax.vq import ScreenedHead, VQHead

ALL, BEST = 3, 7
PROMPTS = [[5, 6, 7], [9, 10, 11, 12], [20]]


class Disagreeing(VocabularyHead):
    """Its logits say `ALL`, its fast search says `BEST`: a token tells which of them was asked."""

    screens = True

    def __call__(self, hidden, embedding=None):
        return jnp.full((*hidden.shape[:-1], 257), -20.0).at[..., ALL].set(20.0)

    def top_k(self, hidden, k, embedding=None):
        shape = (*hidden.shape[:-1], k)
        return TopK(jnp.ones(shape), jnp.full(shape, BEST), jnp.zeros(shape[:-1]))


@pytest.fixture(scope="module")
def disagreeing():
    return load_model("tiny", layout="listed").with_head(Disagreeing())


@pytest.fixture(scope="module")
def screened():
    head = nnx.jit(lambda: VQHead(32, 257, 24, rngs=nnx.Rngs(1)))()
    return load_model("tiny", layout="listed").with_head(ScreenedHead(head, num_candidates=16))


@pytest.mark.slow
@pytest.mark.every_change
def test_rows_that_need_logits_get_them(disagreeing):
    options = DecodeOptions(
        logprobs=True, top_logprobs=2, masks=True, repetition=True, max_logit_bias=2
    )
    engine = Engine(disagreeing, slots=2, max_length=32, options=options)
    few = np.full(9, 0xFFFFFFFF, np.uint32)
    few[1] = 0
    bare: Any = dict(prompt=[1, 2], max_new_tokens=12, logprobs=False)
    engine.prefill(1, Request(**bare))
    changes: Any
    for changes in (
        {},
        dict(logprobs=True),
        dict(sampling=Sampling(temperature=1.0)),
        dict(sampling=Sampling(repetition_penalty=1.01)),
        dict(sampling=Sampling(frequency_penalty=0.01)),
        dict(logit_bias={5: 1.0}),
        dict(allowed=few),
        dict(stop_ids=[8], min_new_tokens=9),
    ):
        first = engine.prefill(0, Request(**bare | changes))
        assert np.asarray(first.tokens)[0] == ALL
        chunk = engine.decode_chunk(1)
        expected = ALL if changes else BEST
        # The rows of a step choose together.
        assert np.asarray(chunk.tokens).tolist() == [[expected], [expected]]
        engine.evict(0)
    assert engine.decode_chunk(1).tokens[1, 0] == BEST


@pytest.mark.slow
@pytest.mark.every_change
def test_a_token_of_the_fast_search_ends_rows_and_counts(disagreeing):
    out = generate(disagreeing, PROMPTS[:2], max_new_tokens=5, stop_ids=[BEST])
    assert out.rows() == [[ALL, BEST]] * 2
    assert out.stopped.all()
    for options in (DecodeOptions(logprobs=True), DecodeOptions(processors=(lambda x, _: x,))):
        out = generate(disagreeing, PROMPTS[:2], max_new_tokens=3, options=options)
        assert out.rows() == [[ALL] * 3] * 2


def slow(model, prompt, count):
    @jax.jit
    def best(tokens, length):
        hidden = model.hidden_states(tokens[None])[0][0, length - 1]
        return model.head.top_k(hidden[None], 1, model.embedding[...]).indices[0, 0]

    tokens = np.zeros(32, np.int32)
    tokens[: len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + count):
        tokens[length] = best(tokens, length)
    return tokens[len(prompt) : len(prompt) + count].tolist()


@pytest.mark.slow
def test_greedy_text_is_that_of_a_loop_over_the_head(screened):
    expected = [slow(screened, prompt, 12) for prompt in PROMPTS]
    assert generate(screened, PROMPTS, max_new_tokens=12).rows() == expected
    drafts = DraftControl("prompt")
    assert generate(screened, PROMPTS, max_new_tokens=12, drafts=drafts).rows() == expected


@pytest.mark.slow
@pytest.mark.every_change
def test_a_screened_head_drafts_for_the_full_one(screened):
    full = load_model("tiny", layout="listed")
    expected = generate(full, PROMPTS, max_new_tokens=12).rows()
    cheaper = full.with_head(ScreenedHead(screened.head.screen, num_candidates=160))
    out = generate(full, PROMPTS, max_new_tokens=12, drafts=DraftControl(cheaper, 3))
    assert out.rows() == expected
    assert out.drafting is not None
    assert 0 < sum(out.drafting.accepted) < sum(out.drafting.tested)


@pytest.mark.slow
def test_samples_are_those_of_the_heads_logits(screened, monkeypatch):
    warm = [Sampling(temperature=1.0, top_p=0.9, seed=4), Sampling(), Sampling(temperature=2.0)]
    out = generate(screened, PROMPTS, max_new_tokens=12, sampling=warm)
    monkeypatch.setattr(ScreenedHead, "screens", False)
    assert generate(screened, PROMPTS, max_new_tokens=12, sampling=warm).rows() == out.rows()
