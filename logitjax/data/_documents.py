"""Cut an example into pieces of text that fit into a row for every tokenizer."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.data._tokenizer import TokenizerLike

# Consecutive stretches of text, each with whether the model learns to predict it.
Segments = Sequence[tuple[str, bool]]

# More characters per token than any tokenizer reaches on prose; longer texts are first cut to this.
_CHARACTERS_PER_TOKEN = 8
# Tokens per character vary little, so interpolation finds a good end in a few probes; a nearly full
# row is good enough.
_MAX_PROBES = 12
_GOOD_FILL = 0.98


class DocumentTooLong(ValueError):
    """A document that must not be split does not fit into a row."""


def render_example(example: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Render text unchanged, prompt and response joined, and messages in ChatML."""
    # Only responses and the assistant's messages (with the end mark) are learned.
    if "text" in example:
        return [(example["text"], True)]
    if "messages" not in example:
        return [(example["prompt"], False), (example["response"], True)]
    segments: list[tuple[str, bool]] = []
    context = ""
    for message in example["messages"]:
        context += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            segments += [(context, False), (_said(message) + "<|im_end|>", True)]
            context = "\n"
        else:
            context += message["content"] + "<|im_end|>\n"
    return [*segments, (context, False)] if context else segments


def _said(message: Mapping[str, Any]) -> str:
    """Return the assistant's text, with tool calls in the format of Hermes and Qwen."""
    calls = (json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    parts = (message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls))
    return "\n".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer with the special tokens that packing puts around documents."""

    tokenizer: TokenizerLike

    @property
    def add_bos(self) -> bool:
        return bool(getattr(self.tokenizer, "add_bos", False))

    def __call__(self, segments: Segments, *, last: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids and loss mask; nothing predicts the first token of a piece."""
        ids: list[int] = []
        learnt: list[bool] = []
        if self.add_bos and self.tokenizer.bos_id is not None:
            ids.append(self.tokenizer.bos_id)
            learnt.append(False)
        before = ""
        for text, trained in segments:
            new = self.tokenizer.encode(text)
            if before:
                # Alone, SentencePiece would begin every part with a space.
                start, whole = map(self.tokenizer.encode, (before, before + text))
                new = whole[len(start) :] if whole[: len(start)] == start else new
            before = text
            ids += new
            learnt += [trained] * len(new)
        if last and self.tokenizer.eos_id is not None:
            ids.append(self.tokenizer.eos_id)
            learnt.append(segments[-1][1])
        mask = np.asarray(learnt, bool)
        # Nothing predicts the first token.
        mask[:1] = False
        return np.asarray(ids, np.int32), mask


Piece = dict[str, tuple[np.ndarray, np.ndarray]]


def split_document(
    segments: Segments, encoders: Mapping[str, Encoder], seq_len: int, *, may_split: bool = True
) -> Iterator[Piece]:
    """Yield pieces with the same text for every tokenizer, of at most `seq_len` tokens in each."""
    # A document is cut only if it does not fit, before white space if there is any.
    text = "".join(t for t, _ in segments)
    limit = seq_len * _CHARACTERS_PER_TOKEN
    if len(text) <= limit or not may_split:
        piece = {name: encode(segments, last=True) for name, encode in encoders.items()}
        if max(len(ids) for ids, _ in piece.values()) <= seq_len:
            yield piece
            return
    if not may_split:
        raise DocumentTooLong(f"does not fit into {seq_len} tokens")
    starts = [match.start() for match in re.finditer(r"\s+", text)]
    bounds = np.asarray(sorted({0, *starts, len(text)}))
    begin = 0
    while begin < len(text):
        end, piece = _longest_prefix(segments, bounds, begin, encoders, seq_len)
        yield piece
        begin = end


def _longest_prefix(
    segments: Segments,
    bounds: np.ndarray,
    begin: int,
    encoders: Mapping[str, Encoder],
    seq_len: int,
) -> tuple[int, Piece]:
    """Find nearly the longest stretch from `begin` that fits, by secants, as encoding is slow."""
    total = int(bounds[-1])
    stop = min(total, begin + seq_len * _CHARACTERS_PER_TOKEN)
    candidates = bounds[slice(*np.searchsorted(bounds, [begin, stop], side="right"))]
    # Cut before white space; a run without any is cut between characters.
    for ends in (candidates, np.arange(begin + 1, min(total, begin + seq_len) + 1)):
        best: tuple[int, Piece] | None = None
        low, high = -1, len(ends)
        guess = len(ends) - 1
        for probe in itertools.count():
            if high - low <= 1 or (probe >= _MAX_PROBES and best is not None):
                break
            end = int(ends[guess])
            part = _cut(segments, begin, end)
            piece = {name: encode(part, last=end == total) for name, encode in encoders.items()}
            longest = max(1, *(len(ids) for ids, _ in piece.values()))
            if longest <= seq_len:
                low, best = guess, (end, piece)
                if end == total or longest >= _GOOD_FILL * seq_len:
                    break
            else:
                high = guess
            # Where the row would be full if all of it were as dense as this stretch.
            expected = begin + (end - begin) * seq_len / longest
            guess = int(np.searchsorted(ends, expected, side="right")) - 1
            if probe >= _MAX_PROBES or not low < guess < high:
                guess = (low + high) // 2
        if best is not None:
            return best
    raise ValueError(f"seq_len={seq_len} is too short: not even one character of a document fits")


def _cut(segments: Segments, begin: int, end: int) -> list[tuple[str, bool]]:
    cut: list[tuple[str, bool]] = []
    position = 0
    for text, trained in segments:
        part = text[max(begin - position, 0) : max(end - position, 0)]
        if part:
            cut.append((part, trained))
        position += len(text)
    return cut
