import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from etils import epath

from logitjax.distillation.tokenizers._projection import TokenProjection
from logitjax.models import Tokenizer
from logitjax.storage import digest

Rule = Literal["first_piece", "exact", "spread"]

# X-Token's weights of a token's pieces, and the number of pieces kept per token.
_DECAY = (0.9, 0.09, 0.009, 0.0009)
_KEPT = 4
_FORMAT = 2
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def token_projection(
    student: Tokenizer,
    teacher: Tokenizer,
    *,
    rule: Rule = "first_piece",
    directory: epath.Path | None = None,
) -> TokenProjection:
    """Build the projection of one vocabulary on another, from the bytes of their tokens.

    ::

        first_piece   the first piece in both vocabularies, of their tokens and ours, weight 1
        exact         the teacher's token with the same bytes, else none
        spread        X-Token: our pieces of their tokens and their pieces of ours, decaying weights

    With `first_piece`, a token of both vocabularies stands for itself. A token of one vocabulary is
    split by the other tokenizer and counts as its first piece, repeatedly, until that is a token of
    both. `q'_j = sum_{s: first(s) = j} q_s` and the teacher's `p'_j`, which
    `TokenProjection.merged` adds up, are then the probabilities of the same beginning of text.

    Special tokens of one role (end of text, end of a turn) stand for each other; other special
    tokens have no match by `first_piece` and `exact`. Neither have our tokens that end inside a
    character that is a single token of the teacher.

    Args:
        student, teacher: the tokenizers.
        directory: folder that keeps the results, a file for each pair and rule.

    Raises:
        ValueError: an unknown rule.

    >>> from logitjax.models import load_tokenizer
    >>> tiny = load_tokenizer("tiny")
    >>> projection = token_projection(tiny, tiny)
    >>> bool((projection.ids[:, 0] == np.arange(257)).all()), projection.summary()["largest bucket"]
    (True, 1)

    References:
        X-Token (arXiv 2605.21699) and its release in NeMo-RL for `spread`. `first_piece` is ours:
        in X-Token, later pieces of a token do not continue the text that was read, so their mass
        distorts other tokens. There a common token stands only for itself, so a longer token of the
        teacher (" Gains") lowers the student's way to begin it (" G").
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule: expected one of {', '.join(get_args(Rule))}, got {rule!r}")
    fingerprint = digest(_FORMAT, rule, student.fingerprint, teacher.fingerprint)
    path = None if directory is None else directory / f"projection-{fingerprint[:16]}.npz"
    if path is not None and (projection := TokenProjection.load(path, fingerprint)) is not None:
        return projection
    ids, weights = _BUILDERS[rule](student, teacher)
    merges = None
    if rule == "first_piece":
        merges = _common_pieces(ids[:, 0], student, teacher)
        ids = np.where(ids < 0, -1, merges[ids])
    projection = TokenProjection(
        ids=ids.astype(np.int32),
        weights=(weights * (ids >= 0)).astype(np.float32),
        size=teacher.vocab_size,
        rule=rule,
        merges=merges,
    )
    if path is not None:
        projection.save(path, fingerprint)
    return projection


def prefix_bytes(tokenizer: Tokenizer) -> int:
    """Bytes that a tokenizer writes before a text: 1 for the space of Llama 2, else 0."""
    texts = tokenizer.token_bytes()
    return sum(len(texts[id_]) for id_ in tokenizer.encode("a")) - 1


def special_pairs(student: Tokenizer, teacher: Tokenizer) -> dict[int, int]:
    """Pair special tokens by role: begin a text, end a text, end a turn."""
    pairs: dict[int, int] = {}
    for role in ("bos_id", "eos_id"):
        a, b = getattr(student, role), getattr(teacher, role)
        if a is not None and b is not None:
            pairs[a] = b
    ends = [turn_ends(tokenizer) for tokenizer in (student, teacher)]
    return dict(zip(*ends, strict=False)) | pairs if all(ends) else pairs


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """Special tokens at the end of an answer under the chat template."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        ids, learnt = tokenizer.encode_chat(messages)
    except (ValueError, TypeError):
        return []
    texts = tokenizer.token_bytes()
    return [id_ for id_, counts in zip(ids, learnt, strict=True) if counts and not texts[id_]]


