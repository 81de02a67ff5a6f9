"""A model and its assistant in one pass: the tokens and logits of decoding the two apart."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax import decoding, fusion, models, unlearning
from logitjax.models import Decoder, with_layout
from logitjax.unlearning import Assistant, Row
from logitjax.unlearning._unlearn_update import make_update
from tests._modules import with_weights
from tests.decoding._models import CONFIG, NEW, PROMPTS, decoder

# Vocabulary of 64: a rate at which the filter changes some tokens and leaves others.
DIFFERENCE = fusion.LogitDifference(alpha=0.9, filter="clean", rate=1e-3)


@pytest.fixture(scope="module")
def pair():
    target = decoder()
    fresh = Assistant.init(target, 1, rank=4, alpha=8.0, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), fresh.lora)
    return target, Assistant(base=fresh.base, lora=noisy)


def apart(assistant: Assistant) -> decoding.CachedModel:
    """The assistant as a model of its own."""
    graphdef, state = nnx.split(assistant.base)

    def apply(params, tokens, positions, cache):
        model = nnx.merge(graphdef, params["state"])
        hidden, cache = model.hidden_states(
            tokens, positions=positions, cache=cache, lora=params["lora"]
        )
        return model.logits(hidden), cache

    params = {"state": nnx.to_pure_dict(state), "lora": assistant.lora}
    return decoding.CachedModel(
        apply=apply, params=params, init_cache=assistant.base.init_cache, vocab_size=64
    )


@pytest.mark.slow
@pytest.mark.every_change
def test_same_tokens_and_log_probabilities_as_two_models(pair):
    target, assistant = pair
    options = decoding.DecodeOptions(logprobs=True, info=True)
    together = decoding.Ensemble(assistant.beside(target), fuse=DIFFERENCE)
    separate = decoding.Ensemble(target, experts=[apart(assistant)], fuse=DIFFERENCE)
    ours, two_models = (
        decoding.generate(model, PROMPTS, max_new_tokens=NEW, options=options)
        for model in (together, separate)
    )
    np.testing.assert_array_equal(ours.tokens, two_models.tokens)
    np.testing.assert_allclose(ours.logprobs, two_models.logprobs, atol=2e-4)
    np.testing.assert_array_equal(ours.info["changed"], two_models.info["changed"])
    alone = decoding.generate(target, PROMPTS, max_new_tokens=NEW)
    assert (alone.tokens != ours.tokens).any()


@pytest.mark.slow
@pytest.mark.every_change
def test_a_relative_assistant_says_what_its_adapters_add(pair):
    target, assistant = pair
    deployed = unlearning.Deployed.less(target, assistant.lora, 0.7, relative=True)
    prompt, continuation = [3, 1, 4], [1, 5, 9, 2]
    tokens = np.array([prompt + continuation], np.int32)

    @jax.jit
    def oracle(target, base, lora):
        model, small = nnx.merge(graphdef, target), nnx.merge(first, base)
        adds = small.logits(small.hidden_states(tokens, lora=lora)[0]) - small(tokens)
        return jax.nn.log_softmax(model(tokens) - 0.7 * adds)

    (graphdef, state), (first, base) = nnx.split(target), nnx.split(assistant.base)
    want = np.asarray(oracle(state, base, assistant.lora))[0, range(2, 6), continuation]
    ours = decoding.score(deployed.line_up(), [prompt], [continuation])
    np.testing.assert_allclose(ours.logprobs[0][:4], want, atol=2e-4)
    where = np.arange(7)[None] >= 3
    np.testing.assert_allclose(deployed.nll(tokens, where)[0][where], -want, atol=2e-4)


@pytest.mark.slow
@pytest.mark.every_change
def test_rows_do_not_mix_and_slots_are_independent(pair):
    model = decoding.Ensemble(pair[1].beside(pair[0]), fuse=DIFFERENCE)
    together = decoding.generate(model, PROMPTS, max_new_tokens=NEW)
    engine = decoding.Engine(model, slots=2, max_length=32)
    rows = {}
    for slot, i in ((0, 1), (1, 0), (0, 2)):
        request = decoding.Request(prompt=PROMPTS[i], max_new_tokens=NEW)
        first = np.asarray(engine.prefill(slot, request).tokens).reshape(-1)
        rest = np.asarray(engine.decode_chunk(NEW - 1).tokens)[slot]
        rows[i] = [*first.tolist(), *rest.tolist()]
    for i, tokens in rows.items():
        assert tokens == together.tokens[i].tolist()


def test_alpha_zero_is_the_target_whose_weights_are_used_as_they_are(pair):
    target, assistant = pair
    model = assistant.beside(target)
    params = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.params["model"])}
    mine = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(nnx.state(target))}
    assert params == mine
    off = decoding.Ensemble(model, fuse=fusion.LogitDifference(alpha=0.0))
    continuations = [[3, 1, 4, 1], [5, 9], [2]]
    ours, of_target = (decoding.score(m, PROMPTS, continuations) for m in (off, target))
    np.testing.assert_allclose(ours.logprobs, of_target.logprobs, atol=2e-5)


def test_an_assistant_of_another_model_is_refused(pair):
    _, assistant = pair
    small = dataclasses.replace(CONFIG, vocab_size=32)
    other = with_weights(lambda: Decoder(small, rngs=nnx.Rngs(0), layout="listed"))
    with pytest.raises(ValueError, match="assistant: expected the first layers"):
        assistant.beside(other)
    stacked = with_layout(decoder(), "stacked")
    assert assistant.beside(stacked).experts == 1


@pytest.mark.slow
@pytest.mark.every_change
def test_weights_are_distilled_to_what_is_served(pair, tmp_path):
    target, assistant = pair
    # An adapter file has another scale than 1 nowhere.
    unlearning.Deployed.less(target, assistant.lora, 0.7, relative=True).save(tmp_path)
    method = unlearning.METHODS.parse(f"distilled(of={str(tmp_path)!r}, retain_weight=2)")
    side = {"tokens": np.array([[3, 1, 4, 1, 5]], np.int32), "mask": np.arange(5)[None] >= 2}
    other = {"tokens": np.array([[2, 7, 1, 8, 2]], np.int32), "mask": np.arange(5)[None] >= 3}
    loss_fn, before = method.make_loss(target)
    lora, alpha = method.fixed(target.config, None)

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, state)
        small, means = nnx.merge(first, base), []
        for rows in (side, other):
            tokens = rows["tokens"]
            adds = small.logits(small.hidden_states(tokens, lora=lora)[0]) - small(tokens)
            served, now = (
                jax.nn.log_softmax(z) for z in (model(tokens) - alpha * adds, model(tokens))
            )
            values = (np.e**served * (served - now)).sum(-1)[:, :-1]
            means.append(values[rows["mask"][:, 1:]].mean())
        return means, loss_fn(params, {"forget": side, "retain": other}, None, params)[0]

    (graphdef, state), (first, base) = nnx.split(target), nnx.split(assistant.base)
    (forget, retain), loss = both(before)
    np.testing.assert_allclose(loss, forget + 2 * retain, rtol=1e-4)
    assert loss > 0.01
    questions = unlearning.Questions.of({}, models.load_tokenizer("tiny"))
    with pytest.raises(ValueError, match="of: expected a folder with an assistant, got none"):
        unlearning.METHODS.parse("distilled").check(target, questions)


@pytest.mark.slow
def test_rows_are_taught_again_through_what_is_served():
    model, tokenizer = models.load("tiny")
    model = with_layout(model, "listed")
    rows = [Row(prompt=f"{n}? ", answer=f"it is {7 * n}") for n in range(4)]
    questions = unlearning.Questions.of({"forget": rows}, tokenizer)
    fresh = Assistant.init(model, 1, rank=4, key=jax.random.key(0))
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda leaf: np.float32(0.1 * rng.normal(size=leaf.shape)), fresh.lora)
    served = unlearning.Deployed.less(model, lora, 1.0, relative=True)
    records = unlearning.relearning(served, questions, rates=(1e-2,), steps=(10,))
    before = questions.probabilities(served, "forget")
    # Adapters of random weights learn little; what is not learnt is taught four times as long.
    assert records[-1]["taught"] > 1.2 * before.max()
    assert [record["steps"] for record in records] == [10, 20, 30, 40]
    assert records[-1]["worst"] >= records[-1]["others"]


@pytest.mark.slow
@pytest.mark.every_change
def test_packed_rows_are_distilled_as_rows_alone_from_states_computed_once(tmp_path):
    model, tokenizer = models.load("tiny")
    model = with_layout(model, "listed")
    rng, fresh = np.random.default_rng(1), Assistant.init(model, 1, rank=4, key=jax.random.key(0))
    lora = jax.tree.map(lambda leaf: np.float32(0.1 * rng.normal(size=leaf.shape)), fresh.lora)
    unlearning.Deployed.less(model, lora, 1.0, relative=True).save(tmp_path)
    method = unlearning.METHODS.parse(f"distilled(of={str(tmp_path)!r}, retain_weight=2)")
    parts = {
        part: [Row(prompt=f"{part} {n}? ", answer=f"it is {n * number}") for n in range(6)]
        for number, part in enumerate(("forget", "train", "stranger"), 7)
    }
    texts = {"train": rng.integers(1, 99, (8, 64), np.int32)}
    questions = unlearning.Questions.of(parts, tokenizer, texts=texts)
    config = unlearning.UnlearnConfig(method=method, steps=12, adapters=False)
    update = make_update(model, questions, config, ways=("asked", "in context"))
    alone, _ = method.make_loss(model)
    alone, packed = jax.jit(alone), jax.jit(update.loss_fn)
    # The weights have changed since the states were computed.
    now = jax.tree.map(lambda x: x + np.float32(0.02 * rng.normal(size=x.shape)), update.constants)
    # Text shorter than the longest row counts too, each piece with its last quarter.
    longer = dataclasses.replace(questions, texts={"train": texts["train"][:, :8]})
    retain = make_update(model, longer, config, ways=("in context",)).batches(0)["retain"]
    short = [n for n in range(retain["segments"].max() + 1) if (retain["segments"] == n).sum() == 8]
    assert short
    assert all(retain["mask"][retain["segments"] == n].sum() == 2 for n in short)
    seen = set()
    for step in range(12):
        batch, rows = update.batches(step), {}
        for side, lines in batch.items():
            each = [lines["segments"] == n for n in range(lines["segments"].max() + 1)]
            pairs = [(lines["tokens"][at], lines["mask"][at]) for at in each]
            rows[side] = Row.padded(pairs, lines["tokens"].shape[1])
            seen |= {ids.tobytes() for ids, _ in pairs}
        if not step:
            expected = alone(now, rows, None, update.constants)[0]
            loss = packed(now, batch, None, update.constants)[0]
            np.testing.assert_allclose(loss, expected, rtol=1e-4)
    # Each in every way, those that the command made and strangers included.
    for row in (row for part in parts.values() for row in part):
        for way in ("asked", "in context"):
            ids, _ = questions.encode(questions.changed(row, way), way)
            assert ids.astype(np.int32).tobytes() in seen


@pytest.mark.slow
@pytest.mark.every_change
def test_the_bound_of_what_is_kept_is_the_loss_on_the_rows_of_its_steps():
    model, tokenizer = models.load("tiny", layout="listed")
    parts = {
        part: [Row(prompt=f"{part} {n}? ", answer="it is" + n * " so") for n in range(3)]
        for part in ("forget", "train")
    }
    # The first token of a window has nothing before it: it is no target.
    texts = {"train": np.random.default_rng(1).integers(1, 99, (8, 12), np.int32)}
    questions = unlearning.Questions.of(parts, tokenizer, texts=texts)
    config = unlearning.UnlearnConfig(method=unlearning.METHODS.parse("pdu"), steps=2)
    update = make_update(model, questions, config)

    @jax.jit
    def summed(tokens, mask):
        logits = jax.nn.log_softmax(model(tokens[:, :-1]).astype(np.float32))
        nll = -jax.numpy.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (nll * mask[:, 1:]).sum(), mask[:, 1:].sum()

    kept = [update.batches(step)["retain"] for step in range(2)]
    nats, targets = np.sum([summed(rows["tokens"], rows["mask"]) for rows in kept], axis=0)
    np.testing.assert_allclose(update.method.bound, 1.05 * nats / targets, rtol=1e-5)
