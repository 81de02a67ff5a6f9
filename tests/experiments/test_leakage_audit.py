"""The audit runs, keeps what it found, and says what it means."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.leakage_audit import __main__ as leakage_audit
from experiments.leakage_audit import capability, measure
from logitjax import leakage
from logitjax.leakage._alignment import HeadAlignment
from logitjax.leakage._subspace import OutputSubspace
from logitjax.leakage._width import OutputWidth

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


def test_what_is_open_is_called_open_and_what_leaks_little_so(finished):
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
    assert "`top_5`: these attacks recover little of the head" in text
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
    for name in {*leakage_audit.Config().policy, *leakage_audit.PRESETS["report"]["policy"]}:
        assert leakage.LogitPolicy.parse(name)
    for wrong in ("top", "round_x", "noise_-1", "open"):
        with pytest.raises(ValueError, match="policy"):
            leakage_audit.Config(policy=(wrong,))


def test_a_cheap_defence_that_hides_the_width_only_is_said_to_do_so():
    width = OutputWidth(lower=40, estimate=40, upper=40, reason="")
    subspace = OutputSubspace(
        basis=np.zeros((2, 2), np.float32),
        width=width,
        singular_values=np.ones(2),
        vocab_where=np.ones(2, bool),
    )
    aligned = HeadAlignment(relative_rms=0.0, overlap=0.99, chance=0.0, leak=0.99)
    audit = leakage.Audit(prompts=1, subspace=subspace, alignment=aligned, hidden=32)
    assert audit.verdict.endswith("only the width is hidden")
    assert dataclasses.replace(audit, hidden=40).verdict.endswith("is out")
    little = dataclasses.replace(aligned, leak=0.02)
    dear = dataclasses.replace(audit, alignment=little, utility={"kl": 2.0})
    assert dear.verdict == "these attacks recover little of the head, and honest users pay for it"


def test_what_an_answer_shows_is_learnt_best_by_its_own_writer():
    rng = np.random.default_rng(0)
    log_p = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 2, (2, 8, 256)), jnp.float32))
    tokens = rng.integers(0, 256, (2, 8)).astype(np.int32)
    # A byte of a prompt is text in every arm.
    told = log_p[:, 2:-1]
    missed = {}
    for shown in ("rows", "top 5", "prompts", "text"):

        def loss(shift, shown=shown):
            moved = jax.nn.log_softmax(log_p + shift)
            return capability._loss(moved, jnp.asarray(tokens), 3, shown, told)

        missed[shown] = np.asarray(jax.grad(loss)(jnp.zeros_like(log_p)))
    for shown in ("rows", "top 5"):
        np.testing.assert_allclose(missed[shown][:, 2:-1], 0, atol=1e-6)
        assert np.abs(missed[shown][:, :2]).max() > 1e-3
    assert not missed["prompts"][:, 2:].any()
    assert np.abs(missed["text"][:, 2:-1]).max() > 1e-3
