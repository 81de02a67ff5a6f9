"""Named sets of settings in TOML files beside the code that reads them."""

import tomllib
from pathlib import Path
from typing import Any


def read(module: str, name: str = "presets.toml") -> dict[str, dict[str, Any]]:
    """The tables of a file beside a module, by name and in order; lists become tuples.

    Names and values are those of flags, as in a file for `--config`, and are checked like these.
    """
    tables = tomllib.loads(Path(module).with_name(name).read_text())
    return {
        name: {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
        for name, table in tables.items()
    }
