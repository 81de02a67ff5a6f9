"""Vocabularies that are padded, extended, renumbered; and those of other tokenizers."""

import unicodedata

import jax
import numpy as np
import pytest
import tokenizers

from logitjax import fusion
from logitjax.fusion import DynamicFusion, OverlapFusion, ProxyTuning, vocabulary_map
from logitjax.fusion._token_map import TokenMap
from logitjax.models import Tokenizer
from tests.fusion.test_dynamic import log_softmax


def byte_pairs(merges, extra=()):
    """A byte-level tokenizer with these merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *["".join(pair) for pair in merges]]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(extra))
    return Tokenizer(backend)


MERGES = [("t", "h"), ("th", "e"), ("i", "n")]


def test_added_tokens_map_to_nothing():
    mapping = vocabulary_map(byte_pairs(MERGES, ["<a>", "<b>"]), byte_pairs(MERGES, ["<a>"]))
    size = 256 + len(MERGES)
    np.testing.assert_array_equal(mapping.small_ids[:size], np.arange(size))
    assert mapping.small_ids[size:].tolist() == [size, -1]
    assert not mapping.is_identity
    # The ending of "<b>" that the small vocabulary has.
    np.testing.assert_array_equal(
        mapping.to_small(np.array([5, size + 1])), [5, mapping.small_ids[ord(">") - ord("!")]]
    )
    assert vocabulary_map(byte_pairs(MERGES), byte_pairs(MERGES)).is_identity


def test_other_tokenizers_are_refused_and_told_why():
    with pytest.raises(ValueError, match=r"they cut 'The quick .* tokens, alike only up to token"):
        vocabulary_map(byte_pairs(MERGES), byte_pairs([("q", "u"), ("t", "h"), ("i", "n")]))
    with pytest.raises(ValueError, match="0 of the small vocabulary's 2 tokens"):
        vocabulary_map(["a", "b"], ["x", "y"])
    shuffled = [str(i) for i in np.random.default_rng(0).permutation(100)]
    with pytest.raises(ValueError, match="number their common tokens in another order"):
        vocabulary_map([str(i) for i in range(100)], shuffled)
    with pytest.raises(TypeError, match="large: expected a tokenizer"):
        vocabulary_map(3, ["a"])


def test_renumbered_tokenizers_are_the_same_tokenizer():
    ours = byte_pairs([])
    reverse = {token: 255 - i for token, i in ours.backend.get_vocab().items()}

    class Renumbered:
        def get_vocab(self):
            return reverse

        def encode(self, text):
            return [255 - i for i in ours.encode(text)]

    mapping = vocabulary_map(ours, Renumbered())
    np.testing.assert_array_equal(mapping.small_ids, 255 - np.arange(256))


@pytest.mark.parametrize("change", ["NFKC", "\r\n", "rstrip"])
def test_tokenizers_that_change_text_are_not_the_same(change):
    ours = byte_pairs([])

    class Changing:
        def get_vocab(self):
            return ours.backend.get_vocab()

        def encode(self, text):
            if change == "\r\n":
                text = text.replace(change, "\n")
            else:
                text = text.rstrip() if change == "rstrip" else unicodedata.normalize(change, text)
            return ours.encode(text)

    for pair in ((ours, Changing()), (Changing(), ours)):
        with pytest.raises(ValueError, match="different tokenizers: they cut"):
            vocabulary_map(*pair)


def test_the_same_tokenizer_spelled_in_bytes():
    ours = byte_pairs(MERGES, ["<a>"])
    ranks = {text: i for i, text in enumerate(reversed(ours.token_bytes())) if text}

    class Encoding:
        """As of tiktoken."""

        def token_byte_values(self):
            return sorted(ranks)

        def encode_single_token(self, text):
            return ranks[text]

        def encode(self, text):
            return [ranks[ours.token_bytes()[i]] for i in ours.encode(text)]

    expected = [ranks.get(text, -1) for text in ours.token_bytes()][: 256 + len(MERGES)]
    mapping = vocabulary_map(ours, Encoding())
    assert mapping.small_ids.tolist() == expected
    plain = dict(zip(filter(None, ours.token_bytes()), range(len(expected))))
    assert vocabulary_map(plain, ours).small_ids.tolist() == list(range(len(expected)))
    with pytest.raises(TypeError, match="expected a tokenizer beside a vocabulary in bytes"):
        vocabulary_map(ranks, ["a", "b"])


def test_fusion_on_the_overlap():
    rng = np.random.default_rng(0)
    ids = np.array([2, 0, -1, 1, 3, -1, 5])
    mapping = TokenMap(ids, 6)
    large = rng.normal(size=(3, 7)).astype(np.float32)
    expert, base = (rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2))
    q, r = log_softmax(expert), log_softmax(base)
    shift = np.zeros_like(large)
    both = ids >= 0
    shift[:, both] = (q - r)[:, ids[both]]
    fused, _ = jax.jit(OverlapFusion(strategy=ProxyTuning(), token_map=mapping))(
        large, expert, base
    )
    np.testing.assert_allclose(fused, large + shift, atol=1e-5)
    # Divergences are those on the overlap.
    dynamic = jax.jit(OverlapFusion(strategy=DynamicFusion(), token_map=mapping))
    fused_logits, info = jax.device_get(
        dynamic(large, expert + np.float32(7), base - np.float32(40))
    )
    q, r = (log_softmax(x[:, ids[both]]) for x in (expert, base))
    np.testing.assert_allclose(info["target_forward"], (np.exp(q) * (q - r)).sum(-1), atol=1e-5)
    expected = large + info["alpha"][0][:, None] * shift
    np.testing.assert_allclose(log_softmax(fused_logits), log_softmax(expected), atol=1e-4)
    padded = np.pad(large, ((0, 0), (0, 2)))
    wide = np.asarray(dynamic(padded, expert, base)[0])
    assert wide.shape == (3, 9)
    assert np.isinf(wide[:, 7:]).all()


def test_a_token_that_one_small_model_lacks_is_gone_and_a_nan_stays():
    fuse = jax.jit(
        OverlapFusion(strategy=ProxyTuning(), token_map=TokenMap(np.array([0, 1, -1]), 2))
    )
    large, complete = np.zeros(3, np.float32), np.zeros(2, np.float32)
    lacking, broken = np.array([[0, -np.inf], [np.nan, 0]], np.float32)
    for pair in ((complete, lacking), (lacking, complete)):
        fused = np.asarray(fuse(large, *pair)[0])
        np.testing.assert_array_equal(np.isneginf(fused), [False, True, False])
    assert (np.asarray(fuse(large, lacking, lacking)[0]) == 0).all()
    for pair in ((complete, broken), (broken, complete)):
        assert np.isnan(fuse(large, *pair)[0]).any()


def test_maps_are_checked():
    with pytest.raises(ValueError, match="small_ids"):
        TokenMap(np.array([0, 6]), 6)
    mapping = TokenMap(np.arange(4), 4)
    assert hash(mapping) == hash(TokenMap(np.arange(4), 4))
    assert mapping == TokenMap(np.arange(4), 4)
    fuse = OverlapFusion(strategy=ProxyTuning(), token_map=mapping)
    with pytest.raises(ValueError, match="at least 4 entries, got 3"):
        fuse(np.zeros(3, np.float32), *np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="axis_name='tensor'"):
        fuse(*np.zeros((3, 4), np.float32), axis_name="tensor")


@pytest.mark.parametrize(
    "strategy",
    [fusion.LogitDifference(), fusion.Guidance(weight=1.5), fusion.ContrastiveDecoding()],
)
def test_a_token_of_the_large_model_alone_keeps_its_logit(strategy):
    """Its probability beside that of a shared token, where the small model says the same of all."""
    fuse = jax.jit(OverlapFusion(strategy=strategy, token_map=TokenMap(np.array([0, 1, 2, -1]), 3)))
    large, small = np.array([3, 1, 0, -8], np.float32), np.zeros(3, np.float32)
    pair = (small[None], None) if isinstance(strategy, fusion.LogitDifference) else (None, small)
    fused = np.asarray(fuse(large, *pair)[0])
    assert fused.argmax() == 0
    assert np.isneginf(fused[3]) or fused[3] == -8


def test_padding_of_a_small_model_has_no_probability():
    fuse = jax.jit(
        OverlapFusion(strategy=ProxyTuning(), token_map=TokenMap(np.array([0, 1, 2, -1]), 3))
    )
    expert, base = np.float32([[-30, -31, -32, 0, 0]]), np.float32([[-32, -33, -34, 0, 0]])
    large = np.zeros(4, np.float32)
    for width in (3, 5):
        fused, _ = fuse(large, expert[:, :width], base[:, :width])
        np.testing.assert_allclose(jax.nn.softmax(fused), np.full(4, 0.25), atol=1e-6)
