"""The command that audits one's own model, in this process and behind one's own server."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from logitjax import leakage, models
from logitjax.commands import audit
from tests.leakage.servers import Server
from tests.serving._server import server


def _records(workdir):
    paths = sorted((workdir / "policies").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


@pytest.mark.every_change
@pytest.mark.slow
def test_rules_are_audited_and_what_leaked_is_written(tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    config = audit.Config(
        model="tiny", policy=("full", "top_5", "top_5_bias", "sampling"), corner=40
    )
    audit.run(config, workdir)
    records = _records(workdir)
    assert records["full"]["width"] == "32"
    assert records["full"]["leak"] > 0.999
    assert records["top_5"]["verdict"] == "these attacks recover little of the head"
    assert records["top_5_bias"]["width"] == "32"
    # A bias that moves only what is drawn hides nothing.
    assert records["sampling"]["width"] == "32"
    assert records["sampling"]["queries"] == 257 + 40 * 40
    assert "open: every row comes back" in (workdir / "report.md").read_text()
    # Others can go on from the file: it spans the head's columns.
    recovered = np.load(workdir / "recovered" / "full.npz")
    head = models.load("tiny")[0].head_of().rows
    assert leakage.align_head(recovered["basis"], np.asarray(head)).leak > 0.999
    np.testing.assert_array_equal(recovered["tokens"], np.arange(257))
    row = np.load(workdir / "recovered" / "top_5_bias.npz")
    assert row["known"].all()
    assert row["basis"].shape == (40, 32)
    # What is finished is not asked again.
    monkeypatch.setattr(leakage, "audit", None)
    audit.run(config, workdir)
    # And is not shown for another model.
    with pytest.raises(ValueError, match=r"audit .* does not fit: its model is"):
        audit.run(dataclasses.replace(config, model="tiny:1"), workdir)


@pytest.mark.slow
def test_a_server_of_ours_is_audited_beside_its_model(tmp_path):
    flags = ("--model=tiny", "--bias=reported", "--decimals=7", "--max_length=64", "--slots=8")
    with server(*flags, "--max_waiting=64") as (where, _):
        config = audit.Config(
            model="tiny",
            url=where,
            prompts=40,
            prompt_length=4,
            corner=40,
            budget=1000,
            server=leakage.LogitPolicy(top_k=5, bias="reported", decimals=7),
        )
        audit.run(config, epath.Path(tmp_path))
    record = _records(epath.Path(tmp_path))["server"]
    assert record["width"] == "32"
    # A row is told twice, and a corner once; before them come 12 + 16 + 4 + 4 + 4 + 6 queries that
    # test the server, an echo with its own, 280 of seeds, and one at the end.
    assert record["queries"] == 65 + 65 + 40 * (1 + 10) + 46 + 2 + 280 + 1
    assert not record["unlike"]
    tests = {test["test"]: test for test in record["tests"]}
    assert tests["lattice"]["seen"] == "none"
    assert tests["bias moves"]["seen"] == "reported"
    assert "values inside a prompt" in tests["echo"]["seen"]
    # Equal seeds make equal draws, whatever moves nothing, and beside whomever they are drawn.
    assert [tests[name]["effect"] for name in ("seed", "key", "company")] == [1, 1, 0]
    assert tests["law"]["p"] > 1e-3
    assert tests["penalties"]["seen"].endswith("the prompt, moves by repetition_penalty")
    assert record["verdict"].startswith("open: every row comes back to ")


def test_a_server_that_is_not_as_declared_ends_with_status_three(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_oracle", lambda *_: Server("two decimals", 0))
    workdir = epath.Path(tmp_path)
    config = audit.Config(url="http://127.0.0.1:9", vocab_size=60, prompts=16, prompt_length=1)
    for _ in range(2):  # What is finished is not asked again, and ends as it did.
        with pytest.raises(SystemExit) as end:
            audit.run(config, workdir)
        assert end.value.code == 3
    report = (workdir / "report.md").read_text()
    assert "not as declared, so nothing is certified: lattice: 2 decimals" in report
    assert "| told again" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "model: expected a model, a url or both"),
        ({"url": "http://127.0.0.1:1"}, "vocab_size, prompts: expected numbers"),
        ({"model": "tiny", "policy": ("open",)}, "policy: expected full"),
    ],
)
def test_what_is_missing_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        audit.Config(**changes)
