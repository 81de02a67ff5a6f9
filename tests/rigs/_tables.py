"""Tables of what rigs try, as files of JSON beside them."""

import json
from pathlib import Path
from typing import Any


def read(name: str) -> Any:
    return json.loads(Path(__file__).with_name(f"{name}.json").read_text())


def text(parts: Any) -> str:
    """A text; a long one is written as its parts, some with how often they stand there."""
    if isinstance(parts, str):
        return parts
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)
