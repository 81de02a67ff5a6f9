"""Answers that follow a JSON schema: which tokens may come next."""

import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np

from logitjax.models import Tokenizer
from logitjax.serving._errors import BadRequestError

# Compact, but spaced as people and `json.dumps` write it: with white space at will small models
# write little else.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MOST_BYTES = 1 << 15


class Formats:
    """Grammars over the tokens of one model; safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def follow(self, kind: str, text: str) -> "Follower":
        """What holds one answer to a structure."""
        if not self._end_ids:
            raise _refused("this model has no token that ends an answer")
        if len(text) > _MOST_BYTES:
            raise _refused(f"a structure of {len(text)} bytes, at most {_MOST_BYTES} are taken")
        tokens = self._trie()
        try:
            if kind == "json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_LAYOUT)
            else:
                grammar = llguidance.grammar_from(kind, text)
        except ValueError as error:
            raise _refused(str(error)) from None
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        follower = Follower(matcher, self._vocab_size)
        if follower.failed:
            raise _refused(matcher.get_error().partition("<")[0])
        return follower

    def _trie(self) -> Any:
        with self._lock:  # A second of work for 50,000 tokens, once.
            if self._tokens is None:
                try:
                    self._tokens = llguidance.LLTokenizer(
                        self._tokenizer.backend.to_str(),
                        n_vocab=self._vocab_size,
                        # The library wants one; without any nothing is held to a schema.
                        eos_token=self._end_ids or [0],
                    )
                except ValueError as error:
                    raise _refused(f"this model's tokens cannot be held to one ({error})") from None
            return self._tokens


class Follower:
    """One answer on its way through a grammar.

    Attributes:
        allowed: Which tokens may come next: uint32 `[words]`, bit `v % 32` of word `v // 32` for
            token v.
        failed: Whether a limit of the library was met; what is allowed says nothing then.
    """

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._look()

    def copy(self) -> "Follower":
        """Another answer, as far as this one is."""
        return Follower(self._matcher.deep_copy(), 32 * self._words)

    def take(self, token: int) -> None:
        """Goes on by a token that was chosen."""
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self.allowed = words[: self._words]
        self.failed = self._matcher.is_error()


def _refused(reason: str) -> BadRequestError:
    return BadRequestError(f"response_format: {' '.join(reason.split())[:300]}", "response_format")
