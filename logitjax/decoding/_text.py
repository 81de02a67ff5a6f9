"""Tokens to text as they come, and stop strings, which tokens do not respect."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from logitjax.models import Tokenizer

# Tokens of a prompt that its continuation is decoded after.
_CONTEXT = 8
# Its end and the quotes and brackets behind it; 3.14 and abbreviations inside a word end none.
_SENTENCE = r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Asks for generated text, and for a function that receives it as it comes.

    With ``stream`` or ``stop_strings`` the steps run in chunks, and the host reads tokens between
    them. The tokens are the same.

    Attributes:
        tokenizer: tokenizer of the model, to make texts.
        stop_strings: rows end with the token that completes one; needs ``tokenizer``.
        stop_pattern: regular expression; rows end with the token that completes its first match,
            which the text keeps. `"sentence"` is the end of a sentence and what follows it.
        stream: called with (row, new tokens, new text) after every chunk, the text ``''`` without
            a tokenizer.
        chunk: about so many tokens between two looks of the host; more where drafts do not pay and
            nobody looks.
        continues: texts go on from their prompts, so that a first word has the space before it that
            decoders of Llama-2's kind take from the beginning of a text. By default they begin
            again, as answers do.
    """

    tokenizer: Tokenizer | None = None
    stop_strings: Sequence[str] = ()
    stop_pattern: str | None = None
    stream: Callable[[int, list[int], str], None] | None = None
    chunk: int = 8
    continues: bool = False

    def __post_init__(self) -> None:
        ends = bool(self.stop_strings) or self.stop_pattern is not None
        if ends and self.tokenizer is None:
            raise ValueError("stop_strings, stop_pattern: a tokenizer is needed to find them")
        TextStream.pattern(self.stop_pattern)

    @property
    def watched(self) -> bool:
        ends = bool(self.stop_strings) or self.stop_pattern is not None
        return self.stream is not None or ends


def last_whole(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """A prompt's last tokens, which tell how the next is spelled; none after half a character."""
    last = [int(token) for token in prompt[-_CONTEXT:]]
    # The rest of the character would be lost, as what was there before.
    cut = tokenizer.decode(last, skip_special=True).endswith("\N{REPLACEMENT CHARACTER}")
    return [] if cut else last


class TextStream:
    """The text of a growing list of tokens, returned once it can no longer change.

    It holds back the bytes of an unfinished character, and an end of the text that may become a
    stop string. Special tokens leave no text.

    Args:
        stop_strings: the text ends before the first of them.
        context: tokens that the text continues; none for a new text.
        unstopped: number of first tokens in whose text no stop string counts.
        stop_pattern: the text ends with its first match, as of `TextOptions`.

    >>> from tokenizers import Tokenizer as Backend, decoders, models
    >>> backend = Backend(models.BPE({"a": 0, "b": 1, "!": 2}, []))
    >>> backend.decoder = decoders.Fuse()
    >>> stream = TextStream(Tokenizer(backend), stop_strings=["b!"])
    >>> [stream.push([token]) for token in (0, 1, 0, 1, 2, 0)]
    ['a', '', 'ba', '', '', '']
    >>> stream.text, stream.stopped, len(stream.tokens)
    ('aba', True, 5)
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        context: Sequence[int] = (),
        unstopped: int = 0,
        stop_pattern: str | None = None,
    ):
        if any(not string for string in stop_strings):
            raise ValueError("stop_strings: an empty string would stop everything")
        self.tokenizer = tokenizer
        self.stop_strings, self._pattern = tuple(stop_strings), self.pattern(stop_pattern)
        self.tokens: list[int] = []
        self.stopped = False
        self.text = ""
        self._sent = 0
        self._unstopped, self._from = unstopped, 0
        self._ids = last_whole(tokenizer, context)
        self._prefix, self._read = 0, len(self._ids)

    @staticmethod
    def pattern(text: str | None) -> re.Pattern[str] | None:
        """The pattern of `stop_pattern`; what is no regular expression is a ValueError."""
        try:
            return None if text is None else re.compile(_SENTENCE if text == "sentence" else text)
        except re.error as error:
            raise ValueError(f"stop_pattern: expected a regular expression, {error}") from None

    def push(self, tokens: Sequence[int]) -> str:
        """Take more tokens, none after a stop string, and return the text that is newly certain."""
        for token in tokens:
            if self.stopped:
                break
            # One by one, or a stop string inside of several would not say which token ends it.
            self.tokens.append(int(token))
            self._ids.append(int(token))
            self.text += self._new_text()
            self._cut()
        return self._give(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """The text that was held back, once no more tokens come."""
        if not self.stopped:
            self.text += self._decode(self._prefix)[len(self._decode(self._prefix, self._read)) :]
            self._prefix = self._read = len(self._ids)
            self._cut()
        return self._give(len(self.text))

    def _give(self, end: int) -> str:
        start, self._sent = self._sent, max(end, self._sent)
        return self.text[start : self._sent]

    def _decode(self, start: int, stop: int | None = None) -> str:
        return self.tokenizer.decode(self._ids[start:stop], skip_special=True)

    def _new_text(self) -> str:
        """Decoded with the tokens before, since a decoder may treat the first one differently."""
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix)
        # The next token may hold the rest of the character.
        if now.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _cut(self) -> None:
        if len(self.tokens) <= self._unstopped:
            self._from = len(self.text)
        items = [self.text.find(string, self._from) for string in self.stop_strings]
        ends = [location for location in items if location >= 0]
        match = self._pattern and self._pattern.search(self.text, self._from)
        ends += [match.end()] if match else []
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True

    def _held(self) -> int:
        """The longest end of the text that begins a stop string."""
        longest = max(map(len, self.stop_strings), default=0)
        # From the longest: what is sent cannot be taken back.
        for size in range(min(longest - 1, len(self.text) - self._from), 0, -1):
            if any(string.startswith(self.text[-size:]) for string in self.stop_strings):
                return size
        return 0
