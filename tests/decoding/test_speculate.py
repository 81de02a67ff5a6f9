import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from logitjax import fusion, training
from logitjax.decoding import (
    CachedModel,
    DecodeOptions,
    DraftControl,
    Engine,
    Ensemble,
    Request,
    Sampling,
    TextOptions,
    generate,
)
from logitjax.decoding._sampling import sampling_logits, sampling_rows
from logitjax.decoding._speculate import accept_or_redraw
from logitjax.fusion._token_map import TokenMap
from logitjax.models import DECODER_RULES, from_nnx, load_tokenizer
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE
from tests.decoding._bags import bag_logits, bag_of_words
from tests.decoding._models import PROMPTS, decoder, disturbed

VOCAB = 5


def mixed(large, experts, bases, vocab_where=None):
    return 0.6 * large + 0.7 * experts[0], {"gap": jnp.abs(large - experts[0]).max(-1)}


def bags(rows, vocab=VOCAB, seeds=(0, 1)):
    return Ensemble(
        bag_of_words(rows, vocab, seeds[0]),
        experts=[bag_of_words(rows, vocab, seeds[1])],
        fuse=mixed,
    )


class Scripted(DraftControl):
    """Lengths in a fixed order."""

    def __init__(self, *lengths, draft=1):
        super().__init__(draft, tuple(sorted({*lengths} - {0})))
        self.order = itertools.cycle(lengths)

    def choose(self, kind=None):
        return next(self.order)


REPORTED = DecodeOptions(logprobs=True, top_logprobs=2, info=True)


def mean(large, experts, bases, vocab_where=None):
    return large + experts.mean(0), {"size": jnp.abs(experts[0] - large).max(-1)}


@pytest.mark.every_change
@pytest.mark.slow
def test_greedy_is_plain_decoding():
    # Rings of 6 slots, the drafting member in a stack, drafts rejected soon and late.
    model = Ensemble(decoder(), experts=[disturbed(1), disturbed(2)], fuse=mean)
    plain = generate(model, PROMPTS, max_new_tokens=14, options=REPORTED)
    out = generate(
        model,
        PROMPTS,
        max_new_tokens=14,
        options=REPORTED,
        drafts=Scripted(3, 1, 3, 0, draft=2),
        text=TextOptions(chunk=4),
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.top_ids, plain.top_ids)
    np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    np.testing.assert_allclose(out.info["size"], plain.info["size"], rtol=1e-3)
    drafting = out.drafting
    assert {length for length, _, _ in drafting.calls} == {0, 1, 3}
    assert 0.2 < drafting.acceptance < 0.95
    assert (drafting.accepted <= drafting.tested).all()


@pytest.mark.parametrize("draft", ["prompt", pytest.param("model", marks=EVERY_CHANGE)])
def test_who_is_no_member_drafts_what_plain_decoding_says(draft):
    # Rings of 6 slots; between rounds plain steps, which the drafting model has to catch up with.
    model = Ensemble(decoder(), experts=[disturbed(1)], fuse=mean)
    prompts = [3 * [5, 6, 7, 8], *PROMPTS[1:]]
    settings = [Sampling(), Sampling(temperature=0.8, top_k=9, seed=3), Sampling()]
    given = dict(max_new_tokens=14, options=REPORTED, sampling=settings)
    plain = generate(model, prompts, **given)
    small = draft if draft == "prompt" else disturbed(1)
    drafts = Scripted(3, 3, 0, draft=small)
    out = generate(model, prompts, **given, drafts=drafts, text=TextOptions(chunk=4))
    # Copies are certain: where one is refused the draw is that of a plain step.
    rows = slice(None) if draft == "prompt" else [0, 2]
    np.testing.assert_array_equal(out.tokens[rows], plain.tokens[rows])
    np.testing.assert_allclose(out.logprobs[rows], plain.logprobs[rows], atol=1e-4)
    drafting = out.drafting
    assert 0 < drafting.accepted.sum() <= drafting.tested.sum()


@pytest.mark.every_change
@pytest.mark.slow
def test_a_slot_filled_again_is_drafted_from_its_own_text():
    model, prompts = decoder(), [[9, 8, 7, 6, 5], [9, 8, 4, 4, 4, 4, 4]]
    engine = Engine(model, slots=1, max_length=32, drafts=DraftControl(decoder(), (2,)))
    for prompt in prompts:
        tokens = engine.prefill(0, Request(prompt=prompt, max_new_tokens=8)).tokens.tolist()
        while engine.active.any():
            emitted, drafted = engine.speculate(2)
            tokens += np.asarray(emitted.tokens)[np.asarray(emitted.valid)].tolist()
            # The same model is always right, if it has read the same.
            np.testing.assert_array_equal(drafted.accepted, drafted.tested)
        assert tokens == generate(model, [prompt], max_new_tokens=8).rows()[0]


