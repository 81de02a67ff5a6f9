"""Who may ask."""

import dataclasses
import hmac
import json
from collections.abc import Sequence

from etils import epath

from logitjax.serving._errors import ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One API key and what it may spend.

    Attributes:
        name: Name in logs and metrics, where the secret never appears.
        secret: Text that the client has to send; None lets anybody ask.
        queries: Largest number of answers in all (prompts times copies).
        tokens: Largest number of tokens in all, of prompts and answers.
        queries_per_minute: Largest number of answers a minute.
        tokens_per_minute: Largest number of tokens a minute.
    """

    name: str = "anybody"
    secret: str | None = dataclasses.field(default=None, repr=False)
    queries: int | None = None
    tokens: int | None = None
    queries_per_minute: int | None = None
    tokens_per_minute: int | None = None


def find_key(keys: Sequence[Key], authorization: str) -> Key:
    """The key that a request shows."""
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


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of a file: one JSON object a line, with the fields of `Key`.

    Raises:
        ValueError: A line is not a key, or a name or secret occurs twice; the message has the
            line's number, never its text.
    """
    keys: list[Key] = []
    fields = {field.name for field in dataclasses.fields(Key)}
    for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{where}: expected a JSON object, got something else") from None
        if not isinstance(row, dict) or not {"name", "secret"} <= row.keys() <= fields:
            spent = ", ".join(sorted(fields - {"name", "secret"}))
            raise ValueError(f"{where}: expected name, secret and perhaps {spent}")
        texts = [row.pop("name"), row.pop("secret")]
        if not all(isinstance(text, str) and text.strip() and text.isascii() for text in texts):
            raise ValueError(f"{where}: expected a name and a secret, both ASCII and not empty")
        if not all(value is None or (type(value) is int and value >= 0) for value in row.values()):
            raise ValueError(f"{where}: expected whole numbers for what a key may spend")
        key = Key(name=texts[0], secret=texts[1], **row)
        if any(other.name == key.name or other.secret == key.secret for other in keys):
            raise ValueError(f"{where}: its name or its secret is there twice")
        keys.append(key)
    if not keys:
        raise ValueError(f"{path}: expected at least one key, got none")
    return tuple(keys)
