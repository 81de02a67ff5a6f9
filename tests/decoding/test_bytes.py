"""Bytes from models of tokens, against sums over all paths of tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends

from logitjax import fusion
from logitjax.decoding import ByteEnsemble, CachedModel
from logitjax.models import Tokenizer
from tests.decoding._bags import bag_logits, bag_of_words
from tests.decoding._models import decoder

TEXTS = ["a", "b", "ab", "ba", "abb", "</s>"]


def tokenizer(texts):
    backend = Backend(backends.WordLevel({text: i for i, text in enumerate(texts)}, "a"))
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, eos_id=texts.index("</s>"), bos_id=texts.index("</s>"))


def follow(params, tokens, positions, cache):
    """The next token by the last alone."""
    return params[tokens], cache


def markov(table):
    return (follow, jnp.asarray(table), {"nothing": jnp.zeros((4, 1))})


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x))
    return e / e.sum()


def by_enumeration(params, text: str) -> np.ndarray:
    """Probabilities of a, b and the end after a text, over all token paths."""
    out = np.zeros(3)
    # A path, what it spells, and its probability; the first token is the prompt.
    paths = [((5,), "", 1.0)]
    while paths:
        tokens, spelt, p = paths.pop()
        law = softmax(bag_logits(params, list(tokens)))
        out[2] += p * law[5] * (spelt == text)
        for token, piece in enumerate(TEXTS[:5]):
            longer = spelt + piece
            if longer.startswith(text) and len(longer) > len(text):
                out["ab".index(longer[len(text)])] += p * law[token]
            elif text.startswith(longer):
                paths.append(((*tokens, token), longer, p * law[token]))
    return out / out.sum()


def test_the_law_of_bytes_is_the_sum_over_all_paths():
    model = bag_of_words(4, 6, seed=2)
    both = ByteEnsemble((model, tokenizer(TEXTS)), most=10**6, least=0.0)
    text = "abbabab"
    both.begin("")
    for n in range(len(text) + 1):
        found = both.probs()[[97, 98, 256]]
        np.testing.assert_allclose(found, by_enumeration(model[1], text[:n]), rtol=2e-6)
        if n < len(text):
            both.feed(text[n].encode())
    assert both.lost < 1e-12


def test_sixty_four_bytes_of_a_sure_model_are_exact_to_a_millionth():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(6, 6)).astype(np.float32)
    # As trained models: one way to spell a text is far likelier than others.
    table[:, [2, 4]] += 13
    text = "".join(rng.choice(["ab", "abb"], 24))[:64]
    law = np.stack([softmax(row) for row in table])
    # By the last token and where it ends: probability of all paths.
    reach = np.zeros((len(text) + 1, 6))
    reach[0, 5], total = 1, np.zeros(len(text) + 1)
    for at in range(len(text)):
        for token, piece in enumerate(TEXTS[:5]):
            p, end = float(reach[at] @ law[:, token]), at + len(piece)
            if text.startswith(piece, at) and end <= len(text):
                reach[end, token] += p
            # It spells the text as far as `n`, and goes beyond `at`.
            for n in range(at + 1, min(end, len(text)) + 1):
                total[n] += p * (piece[: n - at] == text[at:n])
    one = ByteEnsemble((markov(table), tokenizer(TEXTS)))
    one.begin("")
    assert one.feed(text.encode()) == pytest.approx(float(np.log(total[len(text)])), abs=1e-5)
    assert one.lost < 1e-6


def test_a_surprising_byte_is_read_after_unlikely_paths_were_dropped():
    table = np.zeros((6, 6), np.float32)
    # After any token "ab" is all but certain, and no token begins with "aa".
    table[:, 2] = 30
    found = []
    for limits in ({"most": 1, "least": 1e-6}, {"most": 10**6, "least": 0.0}):
        reader = ByteEnsemble((markov(table), tokenizer(TEXTS)), **limits)
        reader.begin("")
        found.append(reader.feed(b"aab"))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_models_of_other_tokens_write_together():
    mine, other = (markov(np.random.default_rng(i).normal(size=(6, 6)) * 2) for i in range(2))
    letters = ["</s>", "b", "a", "aa", "bb", "bab"]
    pairs = (mine, tokenizer(TEXTS)), (other, tokenizer(letters))
    alone = [ByteEnsemble(pair) for pair in pairs]
    mean = ByteEnsemble(pairs[0], experts=pairs[1:])
    moved = ByteEnsemble(
        pairs[0], experts=pairs[1:], bases=pairs[:1], fuse=fusion.ProxyTuning(alpha=1.0)
    )
    for each in (*alone, mean, moved):
        each.begin("")
        each.feed(b"abab")
    first, second = (each.probs() for each in alone)
    np.testing.assert_allclose(mean.probs(), (first + second) / 2, rtol=1e-6)
    # The large model less itself: what is left is the expert.
    np.testing.assert_allclose(moved.probs(), second, atol=1e-5)
    text = moved.generate("", max_bytes=12, temperature=0.7, seed=3)
    assert text == moved.generate("", max_bytes=12, temperature=0.7, seed=3)
    assert set(text) <= set(b"ab")
    with pytest.raises(
        ValueError, match="text: expected bytes that tokens can spell, got b'ababc'"
    ):
        alone[0].feed(b"c")


def test_the_union_of_the_likeliest_tokens():
    """By hand: after the end, mine likes ab (.6) and a (.3), the other b (.5) and a (.4)."""
    mine, other = np.full((6, 6), -20.0), np.full((6, 6), -20.0)
    letters = ["</s>", "b", "a", "aa", "bb", "bab"]
    mine[:, [2, 0, 5]], other[:, [1, 2, 0]] = np.log([0.6, 0.3, 0.1]), np.log([0.5, 0.4, 0.1])
    pairs = (markov(mine), tokenizer(TEXTS)), (markov(other), tokenizer(letters))

    def after_ab(table, end):
        # Then both want to stop.
        table[[1, 2]] = np.where(np.arange(6) == end, 0, -20.0)

    after_ab(mine, 5), after_ab(other, 0)
    both = ByteEnsemble(
        (markov(mine), tokenizer(TEXTS)), experts=[(markov(other), tokenizer(letters))]
    )
    # Union of two each: ab, a, b. Mine: ab .6, a .3, b 0: shares 2/3, 1/3, 0. The other spells ab
    # by a first: .4, .4, .5: shares 4/13, 4/13, 5/13. Means .487, .321, .192.
    assert both.generate_union("", max_tokens=1, top=2) == "ab"
    assert both.generate_union("", max_tokens=5, top=2) == "ab"
    alone = ByteEnsemble(pairs[1])
    assert alone.generate_union("", max_tokens=1, top=2) == "b"
    proxy = ByteEnsemble(
        pairs[0], experts=pairs[1:], bases=pairs[:1], fuse=fusion.ProxyTuning(alpha=1.0)
    )
    assert proxy.generate_union("", max_tokens=1, top=2) == "b"


@pytest.mark.every_change
@pytest.mark.slow
def test_a_text_longer_than_a_window_keeps_the_model_s_law():
    """A path goes back further than a ring of 6 slots keeps, with slack or without."""
    texts = [*"abcdef", *(a + b for a in "abcdef" for b in "abcdef"), "</s>"]
    tokens = tokenizer(texts + [f"x{n}" for n in range(64 - len(texts))])
    model = CachedModel.of(decoder())
    slack = dataclasses.replace(model.init_cache, ring_slack=64)
    laws = []
    for each in (model, dataclasses.replace(model, init_cache=slack)):
        both = ByteEnsemble((each, tokens), max_length=64)
        both.begin("")
        for byte in b"abcdefabcdefabcdef":
            both.feed(bytes([byte]))
        laws.append(both.probs())
    np.testing.assert_allclose(*laws, atol=1e-5)