@pytest.mark.slow
def test_sharded_speculation_equals_local():
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    rules = DECODER_RULES

    def spread(model):
        apply_fn, params = from_nnx(model)
        return nnx.merge(apply_fn.graphdef, rules.place(params, mesh))

    def run(put, options):
        large, expert = put(decoder()), put(disturbed(1))
        return generate(
            Ensemble(large, experts=[expert], fuse=mean),
            [*PROMPTS, PROMPTS[0]],
            max_new_tokens=8,
            options=options,
            drafts=DraftControl(draft=1, lengths=2),
            text=TextOptions(chunk=3),
        )

    local = run(lambda model: model, DecodeOptions(logprobs=True))
    sharded = run(spread, DecodeOptions(logprobs=True, mesh=mesh))
    np.testing.assert_array_equal(sharded.tokens, local.tokens)
    np.testing.assert_allclose(sharded.logprobs, local.logprobs, atol=1e-4)
    calls = ([call[:2] for call in out.drafting.calls] for out in (sharded, local))
    assert next(calls) == next(calls)


@pytest.mark.every_change
@pytest.mark.slow
def test_redrawn_drafts_follow_the_target():
    count = 60_000
    logits = np.float32([1.5, 1.0, 0.0, -0.5, -1.0, -np.inf])
    draft = np.float32([-1.0, 2.0, 0.5, -np.inf, 0.0, 1.0])
    setting = Sampling(temperature=0.8, top_p=0.97)
    rows = sampling_rows([dataclasses.replace(setting, seed=i) for i in range(count)])
    turns = np.zeros(count, np.int32)
    wide, q = (np.broadcast_to(x, (count, 6)) for x in (logits, draft))
    of_draft = np.exp(draft) / np.exp(draft).sum()
    drafted = np.random.default_rng(3).choice(6, count, p=of_draft / of_draft.sum(dtype=float))
    drafted = drafted.astype(np.int32)
    run = compiled(accept_or_redraw)
    drawn = np.asarray(run(wide, q, drafted, rows, turns))
    p = compiled(sampling_logits)(wide[:1], sampling_rows([setting]))
    p = np.exp(np.asarray(p, float)[0])
    p /= p.sum()
    seen = np.bincount(drawn, minlength=6)
    assert (seen[p == 0] == 0).all()
    assert stats.chisquare(seen[p > 0], count * p[p > 0] / p.sum()).pvalue > 1e-3
    # As many are accepted as can be.
    overlap = np.minimum(p, of_draft).sum()
    assert abs((drawn == drafted).mean() - overlap) < 4 * 0.5 / count**0.5
    alone = run(wide, q, drafted, rows, turns, present=False)
    seen = np.bincount(np.asarray(alone), minlength=6)
    assert stats.chisquare(seen[p > 0], count * p[p > 0] / p.sum()).pvalue > 1e-3


def exact(model, prompt, steps, temperature):
    """Probability of every continuation under the fused distribution, float64."""
    large, small = model.params
    p = {}
    for ids in itertools.product(range(VOCAB), repeat=steps):
        total = 0.0
        for n, token in enumerate(ids):
            context = [*prompt, *ids[:n]]
            logits = 0.6 * bag_logits(large, context) + 0.7 * bag_logits(small, context)
            logits = logits.astype(np.float64) / temperature
            total += logits[token] - np.logaddexp.reduce(logits)
        p[ids] = np.exp(total)
    return np.array(list(p.values()))


@pytest.mark.parametrize(
    "lengths", [*(pytest.param(n, marks=EVERY_CHANGE) for n in ((1,), (3,))), (3, 0, 1)], ids=str
)
def test_continuations_follow_the_fused_distribution(lengths):
    rows, steps, prompt = 4000, 3, [1, 4]
    model = bags(rows)
    out = generate(
        model,
        [prompt] * rows,
        max_new_tokens=steps,
        sampling=Sampling(temperature=0.9, seed=11),
        drafts=Scripted(*lengths),
        text=TextOptions(chunk=1),
    )
    assert 0.3 < out.drafting.acceptance < 0.9
    code = (out.tokens * VOCAB ** np.arange(steps)[::-1]).sum(1)
    seen = np.bincount(code, minlength=VOCAB**steps)
    expected = rows * exact(model, prompt, steps, 0.9)
    often = expected > 5
    assert (
        stats.chisquare(
            [*seen[often], seen[~often].sum()], [*expected[often], expected[~often].sum()]
        ).pvalue
        > 1e-3
    )


@pytest.mark.every_change
@pytest.mark.slow
def test_rows_end_where_plain_rows_end():
    model, tokenizer = bags(3, vocab=64), load_tokenizer("tiny")
    text = TextOptions(tokenizer=tokenizer)
    free = generate(model, PROMPTS, max_new_tokens=12, text=text)
    stop = int(free.tokens[1, 5])
    drafts = DraftControl(lengths=3)
    plain = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[stop])
    out = generate(model, PROMPTS, max_new_tokens=12, stop_ids=[stop], text=text, drafts=drafts)
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(out, name), getattr(plain, name))
    end = free.texts[1][2:4]
    shown: list[tuple[int, str]] = []
    watched = TextOptions(
        tokenizer=tokenizer,
        stop_strings=[end],
        stream=lambda row, tokens, piece: shown.append((row, piece)),
    )
    out = generate(model, PROMPTS, max_new_tokens=12, text=watched, drafts=drafts)
    for row in range(3):
        assert out.texts[row] == free.texts[row].partition(end)[0]
        assert "".join(piece for r, piece in shown if r == row) == out.texts[row]
    assert out.stopped[1]


