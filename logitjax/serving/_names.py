"""Names of tokens in an answer, and the bytes that they represent."""

from collections.abc import Sequence

from logitjax.models import Tokenizer


class TokenNames:
    """Tokens of one model as OpenAI's API writes them.

    A token is named by its text, including a leading space; by its bytes, as `bytes:\\xc3`, if it
    is only part of a character; and as written if it is special.
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
        """Values by token name; a second token of the same name is named by its id."""
        named: dict[str, float] = {}
        for token, value in top:
            number = f"token_id:{token}"
            name = number if as_ids else self(token)[0]
            named[number if name in named else name] = value
        return named
