"""API keys: who may send requests, and how many."""

import dataclasses
import hmac
from collections.abc import Sequence
from typing import Annotated

import pydantic
from etils import epath
from pydantic import BaseModel, Field

from logitjax.serving._errors import ApiError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """One API key and its budget.

    Attributes:
        name: Name in logs and metrics, where the secret never appears.
        secret: Text that the client has to send; None accepts any client.
        queries: Maximum number of answers in total (prompts times copies).
        tokens: Maximum number of tokens in total, of prompts and answers.
        queries_per_minute: Maximum number of answers per minute.
        tokens_per_minute: Maximum number of tokens per minute.
        nats: Maximum number of nats in total that answers may reveal, with metered choices.
    """

    name: str = "anybody"
    secret: str | None = dataclasses.field(default=None, repr=False)
    queries: int | None = None
    tokens: int | None = None
    queries_per_minute: int | None = None
    tokens_per_minute: int | None = None
    nats: float | None = None

    @classmethod
    def read(cls, path: str) -> tuple["Key", ...]:
        """The keys of a file: one JSON object per line, with these fields.

        ValueError if a line is not a key, or a name or a secret occurs twice; it names the line's
        number, never its text.
        """
        keys: list[Key] = []
        for number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                key = cls(**_Line.model_validate_json(line).model_dump())
            except pydantic.ValidationError as error:
                # The value itself would reveal the secret.
                first = error.errors(include_input=False, include_url=False)[0]
                field = ".".join(map(str, first["loc"])) or "line"
                raise ValueError(f"{path}:{number}: {field}: {first['msg']}") from None
            if any(other.name == key.name or other.secret == key.secret for other in keys):
                raise ValueError(f"{path}:{number}: its name or its secret occurs twice")
            keys.append(key)
        if not keys:
            raise ValueError(f"{path}: expected at least one key, got none")
        return tuple(keys)


# Headers are ASCII; an empty secret would be a mistake.
_Text = Annotated[str, Field(pattern=r"^[\x00-\x7f]*[\x21-\x7e][\x00-\x7f]*$")]
_Count = Annotated[int, Field(ge=0)] | None


class _Line(BaseModel, strict=True, extra="forbid"):
    """A key in a file, which must have a name and a secret."""

    name: _Text
    secret: _Text
    queries: _Count = None
    tokens: _Count = None
    queries_per_minute: _Count = None
    tokens_per_minute: _Count = None
    nats: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def find_key(keys: Sequence[Key], authorization: str) -> Key:
    header = authorization.encode(errors="surrogateescape")
    result = None
    for key in keys:
        if key.secret is None:
            return key
        # In constant time over all keys: stopping early would reveal a key letter by letter.
        if hmac.compare_digest(header, f"Bearer {key.secret}".encode()):
            result = key
    if result is None:
        raise ApiError(401, "a wrong or missing API key", headers={"WWW-Authenticate": "Bearer"})
    return result
