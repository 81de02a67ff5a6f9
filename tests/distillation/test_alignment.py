"""Positions that have read the same bytes, over packed rows of two real tokenizer kinds."""

import itertools

import numpy as np
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from logitjax import data, distillation, models
from logitjax.models import load_tokenizer


def word_tokenizer():
    """SentencePiece-like: whole words with their space, bytes for the rest."""
    pieces = [
        "▁",
        "▁the",
        "▁cat",
        "the",
        "cat",
        "s",
        "▁s",
        "▁éa",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="<0x00>"))
    return models.Tokenizer(backend), vocab


def columns(rows, vocab):
    """Hand-made packed rows: a list of segments, each a list of token texts."""
    width = max(sum(len(segment) for segment in row) for row in rows) + 1
    shape = (len(rows), width)
    out = {
        "tokens": np.zeros(shape, int),
        "segment_ids": np.zeros(shape, int),
        "positions": np.zeros(shape, int),
        "loss_mask": np.zeros(shape, bool),
    }
    for i, row in enumerate(rows):
        place = 0
        for number, segment in enumerate(row, 1):
            for position, token in enumerate(segment):
                out["tokens"][i, place] = vocab[token]
                out["segment_ids"][i, place] = number
                out["positions"][i, place] = position
                out["loss_mask"][i, place] = position > 0
                place += 1
    return out


def test_hand_worked_row():
    vocab = {"the": 0, " cat": 1, "s": 2, "th": 3, "e": 4, " ": 5, "cats": 6}
    lengths = np.array([len(token) for token in vocab])
    ours = columns([[["the", " cat", "s"], ["the", " cat"]]], vocab)
    theirs = columns([[["th", "e", " ", "cats"], ["the", " cat"]]], vocab)
    places, where = distillation.align_positions(
        ours, theirs, our_lengths=lengths, their_lengths=lengths
    )
    # " cat" begins at byte 3, as does their " "; "s" begins inside "cats"; then document 2.
    assert where[0].tolist() == [True, False, False, True, False]
    assert places[0, [0, 3]].tolist() == [1, 4]


@given(st.lists(st.sampled_from(["ab", "c", " d", "é"]), min_size=2, max_size=12), st.data())
def test_matches_are_exactly_the_common_boundaries(pieces, draw):
    text = "".join(pieces)
    cuts = draw.draw(st.sets(st.integers(1, len(text) - 1)))
    marks = [0, *sorted(cuts), len(text)]
    other = [text[a:b] for a, b in itertools.pairwise(marks)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*pieces, *other]))}
    lengths = np.array([len(token.encode()) for token in vocab])
    ours, theirs = columns([[pieces]], vocab), columns([[other]], vocab)
    places, where = distillation.align_positions(
        ours, theirs, our_lengths=lengths, their_lengths=lengths
    )

    def starts(tokens):
        return np.cumsum([0, *(len(token.encode()) for token in tokens)])[:-1]

    mine, known = starts(pieces), starts(other)
    expected = [t for t in range(len(pieces) - 1) if mine[t + 1] in known[1:]]
    assert np.flatnonzero(where[0]).tolist() == expected
    for t in expected:
        assert known[places[0, t] + 1] == mine[t + 1]


def test_turns_are_aligned_whatever_the_templates_put_between():
    vocab = {"<|user|>": 0, "hi": 1, "<s>": 2, "[I]": 3, "ab": 4, "a": 5, "b": 6, "c": 7, "x": 8}
    lengths = np.array([len(token) for token in vocab])
    ours = columns([[["<|user|>", "hi", "ab", "c", "x", "c", "ab"]]], vocab)
    theirs = columns([[["<s>", "[I]", "hi", "x", "a", "b", "c", "x", "x", "c", "a", "b"]]], vocab)
    ours["loss_mask"][0, :7] = [0, 0, 1, 1, 0, 1, 1]
    theirs["loss_mask"][0, :12] = [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    places, where = distillation.align_positions(
        ours, theirs, our_lengths=lengths, their_lengths=lengths, by="turn"
    )
    assert where[0].tolist() == [False, True, True, False, True, True, False]
    assert (places[0][where[0]] + 1).tolist() == [4, 6, 9, 10]


def test_byte_level_vocabulary_counts_bytes():
    tokenizer = load_tokenizer("tiny")
    lengths = tokenizer.byte_lengths()
    text = "naïve café, 東京\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths[tokenizer.eos_id] == 0


def test_sentencepiece_vocabulary_counts_bytes():
    tokenizer, vocab = word_tokenizer()
    lengths = tokenizer.byte_lengths()
    assert lengths[vocab["▁the"]] == 4
    assert lengths[vocab["▁éa"]] == 4
    assert lengths[vocab["<0xE9>"]] == 1


def test_same_tokenizer_aligns_every_predicted_position(tmp_path):
    examples = data.Examples(
        [{"text": f"document {i}, longer every time" * i} for i in range(1, 6)]
    )
    packed = data.pack(examples, {"a": load_tokenizer("tiny")}, seq_len=64, directory=tmp_path)
    batch = packed.rows(range(len(packed)))["a"]
    lengths = load_tokenizer("tiny").byte_lengths()
    places, where = distillation.align_positions(
        batch, batch, our_lengths=lengths, their_lengths=lengths
    )
    wanted = batch["loss_mask"][:, 1:]
    assert (where == wanted).all()
    assert (places[where] == np.broadcast_to(np.arange(63), where.shape)[where]).all()
