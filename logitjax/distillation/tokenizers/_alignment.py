import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

# More bytes than any text and more turns than any document in a packed row.
_TEXT_STRIDE = 1 << 28
_TURN_STRIDE = 1 << 16
# More special tokens than follow one another; the first of these numbers is for text.
_SPECIALS = 1 << 4
# More bytes than a learned part, and fewer than a text's share of numbers.
_FAR = 1 << 26


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunks:
    """Alignment of the labels of two tokenizers on the same text: ours and theirs.

    Position t predicts token t + 1, its label. A chunk is the shortest stretch of text with a token
    boundary of both tokenizers at either end, or a special token that both have in the same place.
    All its tokens are labels that count, on both sides.

    Attributes:
        ours, theirs: int32 `[rows, length - 1]`, chunk of each label, from 0 in each row; -1: none.
        our_sizes, their_sizes: int32 `[rows, length - 1]`, labels per chunk; 0 beyond the last.
        starts: bool `[rows, length - 1]`, our positions whose label begins where one of theirs
            does, so that both models have read the same text; also for a chunk that the end of a
            row cuts short.
        places: int `[rows, length - 1]`, their positions of these labels; 0 elsewhere.
    """

    ours: np.ndarray
    theirs: np.ndarray
    our_sizes: np.ndarray
    their_sizes: np.ndarray
    starts: np.ndarray
    places: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of chunks in each row, `[rows]`."""
        return (self.our_sizes > 0).sum(-1)

    @property
    def one_to_one(self) -> np.ndarray:
        """Our positions whose label alone is a chunk, of one token on the other side too."""
        single = (self.our_sizes == 1) & (self.their_sizes == 1)
        return (self.ours >= 0) & np.take_along_axis(single, np.maximum(self.ours, 0), axis=1)


def align_chunks(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    *,
    our_lengths: np.ndarray,
    their_lengths: np.ndarray,
    our_prefix: int = 0,
    their_prefix: int = 0,
    our_leads: Any = 0,
    their_leads: Any = 0,
    by: Literal["document", "turn"] = "document",
) -> Chunks:
    """Cut packed rows of two tokenizers wherever both end a token.

    Bytes are counted from the ids and never from text that is encoded again, because sampled ids
    often differ from what their text encodes to. Chunks that the end of a row cuts short are left
    out, and so are chunks with a token that is not a label. Special tokens have no bytes; they pair
    with special tokens at the same byte, in order, so that stopping is learned.

    ::

        A, B = cumulative lengths of ours, of theirs;   cuts = A intersect B
        chunk(t) = number of cuts below A[t]

    Args:
        student, teacher: each tokenizer's columns of the same packed rows (`tokens`, `segment_ids`,
            `positions`, `loss_mask`, each `[rows, length]`).
        our_lengths, their_lengths: `[vocab]`, bytes of text per token; 0 for special tokens.
        our_prefix, their_prefix: bytes that a tokenizer writes before a text (Llama 2's space).
        our_leads, their_leads: `[rows, length]`, by turn, bytes of a learned part before the text
            that both have, see `template_leads`.
        by: where the count of bytes restarts: at each document, or at each learned part of it, as
            in conversations, which two chat templates spell differently.

    >>> columns = lambda tokens: {
    ...     "tokens": np.array([[0, *tokens]]), "segment_ids": np.ones((1, 5), int),
    ...     "positions": np.arange(5)[None], "loss_mask": np.arange(5)[None] > 0}
    >>> lengths = np.arange(4)   # tokens are their own lengths, and 0 is special
    >>> chunks = align_chunks(
    ...     columns([1, 2, 1, 3]), columns([3, 1, 1, 2]), our_lengths=lengths, their_lengths=lengths
    ... )
    >>> chunks.ours.tolist(), chunks.theirs.tolist()
    ([[0, 0, 1, 2]], [[0, 1, 2, 2]])

    References:
        Minixhofer et al., ALM (arXiv 2503.20083), whose chunks these are; TRL's GOLD trainer cuts
        by bytes as well.
    """
    our_side = _Side.of(student, our_lengths, our_prefix, our_leads, by)
    their_side = _Side.of(teacher, their_lengths, their_prefix, their_leads, by)
    shape, their_shape = our_side.learnt[:, 1:].shape, their_side.learnt[:, 1:].shape
    chunk, their_chunk = np.full(shape, -1, np.int32), np.full(their_shape, -1, np.int32)
    sizes, their_sizes = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    starts, places = np.zeros(shape, bool), np.zeros(shape, np.int64)
    for row in range(len(chunk)):
        a, b = our_side.ends(row), their_side.ends(row)
        # Both end a token there.
        cuts = np.intersect1d(a, b)
        one, two = our_side.chunks(row, a, cuts), their_side.chunks(row, b, cuts)
        complete = our_side.complete(row, one, len(cuts)) & their_side.complete(row, two, len(cuts))
        # The last number is for tokens outside all chunks.
        number = np.append(np.where(complete, np.cumsum(complete) - 1, -1), -1)
        chunk[row], their_chunk[row] = number[one][1:], number[two][1:]
        count = int(complete.sum())
        sizes[row, :count] = np.bincount(chunk[row][chunk[row] >= 0], minlength=count)
        their_sizes[row, :count] = np.bincount(
            their_chunk[row][their_chunk[row] >= 0], minlength=count
        )
        starts[row], places[row] = _shared_starts(our_side, their_side, row)
    return Chunks(
        ours=chunk,
        theirs=their_chunk,
        our_sizes=sizes,
        their_sizes=their_sizes,
        starts=starts,
        places=places,
    )


def template_leads(sides: Sequence[tuple[Mapping[str, Any], Sequence[bytes]]]) -> list[np.ndarray]:
    """Bytes of each learned part before the text that two chat templates share: `[rows, length]`.

    Some begin an answer with a space, or an empty block of reasoning. `sides` has the columns of
    each tokenizer's rows, and the bytes of its tokens.
    """
    leads = [np.zeros(np.shape(columns["tokens"]), np.int64) for columns, _ in sides]
    ours, theirs = (dict(_learned_parts(*side)) for side in sides)
    for key in ours.keys() & theirs.keys():
        (_, text), (_, their_text) = ours[key], theirs[key]
        shared = min(text, their_text, key=len).strip()
        for lead, (place, whole) in zip(leads, (ours[key], theirs[key]), strict=True):
            # Parts that share no text have no byte in common.
            lead[place] = whole.rfind(shared) if shared in text and shared in their_text else _FAR
    return leads


def _learned_parts(columns: Mapping[str, Any], texts: Sequence[bytes]) -> Iterator[Any]:
    """Place and bytes of each part, by its row, document and number."""
    edges = np.diff(np.pad(np.asarray(columns["loss_mask"], np.int8), ((0, 0), (1, 1))))
    for row, tokens in enumerate(np.asarray(columns["tokens"])):
        starts, stops = np.flatnonzero(edges[row] > 0), np.flatnonzero(edges[row] < 0)
        documents = np.asarray(columns["segment_ids"])[row, starts].tolist()
        for number, (start, stop) in enumerate(zip(starts, stops)):
            document = documents[number]
            said = b"".join(texts[t] for t in tokens[start:stop] if t < len(texts))
            count = number - documents.index(document)
            yield (row, document, count), ((row, slice(start, stop)), said)


def _shared_starts(student: "_Side", teacher: "_Side", row: int) -> tuple[np.ndarray, np.ndarray]:
    expected, keys = student.learnt[row, 1:], student.begins[row, 1:]
    places = np.flatnonzero(teacher.learnt[row, 1:])
    existing = teacher.begins[row, 1:][places]
    if not len(existing):
        return np.zeros_like(expected), np.zeros(len(expected), np.int64)
    slot = np.minimum(np.searchsorted(existing, keys), len(existing) - 1)
    result = expected & (existing[slot] == keys)
    return result, np.where(result, places[slot], 0)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One tokenizer's rows as ascending numbers: a token begins at its text and byte.

    A special token ends where it begins. `counted` tokens are part of a text that both sides have.
    """

    begins: np.ndarray
    finish: np.ndarray
    special: np.ndarray
    learnt: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(
        cls, columns: Mapping[str, Any], lengths: np.ndarray, prefix: int, leads: Any, by: str
    ) -> "_Side":
        tokens = np.asarray(columns["tokens"])
        texts = np.asarray(columns["segment_ids"], np.int64)
        learnt, counted = np.asarray(columns["loss_mask"]), texts > 0
        sizes = lengths[np.clip(tokens, 0, len(lengths) - 1)]
        first = np.asarray(columns["positions"]) == 0
        # A prefix that a tokenizer writes, such as a space, is not counted.
        if prefix:
            text = counted & (sizes > 0)
            before = np.cumsum(text, axis=1) - text
            sizes = sizes - prefix * (text & (before == _since(before, first)))
        begin = np.cumsum(sizes, axis=1) - sizes
        if by == "turn":
            turns = learnt & ~np.pad(learnt, ((0, 0), (1, 0)))[:, :-1]
            number = np.cumsum(turns, axis=1)
            texts = texts * _TURN_STRIDE + number - _since(number - turns, first)
            # Of what only one template writes before an answer, no token belongs to a chunk.
            first, counted = turns, learnt & (begin + sizes - _since(begin, turns) > leads)
            begin = begin - leads
        begin = texts * _TEXT_STRIDE + begin - _since(begin + leads, first)
        special = sizes == 0
        # Rank among special tokens at the same byte: the length of their run so far.
        run = np.cumsum(special, axis=1)
        rank = run - _since(run - special, first | np.pad(~special, ((0, 0), (1, 0)))[:, :-1])
        rank = np.minimum(rank, _SPECIALS - 1)
        begins = begin * _SPECIALS + np.where(special, rank, 0)
        finish = np.where(special, begins, (begin + sizes) * _SPECIALS)
        # Text that begins where special tokens lie comes after them.
        begins = np.where(special, begins, begins + _SPECIALS - 1)
        return cls(begins, finish, special, learnt, counted)

    def ends(self, row: int) -> np.ndarray:
        """Ends of the row's tokens that may end a chunk."""
        special = self.special[row]
        return self.finish[row][np.where(special, self.learnt[row], self.counted[row])]

    def chunks(self, row: int, ends: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Index of the cut that ends each token's chunk; `len(cuts)` for none."""
        out = np.full(self.finish.shape[1], len(cuts))
        if not len(cuts):
            return out
        special = self.special[row]
        eligible = np.where(special, self.learnt[row], self.counted[row])
        slot = np.searchsorted(cuts, ends)
        existing = cuts[np.minimum(slot, len(cuts) - 1)]
        stride = _TEXT_STRIDE * _SPECIALS
        # The next cut may belong to another text; a special token is a chunk of its own.
        same = np.where(special[eligible], existing == ends, existing // stride == ends // stride)
        out[eligible] = np.where((slot < len(cuts)) & same, slot, len(cuts))
        return out

    def complete(self, row: int, chunks: np.ndarray, count: int) -> np.ndarray:
        """Whether each chunk consists of labels only."""
        # The first token of a row has no position that predicts it.
        existing = self.learnt[row] & (np.arange(len(chunks)) > 0)
        return np.bincount(chunks[~existing], minlength=count + 1)[:count] == 0


def _since(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Value at the latest position where `first` is True; values must not decrease."""
    return np.maximum.accumulate(np.where(first, values, 0), axis=1)
