"""Names of tokens in an answer, and the bytes that they stand for."""

from collections.abc import Sequence

from logitjax.models import Tokenizer


class TokenNames:
    """Tokens of one model as OpenAI's API writes them.

    A token is called by its text, a space in front included; by its bytes, as `bytes:\\xc3`, where
    it holds only a part of a character; and as it is written where it is special.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._bytes = tokenizer, tokenizer.token_bytes()

    def __call__(self, token: int) -> tuple[str, bytes]:
        stored = self._bytes[token] if token < len(self._bytes) else b""
        if not stored:
            name = self._tokenizer.decode([token])
            return name, name.encode()
        try:
            return stored.decode(), stored
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in stored), stored

    def by_name(self, top: Sequence[tuple[int, float]], *, as_ids: bool) -> dict[str, float]:
        """Values by the tokens' names; a second one of a name is called by its number."""
        named: dict[str, float] = {}
        for token, value in top:
            number = f"token_id:{token}"
            name = number if as_ids else self(token)[0]
            named[number if name in named else name] = value
        return named
