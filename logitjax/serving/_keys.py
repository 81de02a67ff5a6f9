"""Who may ask."""

import dataclasses
import hmac
from collections.abc import Sequence

from logitjax.serving._errors import ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One API key and what it may spend.

    Attributes:
        name: What logs and metrics call it; never the secret.
        secret: What the client shows; None lets anybody ask.
        queries: Most answers ever (prompts times copies).
        tokens: Most tokens ever, of prompts and answers.
        queries_per_minute: Most answers a minute.
        tokens_per_minute: Most tokens a minute.
    """

    name: str = "anybody"
    secret: str | None = dataclasses.field(default=None, repr=False)
    queries: int | None = None
    tokens: int | None = None
    queries_per_minute: int | None = None
    tokens_per_minute: int | None = None


def find_key(keys: Sequence[Key], authorization: str) -> Key:
    """The key that a request shows.

    Raises:
        ApiError: It shows none of them.
    """
    given = authorization.encode(errors="surrogateescape")
    found = None
    for key in keys:
        if key.secret is None:
            return key
        # In constant time, and all of them: stopping early would tell a key letter by letter.
        if hmac.compare_digest(given, f"Bearer {key.secret}".encode()):
            found = key
    if found is None:
        raise ApiError(401, "a wrong or missing API key", headers={"WWW-Authenticate": "Bearer"})
    return found
