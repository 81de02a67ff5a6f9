import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from logitjax.decoding import (
    DraftControl,
    Engine,
    Ensemble,
    PromptReader,
    Request,
    Sampling,
    TextOptions,
    generate,
)
from logitjax.models import Cache, DraftHead
from logitjax.storage.weights import SafetensorsSource
from tests._compiled import compiled
from tests.decoding._bags import bag_of_words
from tests.decoding._models import PROMPTS, decoder, disturbed
from tests.decoding.test_speculate import Scripted, mean

TOKENS = np.arange(0, 64, 2)


@functools.cache
def head(rank: int = 0) -> DraftHead:
    # Of 64 tokens every other one, so that some of the model's can never be drafted.
    return DraftHead.of(decoder(), tokens=TOKENS, rank=rank)


@pytest.mark.many_programs("a head unrolled, and decoded step by step")
def test_decoding_repeats_what_training_unrolls():
    model, local = decoder(), head()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32)
    steps, at = 3, 5

    @nnx.jit
    def run(model, local):
        model.hidden_states(tokens, entering=(entering := []))
        features = jnp.concatenate([entering[i] for i in local.layers], axis=-1)
        embedded = model.embedding[...][tokens[:, 1:]]
        unrolled = local.unrolled(features[:, :-1], embedded, steps)
        cache = Cache.init(local.config, 2, 16)
        places = jnp.broadcast_to(jnp.arange(1, at + 1), (2, at))
        streams, cache = local.step(local.fuse(features[:, :at]), embedded[:, :at], places, cache)
        ours = [streams[:, -1:]]
        for i in range(1, steps):
            stream, cache = local.step(
                ours[-1], embedded[:, at + i - 1 : at + i], places[:, -1:] + i, cache
            )
            ours.append(stream)
        return unrolled, ours

    unrolled, ours = run(model, local)
    for whole, one in zip(unrolled, ours, strict=True):
        np.testing.assert_allclose(whole[:, at - 1], one[:, 0], atol=1e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_files_are_those_of_eagle_3(tmp_path, rank):
    local = head(rank)
    local.save(tmp_path)
    assert DraftHead.is_at(tmp_path)
    assert not DraftHead.is_at(tmp_path / "none")
    loaded = DraftHead.load(tmp_path, decoder().config)
    assert loaded.layers == local.layers
    jax.tree.map(
        np.testing.assert_array_equal,
        *(nnx.to_pure_dict(nnx.state(one)) for one in (loaded, local)),
    )
    source = SafetensorsSource(tmp_path)
    np.testing.assert_array_equal(source.read("d2t") + np.arange(32), TOKENS)
    assert source.shape("midlayer.self_attn.q_proj.weight") == (32, 32)
    wrong = dataclasses.replace(decoder().config, hidden_size=8)
    with pytest.raises(ValueError, match="expected a draft head of a model with 8 hidden units"):
        DraftHead.load(tmp_path, wrong)


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.many_programs("plain and drafted decoding of a line-up")
def test_greedy_tokens_are_those_of_plain_decoding(fused):
    # Rings of 6 slots; between rounds plain steps, which the head has to catch up with.
    model = Ensemble(decoder(), experts=[disturbed(1)], fuse=mean) if fused else decoder()
    prompts = [*PROMPTS, 5 * [3, 4, 5, 6, 7, 8, 9]]
    settings = [Sampling(), Sampling(temperature=0.8, top_k=9, seed=3), Sampling(), Sampling()]
    given = dict(max_new_tokens=14, sampling=settings)
    plain = generate(model, prompts, **given)
    drafts = Scripted(3, 3, 0, 1, draft=head())
    out = generate(model, prompts, **given, drafts=drafts, text=TextOptions(chunk=4))
    np.testing.assert_array_equal(out.tokens[[0, 2, 3]], plain.tokens[[0, 2, 3]])
    assert out.drafting.tested.sum() > 0
    assert out.drafting.length == 1 + out.drafting.accepted.sum() / out.drafting.rounds.sum()


def test_a_draft_head_expects_a_decoder():
    with pytest.raises(ValueError, match="draft: a draft head expects a decoder"):
        Engine(bag_of_words(1, 64, 0), slots=1, max_length=8, drafts=DraftControl(head()))


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("an engine whose prompts are read in pieces")
def test_a_slot_filled_again_and_a_shared_beginning_are_read_right():
    model = decoder()
    control = DraftControl(head(), (2,))
    engine = Engine(model, slots=2, max_length=48, drafts=control, rings=False)
    reader = PromptReader(engine, rows=2, chunk=16, prefix_bytes=1 << 20)
    begin = list(range(1, 25))

    def drafted(prompt):
        request = Request(prompt=prompt, max_new_tokens=12)
        row = reader.begin(request)
        while row not in reader.advance():
            pass
        tokens = reader.place(row, 1, request).tokens.tolist()
        reader.release(row)
        counts = []
        while engine.active.any():
            emitted, stats = engine.speculate(2)
            tokens += np.asarray(emitted.tokens)[1][np.asarray(emitted.valid)[1]].tolist()
            counts.append(int(np.asarray(stats.accepted)[1]))
        return tokens, counts

    first = drafted([*begin, 30])
    other = drafted([7, 8, 9])
    again = drafted([*begin, 30])
    assert reader.tokens_reused
    assert first == again
    for prompt, (tokens, _) in (([*begin, 30], first), ([7, 8, 9], other)):
        assert tokens == generate(model, [prompt], max_new_tokens=12).rows()[0]


@pytest.mark.slow
def test_sampled_tokens_follow_the_model():
    model, prompt, rows = decoder(), [5, 6, 7], 4000
    sampling = Sampling(temperature=0.7, seed=11)
    out = generate(
        model, [prompt] * rows, max_new_tokens=3, sampling=sampling, drafts=DraftControl(head(), 2)
    )
    assert out.drafting.accepted.sum() > 100

    def law(tokens):
        logits = np.asarray(compiled(type(model).__call__)(model, np.array([tokens])))[0, -1]
        p = np.exp((logits - logits.max()) / 0.7)
        return p / p.sum(dtype=float)

    likely = np.bincount(out.tokens[:, 0], minlength=64).argmax()
    among = out.tokens[out.tokens[:, 0] == likely, 1]
    for seen, p in ((out.tokens[:, 0], law(prompt)), (among, law([*prompt, int(likely)]))):
        often = len(seen) * p > 5
        counts = np.bincount(seen, minlength=64)
        table = np.append(counts[often], counts[~often].sum())
        expected = np.append(len(seen) * p[often], len(seen) * p[~often].sum())
        assert stats.chisquare(table, expected).pvalue > 1e-3
