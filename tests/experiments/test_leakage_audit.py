"""The audit runs, keeps what it found, and says what it means."""

import json

import pytest
from etils import epath

from experiments.leakage_audit import __main__ as leakage_audit
from experiments.leakage_audit import measure, report
from experiments.leakage_audit.config import DEMO, REPORT
from logitjax import leakage

# Runs parts of an experiment.
pytestmark = [pytest.mark.every_change, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("audit"))
    settings = leakage_audit.PRESETS["smoke"] | {
        "policy": ("full", "noise_0.1", "top_5", "top_5_bias", "argmax"),
        "seeds": 2,
    }
    config = leakage_audit.Config(**settings)
    leakage_audit.run(config, workdir)
    return config, workdir


def test_what_is_open_is_called_open_and_what_is_closed_closed(finished):
    _, workdir = finished
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    records = {(r["policy"], r["seed"]): r for r in lines}
    # Noise differs by seed; what has none runs once.
    assert set(records) == {
        ("full", 0),
        ("noise_0.1", 0),
        ("noise_0.1", 1),
        ("top_5", 0),
        ("top_5_bias", 0),
        ("argmax", 0),
    }
    assert records["full", 0]["width"] == "32"
    assert records["full", 0]["leak"] > 0.999
    assert records["noise_0.1", 0]["leak"] != records["noise_0.1", 1]["leak"]
    assert records["top_5", 0]["leak"] < 0.1
    assert records["top_5", 0]["values"] == 5 * 60
    biased = records["top_5_bias", 0]
    assert biased["row_error"] < 5e-6
    assert biased["row_queries"] == 65
    assert biased["width"] == "32"
    assert biased["queries"] == 65 + 40 * (1 + 10)
    # Measured, and what one answer is worth is that of the top 5.
    assert biased["leak"] > 0.99
    assert biased["kl"] == pytest.approx(records["top_5", 0]["kl"], rel=1e-3)
    searched = records["argmax", 0]
    assert searched["row_error"] < 0.01
    assert searched["row_queries"] < 256 * 4
    text = (workdir / "report.md").read_text()
    assert "`full`: open" in text
    assert "`top_5`: closed" in text
    for name in ("spectra.png", "frontier.png"):
        assert (workdir / name).stat().length > 1000


def test_finished_policies_are_not_asked_again(finished, monkeypatch):
    config, workdir = finished
    before = (workdir / "report.md").read_text()

    def fail(*_, **__):
        raise AssertionError("a policy was asked again")

    monkeypatch.setattr(measure.leakage, "audit", fail)
    leakage_audit.run(config, workdir)
    assert (workdir / "report.md").read_text() == before


def test_policies_by_name():
    assert leakage.LogitPolicy.parse("top_20_bias").bias == "reported"
    assert leakage.LogitPolicy.parse("dummy_64_0.02").dummy_scale == 0.02
    for name in {*DEMO, *REPORT}:
        assert leakage.LogitPolicy.parse(name)
    for wrong in ("top", "round_x", "noise_-1", "open"):
        with pytest.raises(ValueError, match="policy"):
            leakage_audit.Config(policy=(wrong,))


def test_a_cheap_defence_that_hides_the_width_only_is_said_to_do_so():
    record = {"leak": 0.99, "estimate": 40, "kl": 0.001}
    assert "only the width is hidden" in report.verdict([record], 32)
    dear = {"leak": 0.02, "estimate": None, "kl": 2.0}
    assert report.verdict([dear], 32) == "closed, and honest users pay for it"
