"""Positions that have read the same bytes, over packed rows of two real tokenizer kinds."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from logitjax import data, distillation, models
from logitjax.distillation.training._source import Source
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
        column = 0
        for number, segment in enumerate(row, 1):
            for position, token in enumerate(segment):
                out["tokens"][i, column] = vocab[token]
                out["segment_ids"][i, column] = number
                out["positions"][i, column] = position
                out["loss_mask"][i, column] = position > 0
                column += 1
    return out


def test_hand_worked_row():
    vocab = {"the": 0, " cat": 1, "s": 2, "th": 3, "e": 4, " ": 5, "cats": 6}
    lengths = np.array([len(token) for token in vocab])
    ours = columns([[["the", " cat", "s"], ["the", " cat"]]], vocab)
    teacher = columns([[["th", "e", " ", "cats"], ["the", " cat"]]], vocab)
    chunks = distillation.align_chunks(ours, teacher, our_lengths=lengths, their_lengths=lengths)
    # " cat" begins at byte 3, as does their " "; "s" begins inside "cats"; then document 2.
    assert chunks.starts[0].tolist() == [True, False, False, True, False]
    assert chunks.places[0, [0, 3]].tolist() == [1, 4]
    # "the" is not predicted, so its bytes are no chunk.
    assert chunks.ours[0].tolist() == [0, 0, -1, 1, -1]
    assert chunks.theirs[0].tolist() == [-1, 0, 0, -1, 1, -1][: chunks.theirs.shape[1]]
    assert (chunks.our_sizes[0, :2].tolist(), chunks.their_sizes[0, :2].tolist()) == (
        [2, 1],
        [2, 1],
    )
    assert chunks.one_to_one[0].tolist() == [False, False, False, True, False]
    assert chunks.counts.tolist() == [2]


@given(st.lists(st.sampled_from(["ab", "c", " d", "é"]), min_size=2, max_size=12), st.data())
def test_matches_are_exactly_the_common_boundaries(pieces, draw):
    text = "".join(pieces)
    cuts = draw.draw(st.sets(st.integers(1, len(text) - 1)))
    marks = [0, *sorted(cuts), len(text)]
    other = [text[a:b] for a, b in itertools.pairwise(marks)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*pieces, *other]))}
    lengths = np.array([len(token.encode()) for token in vocab])
    ours, teacher = columns([[pieces]], vocab), columns([[other]], vocab)
    chunks = distillation.align_chunks(ours, teacher, our_lengths=lengths, their_lengths=lengths)

    def starts(tokens):
        return np.cumsum([0, *(len(token.encode()) for token in tokens)])[:-1]

    mine, their_starts = starts(pieces), starts(other)
    expected = [t for t in range(len(pieces) - 1) if mine[t + 1] in their_starts[1:]]
    assert np.flatnonzero(chunks.starts[0]).tolist() == expected
    for t in expected:
        assert their_starts[chunks.places[0, t] + 1] == mine[t + 1]


def test_turns_are_aligned_whatever_the_templates_put_between():
    vocab = {"<|user|>": 0, "hi": 1, "<s>": 2, "[I]": 3, "ab": 4, "a": 5, "b": 6, "c": 7, "x": 8}
    lengths = np.array([len(token) for token in vocab])
    ours = columns([[["<|user|>", "hi", "ab", "c", "x", "c", "ab"]]], vocab)
    teacher = columns([[["<s>", "[I]", "hi", "x", "a", "b", "c", "x", "x", "c", "a", "b"]]], vocab)
    ours["loss_mask"][0, :7] = [0, 0, 1, 1, 0, 1, 1]
    teacher["loss_mask"][0, :12] = [0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    chunks = distillation.align_chunks(
        ours, teacher, our_lengths=lengths, their_lengths=lengths, by="turn"
    )
    assert chunks.starts[0].tolist() == [False, True, True, False, True, True, False]
    assert (chunks.places[0][chunks.starts[0]] + 1).tolist() == [4, 6, 9, 10]
    assert chunks.ours[0].tolist() == [-1, 0, 1, -1, 2, 3, -1]
    assert chunks.theirs[0].tolist() == [-1, -1, -1, 0, 0, 1, -1, -1, 2, 3, 3, -1][:12]


@pytest.mark.parametrize("lead", ["", "\n", " ", "<think>\n\n</think>\n\n"])
def test_what_one_template_writes_before_an_answer_moves_no_byte(tmp_path, lead):
    ours, teacher = load_tokenizer("tiny"), load_tokenizer("tiny")
    begin = "{% for m in messages %}[{{m.role}}]"
    end = (
        "{{m.content}}{{eos_token}}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    written = "{% if m.role == 'assistant' %}" + lead + "{% endif %}"
    ours.chat_template, teacher.chat_template = begin + end, begin + written + end
    said = [(role, f"{role} {n}") for n in range(2) for role in ("user", "assistant")]
    rows = [{"messages": [{"role": who, "content": text} for who, text in said]}] * 2
    tokenizers = {"pivot": ours, "a": teacher}
    packed = data.pack(rows, tokenizers, seq_len=256, directory=tmp_path, on_long="skip")
    splits = data.PackedSplits(
        splits={"train": packed},
        names={"pivot": "pivot", "a": "a"},
        tokenizers=tokenizers,
        chat=True,
    )
    batch = packed.rows([0])
    chunks = Source("a", splits, {}).chunks(batch)
    labels, theirs = batch["pivot"]["tokens"][0, 1:], batch["a"]["tokens"][0, 1:]
    assert chunks.starts[0].tolist() == batch["pivot"]["loss_mask"][0, 1:].tolist()
    assert chunks.one_to_one[0].tolist() == chunks.starts[0].tolist()
    at = np.flatnonzero(chunks.starts[0])
    assert len(at) == 2 * 2 * len("assistant 0") + 4
    assert theirs[chunks.places[0, at]].tolist() == labels[at].tolist()


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
    chunks = distillation.align_chunks(batch, batch, our_lengths=lengths, their_lengths=lengths)
    learnt = batch["loss_mask"][:, 1:]
    assert (chunks.starts == learnt).all()
    assert (chunks.one_to_one == learnt).all()
    assert (chunks.places[learnt] == np.broadcast_to(np.arange(63), learnt.shape)[learnt]).all()


def slow_chunks(ours, teacher, our_lengths, their_lengths):
    """The chunks of `align_chunks` for one row, by looking at every pair of tokens."""

    def described(columns, lengths):
        tokens, here, out = [], {}, []
        for i, (token, text, learnt) in enumerate(zip(*columns, strict=True)):
            begin = here.get(text, 0)
            size = int(lengths[token])
            rank = sum(k[:4] == (text, begin, begin, True) for k in tokens)
            tokens.append((text, begin, begin + size, size == 0, rank))
            here[text] = begin + size
            if text and (size or learnt):
                key = (text, begin, "special", rank) if not size else (text, begin + size, "text")
                out.append((i, key, bool(learnt) and i > 0))
        return out

    mine, other = described(ours, our_lengths), described(teacher, their_lengths)
    shared = {key for _, key, _ in mine} & {key for _, key, _ in other}

    def chunk_of(tokens):
        numbers, open_, bad = {}, [], set()
        for i, key, learnt in tokens:
            if key[2] == "special":
                if key in shared:
                    numbers[i] = key
                    bad |= set() if learnt else {key}
                continue
            open_.append((i, learnt, key[0]))
            open_ = [member for member in open_ if member[2] == key[0]]
            if key in shared:
                numbers |= {position: key for position, _, _ in open_}
                bad |= set() if all(counts for _, counts, _ in open_) else {key}
                open_ = []
        return numbers, bad

    (a, bad_a), (b, bad_b) = chunk_of(mine), chunk_of(other)
    good = sorted(
        (key for key in shared if key not in bad_a | bad_b),
        key=lambda key: (key[0], key[1], key[2] == "special", key[3:]),
    )
    number = {key: i for i, key in enumerate(good)}
    return (
        [number.get(a.get(i), -1) for i in range(1, len(ours[0]))],
        [number.get(b.get(i), -1) for i in range(1, len(teacher[0]))],
    )


def random_row(rng, lengths, bytes_of_texts, width, bos):
    """Cuts texts into tokens of given lengths; the row ends where it is full."""
    tokens, segments, positions, learnt = [], [], [], []
    for text, total in enumerate(bytes_of_texts, 1):
        left = total
        new = [0] if bos else []
        while left:
            size = int(rng.integers(1, min(left, lengths.max()) + 1))
            new.append(size)
            left -= size
        new.append(0)
        for index, token in enumerate(new):
            tokens.append(token)
            segments.append(text)
            positions.append(index)
            learnt.append(index > (1 if text == 2 else 0))
    pad = max(width - len(tokens), 0)
    return [np.array([*x, *[0] * pad])[:width] for x in (tokens, segments, positions, learnt)]


def test_chunks_equal_those_of_a_slow_search():
    rng, lengths = np.random.default_rng(0), np.arange(4)
    for _ in range(300):
        totals = rng.integers(1, 12, 3)
        rows = [random_row(rng, lengths, totals, 20, bos) for bos in (False, True)]
        names = ("tokens", "segment_ids", "positions", "loss_mask")
        ours, teacher = (
            {n: x[None].astype(bool) if n == "loss_mask" else x[None] for n, x in zip(names, row)}
            for row in rows
        )
        chunks = distillation.align_chunks(
            ours, teacher, our_lengths=lengths, their_lengths=lengths
        )
        slow = slow_chunks(*([row[0], row[1], row[3]] for row in rows), lengths, lengths)
        assert (chunks.ours[0].tolist(), chunks.theirs[0].tolist()) == slow


def test_the_space_before_a_text_of_llama_2_moves_no_byte():
    vocab = {" ab": 0, "ab": 1, "c": 2}
    lengths = np.array([len(token) for token in vocab])
    ours = columns([[["ab", "c", "c"]]], vocab)
    teacher = columns([[[" ab", "c", "c"]]], vocab)
    chunks = distillation.align_chunks(
        ours, teacher, our_lengths=lengths, their_lengths=lengths, their_prefix=1
    )
    assert chunks.ours[0].tolist() == [0, 1, -1]


def test_what_ends_a_turn_pairs_with_what_ends_it_there():
    vocab = {"<end>": 0, "ab": 1, "\n": 2}
    lengths = np.array([0, 2, 1])
    ours = columns([[["ab", "ab", "<end>"]]], vocab)
    teacher = columns([[["ab", "ab", "<end>", "\n"]]], vocab)
    chunks = distillation.align_chunks(ours, teacher, our_lengths=lengths, their_lengths=lengths)
    assert chunks.ours[0].tolist() == [0, 1, -1]
    assert chunks.starts[0].tolist() == [True, True, False]
    assert chunks.places[0].tolist() == [0, 1, 0]


def test_texts_that_share_no_byte_have_no_chunk():
    lengths = np.array([0, 2, 3])
    ours, teacher = columns([[[1, 1]]], [0, 1, 2]), columns([[[2, 2]]], [0, 1, 2])
    chunks = distillation.align_chunks(ours, teacher, our_lengths=lengths, their_lengths=lengths)
    assert not chunks.counts.any()
    assert not chunks.starts.any()
    assert (chunks.ours == -1).all()
