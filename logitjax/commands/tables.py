"""Tables for people: Markdown of rows of values."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def format_value(value: Any) -> str:
    """Four significant digits for numbers, `-` for a missing value."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def text_cell(text: str) -> str:
    r"""Any text in one cell of a table; text of spaces alone is shown with its escapes.

    >>> print(text_cell("  a | b\n c"), text_cell(" \n "))
    a \| b c ' \n '
    """
    return " ".join(text.split()).replace("|", "\\|") or repr(text)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, one line per row; its columns are the union of the rows' keys, in order."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[format_value(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c[i]) for c in [columns, *cells]) for i in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(v.ljust(w) for v, w in zip(values, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(columns), rule, *map(line, cells)])
