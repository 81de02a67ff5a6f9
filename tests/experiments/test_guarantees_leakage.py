"""A share of the fuzzer of widths, and what it compares with.

`python -m tests.rigs guarantees --only=leakage` tries all of it.
"""

import numpy as np
import pytest

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
