import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import decoding, models, training
from logitjax.decoding import DecodeOptions, Sampling, TextOptions, generate
from logitjax.decoding._generate import _generate
from logitjax.models import load_tokenizer
from tests.decoding._bags import bag_logits, bag_of_words
from tests.decoding._models import CONFIG, NEW, PROMPTS, REPORTED, decoder, next_logits, slow_greedy


def log_softmax(x):
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.fixture(scope="module")
def greedy():
    return generate(decoder(), PROMPTS, max_new_tokens=NEW, options=REPORTED)


def test_greedy_equals_the_uncached_model(greedy):
    for row, prompt in zip(greedy.rows(), PROMPTS, strict=True):
        assert row == slow_greedy(lambda ids: next_logits(decoder(), ids), prompt, NEW)


def test_log_probs_are_the_models(greedy):
    for row, prompt in enumerate(PROMPTS):
        for n in (0, 4, 11):
            context = [*prompt, *greedy.tokens[row, :n].tolist()]
            log_p = log_softmax(next_logits(decoder(), context))
            token = greedy.tokens[row, n]
            np.testing.assert_allclose(greedy.logprobs[row, n], log_p[token], atol=1e-4)
            best = np.argsort(-log_p)[:3]
            np.testing.assert_array_equal(greedy.top_ids[row, n], best)
            np.testing.assert_allclose(greedy.top_logprobs[row, n], log_p[best], atol=1e-4)


def test_stop_ids_freeze_their_rows(greedy):
    stop = int(greedy.tokens[1, 4])
    out = generate(decoder(), PROMPTS, max_new_tokens=NEW, stop_ids=[stop], options=REPORTED)
    for row, free in zip(out.rows(), greedy.rows(), strict=True):
        end = free.index(stop) + 1 if stop in free else NEW
        assert row == free[:end]
    np.testing.assert_array_equal(out.stopped, [stop in row for row in greedy.rows()])
    assert (out.tokens[1, out.lengths[1] :] == 0).all()
    assert (out.logprobs[1, out.lengths[1] :] <= 0).all()


def test_draws_depend_on_the_seed_and_not_on_the_neighbours(greedy):
    def warm(seed):
        return Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=seed)

    def draw(prompts, sampling):
        return generate(
            decoder(), prompts, max_new_tokens=NEW, sampling=sampling, options=REPORTED
        ).rows()

    together = draw(PROMPTS, warm(3))
    for i, prompt in enumerate(PROMPTS):
        alone = draw([prompt, PROMPTS[0], prompt], [warm(3 + i), Sampling(), warm(99)])
        assert alone[0] == together[i]
        assert alone[1] == greedy.rows()[0]
        assert alone[2] != alone[0]


def test_streaming_changes_nothing(greedy):
    seen: list[list[int]] = [[], [], []]
    calls = 0

    def stream(row, tokens, text):
        nonlocal calls
        calls += 1
        seen[row] += tokens
        assert text == ""

    text = TextOptions(stream=stream, chunk=4)
    out = generate(decoder(), PROMPTS, max_new_tokens=NEW, options=REPORTED, text=text)
    for name in ("tokens", "lengths", "stopped", "top_ids"):
        np.testing.assert_array_equal(getattr(out, name), getattr(greedy, name))
    np.testing.assert_allclose(out.logprobs, greedy.logprobs, atol=1e-5)
    assert seen == greedy.rows()
    # The first token, two whole chunks, and what is left of a third.
    assert calls == 3 * 4


def test_stop_strings_end_rows_between_chunks():
    tokenizer = load_tokenizer("tiny")
    texts = TextOptions(tokenizer=tokenizer)
    free = generate(decoder(), PROMPTS, max_new_tokens=NEW, text=texts, options=REPORTED)
    text = free.texts[1]
    stop = text[3:5]
    assert len(stop.encode()) == 2
    shown = []
    watched = TextOptions(
        tokenizer=tokenizer,
        stop_strings=[stop],
        stream=lambda row, tokens, text: shown.append((row, text)),
        chunk=4,
    )
    out = generate(decoder(), PROMPTS, max_new_tokens=NEW, text=watched, options=REPORTED)
    for row in range(3):
        end = free.texts[row].find(stop)
        expected = free.texts[row] if end < 0 else free.texts[row][:end]
        assert out.texts[row] == expected
        assert "".join(text for r, text in shown if r == row) == expected
        assert out.stopped[row] == (end >= 0)
        count = NEW if end < 0 else end + 2
        assert out.rows()[row] == free.rows()[row][:count]
        assert (out.tokens[row, count:] == 0).all()


