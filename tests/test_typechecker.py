"""Wrong annotations, and callers that do not keep to them, are found."""

import dataclasses
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError

from logitjax import losses
from tests import _typechecker
from tests._typechecker import checked

Rows = Float[jax.Array | np.ndarray, "rows width"]
ROWS = np.zeros((2, 3), np.float32)


@checked
def dot(a: Rows, b: Rows, *, scale: float = 1.0) -> Float[np.ndarray, " rows"]:
    return (scale * (a * b).sum(-1))[: len(a) if scale else 0]


def test_axes_are_those_of_all_arguments_and_of_the_result():
    assert dot(ROWS, ROWS, scale=2).shape == (2,)
    for wrong in (ROWS[:1], ROWS[0], ROWS.astype(int), ROWS.tolist()):
        with pytest.raises(TypeCheckError):
            dot(ROWS, wrong)
    with pytest.raises(TypeCheckError):
        dot(ROWS, ROWS, scale=0)


def test_axes_of_one_call_say_nothing_of_another():
    @checked
    def outer(a: Rows) -> float:
        return float(dot(a[:, :2], a[:, :2]).sum() + dot(a[:1], a[:1]).sum())

    assert outer(ROWS) == 0


def test_what_names_no_axes_is_checked_too():
    @checked
    def ratio(a: int, b: float = 1.0) -> float:
        return a / b if b else "infinite"

    assert ratio(1, 2) == 0.5
    with pytest.raises(TypeCheckError):
        ratio("1")
    with pytest.raises(TypeCheckError):
        ratio(1, 0)


def test_fields_of_dataclasses_and_names_in_quotes_are_checked():
    @checked
    @dataclasses.dataclass
    class Pair:
        first: int
        second: "int | None" = None

    assert Pair(1, second=2).second == 2
    for wrong in (dict(first="1"), dict(first=1, second="2")):
        with pytest.raises(TypeCheckError):
            Pair(**wrong)

    @checked
    def of(pair: "Nowhere", count: "int") -> Any:
        return pair, count

    assert of(1, 2) == (1, 2)
    with pytest.raises(TypeCheckError):
        of(1, "2")


def test_a_function_without_anything_to_check_is_itself():
    def anything(x: Any, y=None) -> Any:
        return x, y

    assert checked(anything) is anything


def test_checks_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert dot(ROWS, ROWS[:1]).shape == (2,)


def test_the_packages_own_functions_are_checked_whatever_is_around_them():
    with pytest.raises(TypeCheckError):
        losses.Blocks(vocab="four")
    source = b"""
if True:
    class A:
        @staticmethod
        def f(x: int): return x
    def g(x: int):
        def inner(y: int): return y
        return inner
"""
    scope: dict[str, Any] = {_typechecker._DECORATOR: checked}
    exec(_typechecker._instrumented(source, "somewhere.py"), scope)
    for function in (scope["A"].f, scope["g"], scope["g"](1)):
        assert function(1) is not None
        with pytest.raises(TypeCheckError):
            function("1")
