"""Tables of what rigs try, as files of JSON or TOML beside them."""

import json
import tomllib
from pathlib import Path
from typing import Any


def read(name: str) -> Any:
    """A table by the name of its file, of which `.json` may be left out."""
    text = Path(__file__).with_name(name if "." in name else f"{name}.json").read_text()
    return tomllib.loads(text) if name.endswith(".toml") else json.loads(text)


def text(parts: Any) -> str:
    """A text; a long one is written as its parts, some with how often they stand there."""
    if isinstance(parts, str):
        return parts
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)
