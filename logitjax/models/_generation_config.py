"""generation_config.json: which tokens end an answer, and how its publisher would sample."""

from typing import Any

from etils import epath

from logitjax.storage import read_json


def read_generation(path: epath.Path) -> dict[str, Any]:
    """What the file in a directory says; nothing where there is none.

    Raises:
        ValueError: One line naming the file: it is no JSON object.
    """
    file = path / "generation_config.json"
    if not file.exists():
        return {}
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected an object, got {type(raw).__name__}")
    return raw


def end_ids(path: epath.Path) -> tuple[int, ...] | None:
    """Tokens that end an answer; None where the directory leaves that to config.json."""
    ids = read_generation(path).get("eos_token_id")
    if ids is None:
        return None
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(
            f"{path / 'generation_config.json'}: eos_token_id: expected ids of tokens, got {ids!r}"
        )
    return tuple(ids)