def test_a_bias_and_a_penalty_move_tokens(greedy):
    banned = int(greedy.tokens[0, 0])
    out = generate(
        decoder(), PROMPTS, max_new_tokens=NEW, logit_bias={banned: -1e9}, options=REPORTED
    )
    assert banned not in out.tokens
    second = np.argsort(-next_logits(decoder(), PROMPTS[0]))[1]
    assert out.tokens[0, 0] == second
    # What is reported is the model's own distribution.
    log_p = log_softmax(next_logits(decoder(), PROMPTS[0]))
    np.testing.assert_allclose(out.logprobs[0, 0], log_p[second], atol=1e-4)
    strong = Sampling(repetition_penalty=1e6)
    out = generate(decoder(), PROMPTS, max_new_tokens=NEW, sampling=strong, options=REPORTED)
    for row, prompt in zip(out.rows(), PROMPTS, strict=True):
        assert len({*row, *prompt}) == len(row) + len(prompt)


def test_one_token_is_the_prompts_next():
    bag = bag_of_words(3, 64)
    out = generate(bag, PROMPTS, max_new_tokens=1, options=DecodeOptions(logprobs=True))
    expected = [int(bag_logits(bag[1], prompt).argmax()) for prompt in PROMPTS]
    assert out.tokens[:, 0].tolist() == expected
    assert out.tokens.shape == out.logprobs.shape == (3, 1)


@pytest.mark.every_change
@pytest.mark.slow
def test_sharded_equals_local(greedy):
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    rules = models.DECODER_RULES
    apply_fn, params = models.from_nnx(decoder())
    sharded = nnx.merge(apply_fn.graphdef, rules.place(params, mesh))
    options = DecodeOptions(logprobs=True, mesh=mesh)
    prompts = [*PROMPTS, PROMPTS[0]]
    out = generate(sharded, prompts, max_new_tokens=NEW, options=options)
    np.testing.assert_array_equal(out.tokens[:3], greedy.tokens)
    np.testing.assert_array_equal(out.tokens[3], greedy.tokens[0])
    np.testing.assert_allclose(out.logprobs[:3], greedy.logprobs, atol=1e-4)


def test_a_cache_is_split_by_rows_and_by_heads():
    mesh = training.make_mesh("data:2,fsdp:2,tensor:2")
    engine = decoding.Engine(decoder(), slots=4, max_length=32, options=DecodeOptions(mesh=mesh))
    split = {
        name for leaf in jax.tree.leaves(engine.state.cache) for name in leaf.sharding.spec if name
    }
    assert split == {("data", "fsdp"), "tensor"}


@pytest.mark.parametrize("token", [-1, CONFIG.vocab_size, 2**40])
def test_ids_out_of_the_vocabulary_are_refused_where_they_stand(token):
    line = rf"^prompt: expected 0 to {CONFIG.vocab_size - 1}, got {token} at 1$"
    for prompt in ([3, token], np.array([3, token])):
        with pytest.raises(ValueError, match=line):
            generate(decoder(), [[1, 2], prompt], max_new_tokens=NEW)
    with pytest.raises(TypeError, match="prompt: expected integers, got float64"):
        generate(decoder(), np.array([[1.5]]), max_new_tokens=NEW)


def test_what_does_not_fit_is_refused():
    for arguments, message in (
        (dict(prompts=[[], [1]], max_new_tokens=2), "at least one token"),
        (dict(prompts=[[1]], max_new_tokens=0), "max_new_tokens"),
        (dict(prompts=[[1]], max_new_tokens=2, sampling=[Sampling()] * 2), "one a prompt"),
        (dict(prompts=[[1]], max_new_tokens=2, logit_bias={CONFIG.vocab_size: 1.0}), "vocabulary"),
        (dict(prompts=[[1]], max_new_tokens=2, others=[[[1]]]), "expected 0 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(decoder(), **arguments)
    with pytest.raises(ValueError, match="tokenizer"):
        TextOptions(stop_strings=["x"])
    with pytest.raises(TypeError, match="Decoder, a CachedModel"):
        decoding.CachedModel.of(3)


def test_new_shapes_cost_at_most_one_compilation_a_bucket():
    model = decoding.Ensemble(bag_of_words(1, 16, slots=64))
    before = _generate._cache_size()
    for length, new in ((3, 2), (5, 9), (11, 16), (16, 16), (7, 1)):
        out = generate(model, [[i % 16 for i in range(length)]], max_new_tokens=new)
        assert out.tokens.shape == (1, new)
    # Prompts of up to 16 tokens, 16 new ones, and caches of 16 or 32.
    assert _generate._cache_size() - before <= 2


def test_a_row_without_probabilities_ends_and_the_coldest_sampling_is_greedy():
    logits = np.zeros((3, 4), np.float32)
    logits[:, 2], logits[1], logits[2, 0] = 1e-3, -np.inf, np.nan

    def apply_fn(params, tokens):
        return jnp.broadcast_to(params[tokens[:, :1]], (*tokens.shape, 4))

    cold = Sampling(temperature=1e-38)
    out = generate((apply_fn, logits), [[0], [1], [2]], max_new_tokens=3, sampling=cold)
    assert out.rows() == [[2, 2, 2], [], []]
    assert not out.stopped.any()
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=float("nan"))
