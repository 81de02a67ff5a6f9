"""Chat templates as models have them, and as an attacker would write them."""

import json
from pathlib import Path
from typing import Any

_TABLE = json.loads(Path(__file__).with_name("hostile_templates.json").read_text())


def _text(parts: Any) -> str:
    """A template; long ones are written as parts, some with how often they stand there."""
    if isinstance(parts, str):
        return parts
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in parts)


TEMPLATES: tuple[str, ...] = tuple(_TABLE["templates"])
LOOPS = tuple(map(_text, _TABLE["loops"]))
