"""Prompts read in pieces give what prompts read at once give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.decoding import Engine, PromptReader, Request, Sampling
from logitjax.decoding._prefixes import PrefixCache
from tests.decoding._models import REPORTED, decoder, next_logits

LONG = (np.arange(23) * 7 % 60 + 1).tolist()


@pytest.fixture(scope="module")
def engine():
    return Engine(decoder(), slots=3, max_length=64, options=REPORTED, rings=False)


def make(engine, **options):
    return PromptReader(engine, rows=4, chunk=16, **options)


def through(reader, rows):
    """Pieces until all these rows have read their prompts."""
    pieces, done = 0, set()
    while not done >= set(rows):
        done |= set(reader.advance())
        pieces += 1
    return pieces


def log_probs(tokens):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(next_logits(decoder(), tokens))))


def test_pieces_by_turns_and_together_are_whole_prompts(engine):
    reader, prompts = make(engine), [LONG, LONG[3:8], LONG[::-1], [7]]
    rows = [reader.begin(Request(prompt=p, max_new_tokens=2)) for p in prompts]
    assert not reader.free
    assert not reader.waits(LONG)
    # 4 tokens of each at once, then the two long ones by turns: 16 and what is left.
    assert through(reader, rows) <= 8
    assert reader.tokens_read == sum(map(len, prompts))
    for row, prompt in zip(rows, prompts, strict=True):
        first = reader.place(row, 1, Request(prompt=prompt, max_new_tokens=2))
        want = log_probs(prompt)
        assert np.asarray(first.tokens)[0] == want.argmax()
        np.testing.assert_allclose(np.asarray(first.logprobs)[0], want.max(), atol=1e-4)
        after = log_probs([*prompt, int(want.argmax())])
        assert np.asarray(engine.decode_chunk(1).tokens)[1, 0] == after.argmax()
    reader.release(rows[0])
    assert reader.begin(Request(prompt=[1], max_new_tokens=1)) == rows[0]
    reader.release(rows[1])
    short = [rows[0], reader.begin(Request(prompt=[2], max_new_tokens=1))]
    # Two that are short do not wait for each other's decoding steps.
    assert reader.advance() == short


def test_copies_are_placed_from_one_reading_each_with_its_seed(engine):
    reader = make(engine)
    row = reader.begin(Request(prompt=LONG, max_new_tokens=3))
    through(reader, [row])
    copies = [
        Request(prompt=LONG, max_new_tokens=3, sampling=Sampling(temperature=2.0, seed=seed))
        for seed in (1, 2, 1)
    ]
    drawn = [np.asarray(reader.place(row, slot, c).tokens)[0] for slot, c in enumerate(copies)]
    tokens = np.asarray(engine.decode_chunk(2).tokens)
    assert drawn[0] == drawn[2]
    np.testing.assert_array_equal(tokens[0], tokens[2])
    assert (drawn[0], *tokens[0]) != (drawn[1], *tokens[1])
    assert reader.tokens_read == len(LONG)


def test_a_prefix_is_read_once_and_gives_the_same(engine):
    reader = make(engine, prefix_bytes=1 << 20)
    first = reader.begin(Request(prompt=LONG, max_new_tokens=1))
    # What comes next is being read: better to wait for it. With another salt it never comes.
    other = [*LONG[:18], 9, 9]
    assert reader.waits(other)
    assert not reader.waits(other, salt="somebody else")
    through(reader, [first])
    assert not reader.waits(other)
    rows = [
        reader.begin(Request(prompt=other, max_new_tokens=1)),
        reader.begin(Request(prompt=LONG, max_new_tokens=1)),
        reader.begin(Request(prompt=other, max_new_tokens=1), salt="somebody else"),
    ]
    # Whole blocks of 4, and never the last token: its logits are what is wanted.
    assert reader.tokens_reused == 16 + 20
    through(reader, rows)
    assert reader.tokens_read == len(LONG) + 4 + 3 + len(other)
    for row, prompt in zip(rows, (other, LONG, other), strict=True):
        emitted = reader.place(row, 0, Request(prompt=prompt, max_new_tokens=1))
        want = np.sort(log_probs(prompt))[::-1][:3]
        np.testing.assert_allclose(np.asarray(emitted.top_logprobs)[0], want, atol=1e-4)


@pytest.mark.every_change
@pytest.mark.slow
def test_the_prompt_s_own_tokens_are_reported_where_asked(engine):
    reader = make(engine, prefix_bytes=1 << 20)
    for _ in range(2):  # The second time nothing is taken from the cache.
        row = reader.begin(Request(prompt=LONG, max_new_tokens=1), report=True)
        through(reader, [row])
        parts = [jax.tree.map(np.asarray, part) for part in reader.report(row)]
        valid = np.concatenate([part.valid[0] for part in parts])
        tokens = np.concatenate([part.tokens[0] for part in parts])[valid]
        logprobs = np.concatenate([part.logprobs[0] for part in parts])[valid]
        assert tokens.tolist() == LONG[1:]
        want = [log_probs(LONG[:i])[LONG[i]] for i in range(1, len(LONG))]
        np.testing.assert_allclose(logprobs, want, atol=1e-4)
        reader.release(row)


def test_the_least_used_blocks_are_dropped_ends_before_beginnings():
    cache, block = PrefixCache(3 * 40), np.zeros(10, np.float32)
    for name in (b"a", b"ab", b"x"):
        cache.put(name, block)
    assert len(cache.longest([b"a", b"ab", b"abc"])) == 2
    cache.put(b"y", block)
    assert (b"x" in cache, b"a" in cache, b"ab" in cache) == (False, True, True)
    cache.put(b"z", block)
    assert (b"a" in cache, b"ab" in cache, cache.size) == (True, False, 120)
    cache.put(b"large", np.zeros(100, np.float32))
    assert b"large" not in cache


def test_wrong_readers_and_prompts_are_named(engine):
    rings = Engine(decoder(), slots=1, max_length=64)
    for make_it, message in (
        (lambda: PromptReader(engine, rows=3, chunk=16), "multiple of rows=3"),
        (lambda: PromptReader(rings, rows=1, chunk=16, prefix_bytes=9), "rings"),
        (lambda: make(engine).begin(Request(prompt=[1] * 65, max_new_tokens=1)), "do not fit"),
        (lambda: make(engine).place(0, 0, Request(prompt=[1], max_new_tokens=1)), "row"),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


@pytest.mark.every_change
@pytest.mark.slow
def test_a_reported_prompt_takes_its_turn_among_others(engine):
    reader = make(engine)
    first = reader.begin(Request(prompt=LONG, max_new_tokens=1), report=True)
    others = [reader.begin(Request(prompt=LONG[n:], max_new_tokens=1)) for n in range(3)]
    reader.advance()
    # Three of four rows could read together, without end where others follow them.
    assert reader._reading(first).left < len(LONG)
    for row in others:
        assert reader._reading(row).left >= 20