@pytest.mark.every_change
@pytest.mark.slow
def test_slots_speculate_and_step_by_turns():
    model = bags(2, vocab=64)
    plain = generate(model, PROMPTS[:2], max_new_tokens=12)
    engine = Engine(model, slots=2, max_length=32, drafts=DraftControl(lengths=(3,)))
    rows: list[list[int]] = [[], []]

    def take(emitted):
        for slot in range(2):
            emitted_here = np.asarray(emitted.valid)[slot]
            rows[slot] += np.asarray(emitted.tokens)[slot][emitted_here].tolist()

    rows[0] += engine.prefill(0, Request(prompt=PROMPTS[0], max_new_tokens=12)).tokens.tolist()
    take(engine.speculate(3, 1)[0])
    rows[1] += engine.prefill(1, Request(prompt=PROMPTS[1], max_new_tokens=12)).tokens.tolist()
    take(engine.decode_chunk(2))
    while engine.active.any():
        emitted, drafted = engine.speculate(3, 1)
        take(emitted)
        assert (np.asarray(drafted.accepted) <= np.asarray(drafted.tested)).all()
    assert rows == plain.rows()


@pytest.mark.every_change
@pytest.mark.slow
def test_small_models_with_other_token_ids_draft():
    order = np.random.default_rng(0).permutation(64)
    apply_fn, params, empty = bag_of_words(3, 64, seed=1)
    params = np.asarray(params)
    small = (apply_fn, params[order][:, order], empty)
    # Token i of the large model is token small_ids[i] of the small one.
    mapping = TokenMap(np.argsort(order), 64)
    fuse = fusion.OverlapFusion(strategy=fusion.ProxyTuning(alpha=0.5), token_map=mapping)
    base = (apply_fn, 0 * params, empty)
    # The large model's vocabulary is padded, as embeddings often are.
    large = (apply_fn, np.pad(params, (0, 2)), empty)
    model = Ensemble(large, experts=[small], bases=[base], fuse=fuse)
    plain = generate(model, PROMPTS, max_new_tokens=8)
    for drafts in (DraftControl(lengths=2), DraftControl(small, 2, token_map=mapping)):
        out = generate(model, PROMPTS, max_new_tokens=8, drafts=drafts)
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        # With ids mapped, the small model is the large one.
        np.testing.assert_array_equal(out.drafting.accepted, out.drafting.tested)


def test_a_draft_that_agrees_is_always_accepted():
    triple = bag_of_words(3, 64)
    model = Ensemble(triple, experts=[bag_of_words(3, 64)], fuse=mixed)
    drafts = DraftControl(lengths=3)
    settings = dict(max_new_tokens=13, drafts=drafts, text=TextOptions(chunk=4))
    out = generate(model, PROMPTS, sampling=Sampling(temperature=1 / 1.3), **settings)
    # The same distribution up to the temperature: 1 token of the prefill, then 4 a round.
    greedy = generate(model, PROMPTS, **settings).drafting
    np.testing.assert_array_equal(greedy.rounds, 3)
    np.testing.assert_array_equal(greedy.accepted, greedy.tested)
    assert out.drafting.acceptance > 0.7


def test_who_cannot_draft_is_named():
    model = bags(1)
    for arguments, message in (
        (dict(draft="base"), "1 experts and 0 bases"),
        (dict(draft=0), "index from 1 to 1"),
        (dict(lengths=(3, 2)), "ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine(model, slots=1, max_length=8, drafts=DraftControl(**arguments))
    with pytest.raises(ValueError, match="0 experts"):
        generate(decoder(), [[1]], max_new_tokens=2, drafts=DraftControl())
    with pytest.raises(ValueError, match="got one without"):
        Engine(model, slots=1, max_length=8).speculate(1)
    apply_fn, params, empty = bag_of_words(1, VOCAB)

    def both(params, tokens, positions, cache):
        logits, cache = apply_fn(params, tokens, positions, cache)
        return jnp.stack([logits, logits]), cache

    shared = CachedModel(
        apply=both, params=params, init_cache=lambda rows, n: empty, vocab_size=VOCAB, experts=1
    )
    with pytest.raises(ValueError, match="share one pass"):
        generate(Ensemble(shared, fuse=mixed), [[1]], max_new_tokens=2, drafts=DraftControl())


def test_where_nothing_is_left_of_the_target_it_is_drawn_from_as_it_is():
    """To a token of the draft that the target excludes, and too unlikely to be missed elsewhere."""
    count = 8
    target = np.tile(np.float32([-np.inf, 0.0, 0.0]), (count, 1))
    draft = np.tile(np.float32([-69.0, 0.0, 0.0]), (count, 1))
    rows = sampling_rows([Sampling(temperature=1.0, seed=i) for i in range(count)])
    drafted = np.zeros(count, np.int32)
    drawn = compiled(accept_or_redraw)(target, draft, drafted, rows, drafted)
    assert set(np.asarray(drawn).tolist()) == {1, 2}
