import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.decoding import DecodeOptions, Engine, Request, Sampling, generate
from tests.decoding._bags import bag_logits, bag_of_words
from tests.decoding._models import NEW, PROMPTS, REPORTED, decoder, next_logits


def alone(prompt, count, sampling=Sampling()):  # noqa: B008
    """By itself, in a batch of the shape the other tests compile."""
    prompts = [prompt, [1], [1]]
    out = generate(
        decoder(), prompts, max_new_tokens=NEW, sampling=[sampling] * 3, options=REPORTED
    )
    return out.rows()[0][:count]


@pytest.fixture(scope="module")
def engine():
    return Engine(decoder(), slots=3, max_length=32, options=REPORTED)


def collect(rows, slot, emitted, row):
    rows.setdefault(slot, []).extend(
        np.asarray(emitted.tokens)[row][np.asarray(emitted.valid)[row]].tolist()
    )


@pytest.mark.every_change
@pytest.mark.slow
def test_slots_are_filled_and_emptied_while_others_run(engine):
    warm = Sampling(temperature=2.0, seed=8)
    rows: dict = {}
    requests = {
        0: Request(prompt=PROMPTS[1], max_new_tokens=12),
        1: Request(prompt=PROMPTS[0], max_new_tokens=12, sampling=warm),
        2: Request(prompt=PROMPTS[2], max_new_tokens=3),
    }

    def fill(slot, request):
        first = engine.prefill(slot, request)
        rows[slot] = np.asarray(first.tokens).tolist()

    def run():
        chunk = engine.decode_chunk(4)
        for slot in range(3):
            collect(rows, slot, chunk, slot)

    fill(0, requests[0])
    run()
    fill(2, requests[2])
    run()
    fill(1, requests[1])
    run()
    np.testing.assert_array_equal(engine.active, [False, True, False])
    assert rows[0] == alone(PROMPTS[1], 12)
    assert rows[2] == alone(PROMPTS[2], 12)[:3]
    # A slot that is used again remembers nothing.
    fill(2, dataclasses.replace(requests[0], max_new_tokens=5))
    run()
    run()
    assert rows[2] == alone(PROMPTS[1], 12)[:5]
    assert rows[1] == alone(PROMPTS[0], 12, warm)
    assert not engine.active.any()


@pytest.mark.every_change
@pytest.mark.slow
def test_evicted_slots_emit_nothing(engine):
    for slot in range(2):
        engine.prefill(slot, Request(prompt=PROMPTS[slot], max_new_tokens=20))
    engine.evict(0)
    chunk = engine.decode_chunk(4)
    np.testing.assert_array_equal(np.asarray(chunk.valid).sum(axis=1), [0, 4, 0])
    assert (np.asarray(chunk.tokens)[0] == 0).all()
    engine.evict([0, 1])
    assert not engine.active.any()


def test_every_slot_has_its_own_settings(engine):
    banned = alone(PROMPTS[0], 12)[0]
    requests = [
        Request(prompt=PROMPTS[0], max_new_tokens=4, logit_bias={banned: -1e9, 3: 0.0}),
        Request(prompt=PROMPTS[0], max_new_tokens=4),
        Request(prompt=PROMPTS[0], max_new_tokens=4, stop_ids=[banned]),
    ]
    first = engine.prefill_all(requests)
    tokens = np.asarray(first.tokens)
    assert tokens[0] == np.argsort(-next_logits(decoder(), PROMPTS[0]))[1]
    assert tokens[1] == tokens[2] == banned
    np.testing.assert_array_equal(engine.active, [True, True, False])
    np.testing.assert_array_equal(engine.state.stopped, [False, False, True])


def test_processors_see_what_their_slot_was_given():
    def only(logits, state):
        allowed = jnp.arange(logits.shape[-1]) >= state.extra["least"][:, None]
        return jnp.where(allowed, logits, -jnp.inf)

    options = DecodeOptions(processors=(only,), logprobs=True, logprobs_of="adjusted")
    bag = bag_of_words(2, 64)
    engine = Engine(bag, slots=2, max_length=32, options=options, extra={"least": np.int32(0)})
    engine.prefill(0, Request(prompt=PROMPTS[0], max_new_tokens=5))
    extra = {"least": np.int32(60)}
    first = engine.prefill(1, Request(prompt=PROMPTS[0], max_new_tokens=5, extra=extra))
    tail = bag_logits(bag[1], PROMPTS[0])[60:]
    assert np.asarray(first.tokens)[0] == 60 + tail.argmax()
    expected = tail.max() - np.log(np.exp(tail).sum())
    np.testing.assert_allclose(np.asarray(first.logprobs)[0], expected, atol=1e-4)
    tokens = np.asarray(engine.decode_chunk(4).tokens)
    assert (tokens[1] >= 60).all()
    free = generate(bag, [PROMPTS[0]] * 2, max_new_tokens=5).rows()[0]
    assert tokens[0].tolist() == free[1:]


