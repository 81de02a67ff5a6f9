"""A share of the fuzzer of widths, what it compares with, and what attackers pay.

`python -m tests.rigs guarantees --only=leakage,attackers` tries all of it.
"""

import numpy as np
import pytest

from tests.rigs import _guarantees_attackers as attackers
from tests.rigs import _guarantees_leakage as fuzzer

# Runs parts of a benchmark.
pytestmark = [pytest.mark.every_change, pytest.mark.slow]


@pytest.mark.parametrize("kind", fuzzer.KINDS)
def test_no_wrong_width_is_called_certain(kind):
    cases = [case | {"kind": kind} for case in fuzzer.run(kind, 2, 1)]
    rows, bars = fuzzer.report(cases)
    assert sum(row["violations"] for row in rows) == 0
    if len(rows) != 1 or "coverage" not in rows[0]:
        assert all(bar.met for bar in bars)  # sixty APIs, or servers of many kinds
        return
    (row,) = rows
    if kind in ("exact", "NaN or -inf"):
        assert row["certain"] == 1
    if kind != "weak behind strong":
        assert row["coverage"] == 1


def test_the_rules_it_compares_with_are_those_of_their_papers():
    # Gavish and Donoho, table 4: omega(1) = 2.858, omega(.5) = 2.1711, omega(.1) = 1.6089.
    for beta, omega in ((1.0, 2.858), (0.5, 2.1711), (0.1, 1.6089)):
        values = np.array([omega * 1.02, omega * 0.98, 1.0, 1.0, 1.0, 1.0, 1.0])
        assert fuzzer.gavish_donoho(values, int(1000 * beta), 1000) == 1
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 300))
    rows += 0.3 * rng.standard_normal(rows.shape)
    assert fuzzer.parallel_analysis(rows, rng) == 3


def test_attackers_pay_what_is_known_and_find_a_small_model_s_width():
    cases = [
        case | {"kind": kind}
        for kind in ("one_of_n", "forced tokens")
        for case in attackers.run(kind, 1, 0)
    ]
    _, bars = attackers.report(cases)
    assert len(bars) == 3
    for bar in bars:
        assert bar.met or (bar.name.startswith("attackers, one_of_n") and bar.value < 1.25)
