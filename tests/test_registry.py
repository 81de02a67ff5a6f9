"""Texts become values of an open set: its own, another package's, and errors that name the term."""

import dataclasses
import importlib.metadata
import re
import sys

import pytest

from logitjax.registry import Registry


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    one: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled:
    """Values times a factor.

    And more about it.
    """

    factor: float = 1.0
    steps: int = 1
    axes: tuple[int, ...] = ()
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.factor < 0:
            raise ValueError(f"factor: expected no negative number, got {self.factor}")


def shifted(by: int = 1) -> Scaled:
    """A function makes a value too."""
    return Scaled(steps=by)


SCALES = Registry(
    kind="scale",
    group="logitjax.no_such_group",
    members={"scaled": Scaled, "double": Scaled(factor=2.0), "shifted": shifted},
    base=Scaled,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("scaled", Scaled()),
        ("scaled()", Scaled()),
        (
            " scaled( factor = 3 , axes=(0, 1), kind=wide )",
            Scaled(factor=3.0, axes=(0, 1), kind="wide"),
        ),
        ("double", Scaled(factor=2.0)),
        ("double(steps=2, kind='a, b')", Scaled(factor=2.0, steps=2, kind="a, b")),
        ("shifted(by=4)", Scaled(steps=4)),
        (f"{__name__}:Scaled(steps=5)", Scaled(steps=5)),
    ],
)
def test_a_text_names_a_value(text, value):
    assert SCALES.parse(text) == value
    assert repr(SCALES.parse(text)) == repr(value)  # 3 and 3.0 are one option.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "scald",
            "expected one of double, scaled, shifted or package:Name, got 'scald'; scaled is",
        ),
        (
            "scaled(factr=2)",
            "expected one of factor, steps, axes, kind, got 'factr'; factor is near",
        ),
        ("scaled(factor=True)", "scaled(factor): expected a number, got True"),
        ("scaled(steps=1.5)", "scaled(steps): expected a whole number, got 1.5"),
        ("scaled(2)", "scaled: expected option=value, with literal values, got '2'"),
        ("scaled(factor=f(2))", "scaled: expected option=value, with literal values"),
        ("scaled(factor=1", "expected name, name(option=value) or package:Name"),
        ("scaled(factor=-1)", "scaled: factor: expected no negative number, got -1.0"),
        ("no_package:Name", "no_package:Name: expected an importable module, got No module"),
        ("dataclasses:No", "dataclasses:No: expected an importable module, got module"),
        (f"{__name__}:Other", f"{__name__}:Other: expected a Scaled, got Other"),
    ],
)
def test_an_error_is_one_line_that_names_the_term(text, message):
    with pytest.raises(ValueError, match="scale.*" + re.escape(message)) as error:
        SCALES.parse(text)
    assert "\n" not in str(error.value)


def test_help_has_a_line_for_each_member():
    assert SCALES.help().splitlines() == [
        "double   Values times a factor. (factor=2.0)",
        "scaled   Values times a factor.",
        "shifted  A function makes a value too.",
    ]


def test_a_module_beside_the_caller_is_found(tmp_path, monkeypatch):
    text = f"from {__name__} import Other as Mine\n"
    (tmp_path / "beside_the_caller.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    anything = dataclasses.replace(SCALES, base=None)
    assert anything.parse("beside_the_caller:Mine(one=1)") == Other(one=1)


def test_an_entry_point_adds_a_member_and_replaces_none(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("theirs", f"{__name__}:Scaled", SCALES.group),
        importlib.metadata.EntryPoint("double", f"{__name__}:Scaled", SCALES.group),
    ]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: points if group == SCALES.group else []
    )
    assert SCALES.names() == ["double", "scaled", "shifted", "theirs"]
    assert SCALES.parse("theirs(factor=4)") == Scaled(factor=4.0)
    assert SCALES.parse("double") == Scaled(factor=2.0)
