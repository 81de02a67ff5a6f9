import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.decoding import CachedModel, DecodeOptions, Engine, Ensemble, Request, generate, score
from tests._compiled import compiled
from tests.decoding._bags import bag_logits, bag_of_words
from tests.decoding._models import (
    CONFIG,
    PROMPTS,
    THEIRS,
    decoder,
    fused_ensemble,
    moved,
    next_logits,
    slow_greedy,
    small,
)


def fused_after(large, experts, bases, prompts):
    """Next-token logits by uncached forward passes, every model after its own prompt."""

    def logits_after(new):
        each = [
            next_logits(model, [*prompt, *new])
            for model, prompt in zip((large, *experts, *bases), prompts, strict=True)
        ]
        k = len(experts)
        experts_, bases_ = np.stack(each[1 : 1 + k]), np.stack(each[1 + k :])
        return np.asarray(compiled(moved)(each[0], experts_, bases_)[0])

    return logits_after


@pytest.fixture(scope="module")
def ensemble():
    return fused_ensemble()[0]


@pytest.fixture(scope="module")
def fused(ensemble):
    return generate(
        ensemble,
        PROMPTS,
        others=THEIRS,
        max_new_tokens=8,
        options=DecodeOptions(logprobs=True, info=True),
    )


def test_every_model_reads_its_own_prompt(ensemble, fused):
    assert [group.streams for group in ensemble.plan.groups] == [(0,), (1, 2, 3)]
    for i, prompt in enumerate(PROMPTS):
        prompts = [prompt, THEIRS[0][i], prompt, THEIRS[2][i]]
        after = fused_after(decoder(), [small(1), small(2)], [small(3)], prompts)
        expected = slow_greedy(lambda ids, f=after: f(ids), [], 8)
        assert fused.rows()[i] == expected
    assert fused.info["size"].shape == (8, 3)


@pytest.mark.slow
def test_calls_of_their_own_change_nothing(fused):
    apart = Ensemble(
        decoder(), experts=[small(1), small(2)], bases=[small(3)], fuse=moved, stack=False
    )
    assert len(apart.plan.groups) == 4
    out = generate(apart, PROMPTS, others=THEIRS, max_new_tokens=8)
    np.testing.assert_array_equal(out.tokens, fused.tokens)


@pytest.mark.every_change
@pytest.mark.slow
def test_slots_hold_several_models(ensemble, fused):
    engine = Engine(ensemble, slots=2, max_length=32)
    rows = []
    for slot, row in ((1, 0), (0, 2)):
        others = [None if o is None else o[row] for o in THEIRS]
        request = Request(prompt=PROMPTS[row], others=others, max_new_tokens=8)
        rows.append(np.asarray(engine.prefill(slot, request).tokens).tolist())
        chunk = engine.decode_chunk(7)
        rows[-1] += np.asarray(chunk.tokens)[slot].tolist()
    assert rows == [fused.rows()[0], fused.rows()[2]]


def test_scores_are_of_the_fused_distribution(ensemble, fused):
    out = score(ensemble, PROMPTS, fused.rows(), others=THEIRS, block=4)
    more = [None if o is None else [*o, o[0]] for o in THEIRS]
    with pytest.raises(ValueError, match="others: expected"):
        score(ensemble, PROMPTS, fused.rows(), others=more)
    np.testing.assert_allclose(out.logprobs, fused.logprobs, atol=1e-4)
    assert out.greedy.all()


def test_scores_of_one_model_are_its_log_probs():
    ends = [[4, 5], [6], [7, 8, 9, 10, 11]]
    out = score(decoder(), PROMPTS, ends, block=4)
    np.testing.assert_array_equal(out.where.sum(axis=1), [2, 1, 5])
    for i, (prompt, end) in enumerate(zip(PROMPTS, ends, strict=True)):
        for n, token in enumerate(end):
            logits = next_logits(decoder(), [*prompt, *end[:n]])
            expected = logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            np.testing.assert_allclose(out.logprobs[i, n], expected, atol=1e-4)
            assert out.greedy[i, n] == (token == logits.argmax())


def test_anybodys_model_steps_too():
    triple = bag_of_words(3, CONFIG.vocab_size)
    out = generate(triple, PROMPTS, max_new_tokens=6)
    for row, prompt in zip(out.rows(), PROMPTS, strict=True):
        assert row == slow_greedy(lambda ids: bag_logits(triple[1], ids), prompt, 6)
    others = [bag_of_words(3, CONFIG.vocab_size, seed) for seed in (1, 2)]
    mixed = Ensemble(triple, experts=others[:1], bases=others[1:], fuse=moved)
    out = generate(mixed, PROMPTS, max_new_tokens=4)

    def after(ids):
        large, expert, base = (bag_logits(each[1], ids) for each in (triple, *others))
        return large + 0.7 * (expert - base)

    assert out.rows()[1] == slow_greedy(after, PROMPTS[1], 4)
    with pytest.raises(ValueError, match="rows, got 3"):
        generate(triple, PROMPTS[:2], max_new_tokens=2)


def test_one_pass_may_give_several_models_logits():
    apply_fn, params, empty = bag_of_words(3, CONFIG.vocab_size)

    def both(params, tokens, positions, cache):
        logits, cache = apply_fn(params, tokens, positions, cache)
        return jnp.stack([logits, jnp.roll(logits, 1, -1), -logits]), cache

    model = CachedModel(
        apply=both,
        params=params,
        init_cache=lambda rows, length: jax.tree.map(lambda leaf: leaf[:rows], empty),
        vocab_size=CONFIG.vocab_size,
        experts=1,
        bases=1,
    )
    out = generate(Ensemble(model, fuse=moved), PROMPTS, max_new_tokens=4)

    def after(ids):
        logits = bag_logits(params, ids)
        return logits + 0.7 * (np.roll(logits, 1) + logits)

    assert out.rows()[0] == slow_greedy(after, PROMPTS[0], 4)


def test_vocabularies_of_different_widths_meet_in_the_common_part():
    def seen(large, experts, bases, vocab_where=None):
        assert vocab_where is not None
        return jnp.where(vocab_where, large + experts[0], -jnp.inf), {}

    apply_fn, params, empty = bag_of_words(3, CONFIG.vocab_size)

    def narrow(params, *args):
        logits, cache = apply_fn(params, *args)
        return logits[..., :50], cache

    large = bag_of_words(3, CONFIG.vocab_size, 1)
    out = generate(
        Ensemble(large, experts=[(narrow, params, empty)], fuse=seen), PROMPTS, max_new_tokens=6
    )
    assert out.tokens.max() < 50


def test_wrong_line_ups_are_named():
    with pytest.raises(ValueError, match="fuse"):
        Ensemble(decoder(), experts=[decoder(1)])
    with pytest.raises(ValueError, match="bases: expected one or 3"):
        Ensemble(decoder(), experts=[decoder(1)] * 3, bases=[decoder(2)] * 2, fuse=moved)
