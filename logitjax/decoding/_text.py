"""Tokens to text as they arrive, and stop strings, which may end within a token."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from logitjax.models import Tokenizer

# Number of prompt tokens that a continuation is decoded after.
_CONTEXT = 8
# Its end mark and the quotes and brackets after it; 3.14 and inner abbreviations do not match.
_SENTENCE = r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Requests generated text, and a function that receives it as it arrives.

    With ``stream`` or ``stop_strings`` the steps run in chunks, and the host reads tokens between
    them. The tokens are the same.

    Attributes:
        tokenizer: tokenizer of the model, to decode texts.
        stop_strings: rows end with the token that completes one; needs ``tokenizer``.
        stop_pattern: regular expression; rows end with the token that completes its first match,
            which the text keeps. `"sentence"` is the end of a sentence with its closing quotes.
        stream: called with (row, new tokens, new text) after every chunk, the text ``''`` without
            a tokenizer.
        chunk: approximate number of tokens between two checks by the host; more if drafts do not
            pay off and there is nothing to check.
        continues: texts continue their prompts, so that a first word has the space before it that
            decoders like Llama-2's remove at the beginning of a text. By default they begin anew.
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
            raise ValueError(
                "stop_strings, stop_pattern: expected a tokenizer to find them, got none"
            )
        TextStream.pattern(self.stop_pattern)

    @property
    def watched(self) -> bool:
        ends = bool(self.stop_strings) or self.stop_pattern is not None
        return self.stream is not None or ends


def last_whole(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """A prompt's last tokens, which affect the spelling of the next; none after part of one."""
    last = [int(token) for token in prompt[-_CONTEXT:]]
    # The rest of the character would be lost, together with the text before it.
    cut = tokenizer.decode(last, skip_special=True).endswith("\N{REPLACEMENT CHARACTER}")
    return [] if cut else last


class TextStream:
    """The text of a growing list of tokens, returned once it can no longer change.

    It holds back the bytes of an unfinished character, and an end of the text that may start a stop
    string. Special tokens leave no text.

    Args:
        stop_strings: the text ends before the first of them.
        context: tokens that the text continues; none for a new text.
        unstopped: number of first tokens in whose text stop strings are ignored.
        stop_pattern: the text ends with its first match, as in `TextOptions`.

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
        """The pattern of `stop_pattern`; ValueError if it cannot end a text."""
        if text is None:
            return None
        try:
            pattern = re.compile(_SENTENCE if text == "sentence" else text)
        except re.error as error:
            raise ValueError(f"stop_pattern: expected a regular expression, {error}") from None
        if pattern.search(""):
            raise ValueError(f"stop_pattern: {text!r} matches an empty text and would stop all")
        return pattern

    def push(self, tokens: Sequence[int]) -> str:
        """Take more tokens, none after a stop string, and return the newly certain text."""
        for token in tokens:
            if self.stopped:
                break
            # One by one; otherwise a stop string inside several would not show which token ends it.
            self.tokens.append(int(token))
            self._ids.append(int(token))
            self.text += self._new_text()
            self._cut()
        return self._give(len(self.text) if self.stopped else len(self.text) - self._held())

    def finish(self) -> str:
        """The text that was held back, once no more tokens arrive."""
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
        """Decode after earlier tokens, since a decoder may treat the first one differently."""
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix)
        # The next token may contain the rest of the character.
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
        """The longest end of the text that starts a stop string."""
        longest = max(map(len, self.stop_strings), default=0)
        # From the longest: text that was sent cannot be taken back.
        for size in range(min(longest - 1, len(self.text) - self._from), 0, -1):
            if any(string.startswith(self.text[-size:]) for string in self.stop_strings):
                return size
        return 0