@pytest.mark.every_change
@pytest.mark.slow
def test_masks_and_counts_move_what_is_drawn_and_nothing_that_is_reported():
    def words(*tokens):
        mask = np.zeros(64, bool)
        mask[list(tokens)] = True
        return np.packbits(mask, bitorder="little").view(np.uint32)

    options = DecodeOptions(masks=True, repetition=True, top_logprobs=64)
    bag = bag_of_words(2, 64)
    engine = Engine(bag, slots=2, max_length=32, options=options)
    plain = bag_logits(bag[1], PROMPTS[0])
    log_p = np.sort(plain - np.log(np.exp(plain - plain.max()).sum()) - plain.max())[::-1]
    allowed = Request(prompt=PROMPTS[0], max_new_tokens=6, allowed=words(40, 41))
    # Once is enough: whatever was there is far below everything else.
    once = Sampling(presence_penalty=100.0)
    for slot, request in enumerate(
        (allowed, Request(prompt=PROMPTS[0], max_new_tokens=6, sampling=once))
    ):
        first = engine.prefill(slot, request)
        best = plain[[40, 41]].argmax() + 40 if slot == 0 else plain.argmax()
        assert np.asarray(first.tokens)[0] == best
        np.testing.assert_allclose(np.asarray(first.top_logprobs)[0], log_p, atol=1e-4)
    tokens = [[], []]
    for step in range(5):
        engine.allow(np.stack([words(step), words(*range(64))]))
        for slot, (token,) in enumerate(np.asarray(engine.decode_chunk(1).tokens)):
            tokens[slot].append(int(token))
    assert tokens[0] == [0, 1, 2, 3, 4]
    assert len({plain.argmax(), *tokens[1]}) == 6
    # Neither a slot that waits nor an end that comes too early changes what follows.
    free = generate(bag, [PROMPTS[0]] * 2, max_new_tokens=6).rows()[0]
    second = next(token for token in free[1:] if token != free[0])
    early = free.index(second)
    stopping = {"prompt": PROMPTS[0], "max_new_tokens": 6, "stop_ids": [second, 63]}
    engine.prefill(0, Request(prompt=PROMPTS[0], max_new_tokens=6))
    engine.prefill(1, Request(**stopping, min_new_tokens=early + 1))
    engine.allow(np.full((2, 2), 0xFFFFFFFF, np.uint32))
    rows: dict = {0: [free[0]], 1: [free[0]]}
    for waits in [[True, False], [False, True], [True, True], *[[False, False]] * 4]:
        chunk = engine.decode_chunk(1, np.array(waits))
        for slot in range(2):
            collect(rows, slot, chunk, slot)
    assert rows[0] == free
    assert rows[1][:early] == free[:early]
    assert rows[1][early] != second
    with pytest.raises(ValueError, match=r"allowed: expected shape \(2, 2\), got shape \(2, 3\)"):
        engine.allow(np.zeros((2, 3), np.uint32))


def test_wrong_requests_are_named(engine):
    plain = Engine(decoder(), slots=3, max_length=32, options=DecodeOptions(max_logit_bias=2))
    for slot, request, message in (
        (3, Request(prompt=[1], max_new_tokens=1), "slot: expected a number between 0 and 2"),
        (0, Request(prompt=[1] * 16, max_new_tokens=18), "do not fit max_length=32"),
        (0, Request(prompt=[], max_new_tokens=4), "at least one token"),
        (0, Request(prompt=[1], max_new_tokens=4, stop_ids=range(9)), "room for 8"),
        (0, Request(prompt=[1], max_new_tokens=4, logit_bias=dict.fromkeys(range(3), 1.0)), "room"),
        (
            0,
            Request(prompt=[1], max_new_tokens=4, sampling=Sampling(repetition_penalty=2.0)),
            "repetition=True",
        ),
        (0, Request(prompt=[1], max_new_tokens=4, allowed=np.zeros(2, np.uint32)), "masks=True"),
    ):
        with pytest.raises(ValueError, match=message):
            plain.prefill(slot, request)
    with pytest.raises(ValueError, match="expected 3"):
        plain.prefill_all([Request(prompt=[1], max_new_tokens=1)])
    assert engine.prefill(0, Request(prompt=[1] * 16, max_new_tokens=17)).tokens.shape == (1,)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_prompt_that_fits_is_read_though_its_bucket_does_not():
    small = Engine(decoder(), slots=1, max_length=24)
    first = small.prefill(0, Request(prompt=list(range(1, 19)), max_new_tokens=4))
    assert np.asarray(first.valid).all()
