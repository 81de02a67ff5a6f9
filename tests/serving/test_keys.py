"""A file of API keys: what it may say, and who is let in."""

import json

import pytest

from logitjax.serving import Key
from logitjax.serving._errors import ApiError
from logitjax.serving._keys import find_key

GOOD = {"name": "anna", "secret": "s-1", "tokens": 1000}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_keys_of_a_file_are_found_by_what_a_client_shows(tmp_path):
    path = write(tmp_path / "keys.jsonl", GOOD, "", {"name": "ben", "secret": "s-2"})
    keys = Key.read(path)
    assert keys == (Key(name="anna", secret="s-1", tokens=1000), Key(name="ben", secret="s-2"))
    assert find_key(keys, "Bearer s-2").name == "ben"
    for shown in ("", "s-2", "Bearer s-3", "Bearer ", "Bearer \xe9"):
        with pytest.raises(ApiError, match="wrong or missing API key"):
            find_key(keys, shown)
    assert "s-1" not in repr(keys)


@pytest.mark.parametrize(
    "row",
    [
        "not json",
        "[]",
        {"name": "ben"},
        {"name": "ben", "secret": ""},
        {"name": "ben", "secret": "sécret"},
        {"name": "anna", "secret": "s-2"},
        {"name": "ben", "secret": "s-1"},
        {"name": "ben", "secret": "s-2", "token": 5},
        {"name": "ben", "secret": "s-2", "tokens": -1},
        {"name": "ben", "secret": "s-2", "tokens": True},
    ],
    ids=str,
)
def test_a_line_that_is_no_key_is_named_and_not_shown(tmp_path, row):
    path = write(tmp_path / "keys.jsonl", GOOD, row)
    with pytest.raises(ValueError, match=r"keys\.jsonl:2: ") as error:
        Key.read(path)
    assert "s-2" not in str(error.value)
    with pytest.raises(ValueError, match="expected at least one key"):
        Key.read(write(tmp_path / "none.jsonl", ""))