class _Cutter:
    """Split bytes into a tokenizer's pieces, as it would split them in the middle of a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._plain = tokenizer, prefix_bytes(tokenizer) == 0
        self.bytes = tokenizer.token_bytes()
        self.ids: dict[bytes, int] = {}
        for id_, text in enumerate(self.bytes):
            # SentencePiece has a comma twice; prefer a token that is not a byte token.
            if text and (
                text not in self.ids or _BYTE.fullmatch(tokenizer.token(self.ids[text]) or "")
            ):
                self.ids[text] = id_
        self._longest = max(map(len, self.ids), default=0)
        self._whole = any(len(text) > 1 and text[0] >= 0x80 for text in self.ids) and not any(
            0x80 <= text[0] < 0xC0 and len(text) > 1 for text in self.ids
        )

    def __call__(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Split each text into pieces; a text that is only part of a character has none."""
        out: list[list[int]] = [[]] * len(texts)
        words: dict[int, str] = {}
        for location, text in enumerate(texts):
            try:
                words[location] = text.decode()
            except UnicodeDecodeError:
                out[location] = [] if self._whole else self._greedy(text)
        if not self._plain:
            return [self._greedy(t) if i in words else out[i] for i, t in enumerate(texts)]
        encoded = self._tokenizer.backend.encode_batch(
            list(words.values()), add_special_tokens=False
        )
        for location, result in zip(words, encoded, strict=True):
            # Special tokens are not pieces of text.
            out[location] = [i for i in result.ids if self.bytes[i]]
        return out

    def _greedy(self, text: bytes) -> list[int]:
        """Split bytes that cannot be encoded as text, longest piece first."""
        out, location = [], 0
        while location < len(text):
            for size in range(min(self._longest, len(text) - location), 0, -1):
                id_ = self.ids.get(text[location : location + size])
                if id_ is not None:
                    out.append(id_)
                    location += size
                    break
            else:
                return out
        return out


def _first_piece(student: Tokenizer, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    texts, cut = student.token_bytes(), _Cutter(teacher)
    pieces = cut(texts)
    # A token that the teacher has too counts as itself, even if its merges would split it.
    items = [cut.ids.get(text, p[0] if p else -1) for text, p in zip(texts, pieces, strict=True)]
    return _single(items, student, teacher)


def _common_pieces(first: np.ndarray, student: Tokenizer, teacher: Tokenizer) -> np.ndarray:
    """Find the common token that begins each teacher token; `first` has those of our tokens."""
    cut, existing = _Cutter(student), _Cutter(teacher).ids
    texts = teacher.token_bytes()
    array = np.array([existing.get(text, -1) for text in texts])
    unknown = [i for i, text in enumerate(texts) if text and text not in cut.ids]
    pieces = dict(zip(unknown, cut([texts[i] for i in unknown]), strict=True))
    # A token that only the teacher has counts as its first piece under our tokenizer.
    for i, ids in pieces.items():
        piece = first[ids[0]] if ids else -1
        # A normalised text is not a prefix of the original and may lead back to it.
        begins = piece >= 0 and len(texts[piece]) < len(texts[i])
        array[i] = piece if begins and texts[i].startswith(texts[piece]) else -1
    passing = np.zeros(len(texts) + 1, bool)
    passing[unknown] = True
    # Terminates, because each round maps to a shorter text.
    while (moving := passing[array]).any():
        array[moving] = array[array[moving]]
    for b in special_pairs(student, teacher).values():
        array[b] = b
    return array.astype(np.int32)


def _exact(student: Tokenizer, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    existing = _Cutter(teacher).ids
    return _single([existing.get(text, -1) for text in student.token_bytes()], student, teacher)


def _single(pieces: Any, student: Tokenizer, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(pieces, np.int64)[:, None]
    for a, b in special_pairs(student, teacher).items():
        ids[a] = b
    return ids, (ids >= 0).astype(np.float32)


def _spread(student: Tokenizer, teacher: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    cut, back = _Cutter(teacher), _Cutter(student)
    rows: list[dict[int, float]] = [{} for _ in back.bytes]
    for row, pieces in zip(rows, cut(back.bytes), strict=True):
        for id_, weight in _decayed(pieces):
            row[id_] = row.get(id_, 0.0) + weight
    for id_, pieces in enumerate(back(cut.bytes)):
        for ours_id, weight in _decayed(pieces):
            rows[ours_id][id_] = rows[ours_id].get(id_, 0.0) + weight
    # A common token stands only for itself, and a special token for that of the same role.
    for location, text in enumerate(back.bytes):
        if text in cut.ids:
            rows[location] = {cut.ids[text]: 1.0}
    for a, b in special_pairs(student, teacher).items():
        rows[a] = {b: 1.0}
    ids, weights = np.full((len(rows), _KEPT), -1, np.int64), np.zeros((len(rows), _KEPT))
    for location, row in enumerate(rows):
        best = sorted(row.items(), key=lambda item: (-item[1], item[0]))[:_KEPT]
        total = sum(weight for _, weight in best)
        for i, (id_, weight) in enumerate(best):
            ids[location, i], weights[location, i] = id_, weight / total
    return ids, weights


def _decayed(pieces: list[int]) -> list[tuple[int, float]]:
    total = sum(_DECAY[: len(pieces)])
    return [(id_, weight / total) for id_, weight in zip(pieces, _DECAY)]


_BUILDERS = {"first_piece": _first_piece, "exact": _exact, "spread": _spread}
