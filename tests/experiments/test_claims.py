"""The registry of claims: verdicts by hand, and faults that its check must name."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import yaml

from experiments.claims import __main__ as command
from experiments.claims import check, judge, page, statistics
from experiments.claims import claim as claims_of
from experiments.claims import record as records_of
from experiments.claims.claim import Arithmetic, Claim, Contrast, Setting, Units, Verdict

DELTA = 0.02
SETTING = Setting(
    records="toy",
    experiment="toy",
    flags=("--preset=report",),
    seeds=5,
    trials=3,
    updates=10,
    units=Units(of="picture", n=40),
    contrasts=(
        Contrast(
            name="ours less theirs",
            metric="right",
            first=("ours",),
            second=("theirs",),
            delta=DELTA,
        ),
    ),
    hours=0.1,
)


def record(arm: str, seed: int) -> records_of.Record:
    rng = np.random.default_rng([seed, arm == "ours"])
    right = rng.random(40) < (0.95 if arm == "ours" else 0.5)
    return records_of.Record(
        arm=arm,
        seed=seed,
        role="report" if seed else "trial",
        setting=claims_of.digest(SETTING),
        environment={"jax": "0"},
        validation=[] if seed else [0.1, 0.9, 0.5],
        chosen=1,
        edge=False,
        trials=3,
        updates=10,
        examples=640,
        units=records_of.names_digest(range(40)),
        count=40,
        values={"right": np.packbits(right).tobytes().hex()},
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    """Pages with a claim that records decide, one of arithmetic, and all others open."""
    docs = tmp_path_factory.mktemp("docs")
    (docs / "claims").mkdir()
    folder = docs / "results" / "claims" / "toy"
    for arm in ("ours", "theirs"):
        for seed in range(6):
            records_of.write(record(arm, seed), folder)
    verdict = Verdict(word="open", scope="here", why="not run")
    for prefix, count in claims_of.COUNTS.items():
        for number in range(1, count + 1):
            name, more = f"{prefix}-{number}", {}
            if name == "DH-1":
                more = {"kind": "number", "settings": (SETTING,)}
            if name == "DF-2":
                numbers = {"base": [1.0, 2.0], "fused": [2.0, 3.0]}
                more = {"kind": "arithmetic"}
                more["arithmetic"] = Arithmetic(
                    inputs=numbers, formula="fused - base", claimed=[1.0, 3.0], within=0.1
                )
            given = {"kind": "number", "verdict": verdict} | more
            claims_of.write(Claim(id=name, paper="a paper", claim="So.", **given), docs / "claims")
    claims = claims_of.load(docs / "claims")
    promised = claims_of.thresholds(claims.values(), "toy")
    (folder / records_of.THRESHOLDS).write_text(json.dumps(promised))
    judged = judge.judge(claims, docs / "results" / "claims")
    for one in judged.values():
        claims_of.write(one, docs / "claims")
    (docs / "measurements").mkdir()
    (docs / "measurements" / "claims.md").write_text(page.text(judged))
    mark = f"<!-- claim: DH-1 -->\n\n{page.sentence(judged['DH-1'])}\n"
    (docs / "dual_head.md").write_text(mark)
    return docs


def test_what_is_sound_has_no_fault(sound):
    assert check.faults(sound) == []
    claims = claims_of.load(sound / "claims")
    assert claims["DH-1"].verdict.word == "holds"
    assert claims["DF-2"].verdict.word == "refuted"
    assert claims["DF-2"].verdict.computed == (1.0, 1.0)


def _claim(name: str, change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    def plant(docs: pathlib.Path) -> None:
        path = docs / "claims" / f"{name}.yaml"
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    return plant


def _record(name: str, change: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
    def plant(docs: pathlib.Path) -> None:
        path = docs / "results" / "claims" / "toy" / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return plant


def _file(name: str, change: Callable[[str], str]) -> Callable[[pathlib.Path], None]:
    return lambda docs: (docs / name).write_text(change((docs / name).read_text())) and None


def _effect(**values: float) -> Callable[[pathlib.Path], None]:
    return _claim("DH-1", lambda claim: claim["verdict"]["effects"][0].update(values))


def _remove(name: str) -> Callable[[pathlib.Path], None]:
    return lambda docs: (docs / name).unlink()


FAULTS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "an unknown field": (_claim("UL-1", lambda c: c.update(extra=1)), "extra"),
    "a kind that does not exist": (_claim("UL-1", lambda c: c.update(kind="hope")), "kind"),
    "another claim's name": (_claim("UL-1", lambda c: c.update(id="UL-2")), "id: expected 'UL-1'"),
    "a claim left out": (_remove("claims/IF-3.yaml"), "IF-3: expected a file"),
    "a changed effect": (_effect(value=0.9), "DH-1: verdict"),
    "a changed interval": (_effect(low=0.3001), "DH-1: verdict"),
    "a changed p-value": (_effect(p=0.0), "DH-1: verdict"),
    "another word": (
        _claim("DH-1", lambda c: c["verdict"].update(word="refuted")),
        "DH-1: verdict",
    ),
    "the paper's scope": (_claim("DH-1", lambda c: c["verdict"].update(scope="paper")), "scope"),
    "a changed result of arithmetic": (
        _claim("DF-2", lambda c: c["verdict"].update(computed=[1.0, 1.1])),
        "DF-2: verdict",
    ),
    "a formula that calls": (
        _claim("DF-2", lambda c: c["arithmetic"].update(formula="fused.sum()")),
        "formula",
    ),
    "a number claimed afterwards": (
        _claim("DF-2", lambda c: c["arithmetic"].update(claimed=[1.0, 1.0])),
        "DF-2: verdict",
    ),
    "a threshold lowered after the run": (
        _claim("DH-1", lambda c: c["settings"][0]["contrasts"][0].update(delta=0.001)),
        "delta: expected 0.02",
    ),
    "too few seeds": (_claim("DH-1", lambda c: c["settings"][0].update(seeds=3)), "seeds"),
    "a seed left out": (_remove("results/claims/toy/ours-3.json"), "5 reported seeds, got 4"),
    "an arm left out": (
        lambda docs: [p.unlink() for p in (docs / "results/claims/toy").glob("theirs-*")] and None,
        "records of theirs",
    ),
    "an extra trial": (
        _record("ours-0", lambda r: r["validation"].append(0.2)),
        "trials: expected 3",
    ),
    "more updates": (_record("ours-2", lambda r: r.update(updates=20)), "updates"),
    "more examples": (_record("ours-2", lambda r: r.update(examples=1280)), "examples"),
    "other units": (_record("ours-2", lambda r: r.update(units="0")), "units"),
    "a missing unit": (_record("ours-2", lambda r: r.update(count=39)), "units: expected 40"),
    "a changed answer": (
        _record("ours-2", lambda r: r["values"].update(right="00" * 5)),
        "DH-1: verdict",
    ),
    "a choice by the test": (_record("ours-2", lambda r: r.update(chosen=2)), "best on validation"),
    "a choice at an edge": (_record("ours-2", lambda r: r.update(edge=True)), "edge"),
    "the choosing seed reported": (
        _record("ours-0", lambda r: r.update(role="report")),
        "expected a trial",
    ),
    "another setting": (_record("ours-2", lambda r: r.update(setting="0")), "another setting"),
    "a changed digit of the page": (
        _file("measurements/claims.md", lambda text: text.replace("1 holds", "2 holds")),
        "claims.md",
    ),
    "a changed digit elsewhere": (
        _file("dual_head.md", lambda text: text.replace("holds", "refuted")),
        "dual_head.md: DH-1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(sound, tmp_path, fault):
    shutil.copytree(sound, tmp_path / "docs")
    plant, named = FAULTS[fault]
    plant(tmp_path / "docs")
    faults = check.faults(tmp_path / "docs")
    assert any(named in line for line in faults), faults


def test_arms_are_run_in_parts_and_judged_when_all_are_there(tmp_path, monkeypatch):
    parts = SETTING.model_copy(update={"arm_flag": "arm"})
    assert claims_of.digest(parts) == claims_of.digest(SETTING)
    for seed in range(6):
        records_of.write(record("ours", seed), tmp_path / "toy")
    assert records_of.made(tmp_path / "toy", SETTING)
    assert not records_of.made(tmp_path / "toy", parts)
    commands = []

    class Toy:
        @staticmethod
        def records(setting, workdir):
            return [record(arm, seed) for arm in setting.arms for seed in range(6)]

    monkeypatch.setattr(records_of, "RECORDS", tmp_path)
    monkeypatch.setattr(command.subprocess, "run", lambda words, **_: commands.append(words[-1]))
    monkeypatch.setattr(command.importlib, "import_module", lambda name: Toy)
    command.take(parts, tmp_path / "work")
    command.take(parts, tmp_path / "work")  # Nothing is left.
    assert commands == ["--arm=theirs"]
    assert records_of.made(tmp_path / "toy", parts)
    # An arm that a kill left half-written is read again.
    for seed in (4, 5):
        (tmp_path / "toy" / f"theirs-{seed}.json").unlink()
    command.take(parts, tmp_path / "work")
    assert commands.pop() == "--arm=theirs"
    command.take(SETTING, tmp_path / "work")
    assert commands[1:] == [f"--workdir={tmp_path / 'work'}"]


def test_a_record_needs_a_value_for_each_unit():
    with pytest.raises(ValueError, match="ours-1: right: expected 40 units, got 39"):
        records_of.make(SETTING, "ours", 1, {"right": [0.0] * 39}, units=range(40), examples=8)


def test_an_interval_sees_seeds_and_units():
    rng = np.random.default_rng(0)
    seed, unit = rng.normal(size=(8, 1)), rng.normal(size=(1, 30))
    shared = statistics.crossed(1.0 + 0.01 * seed + unit)
    alone = statistics.crossed(1.0 + 0.01 * seed + np.zeros((1, 30)))
    # Thirty units of standard deviation 1: an error of .18, which a t over seeds does not see.
    assert (shared.high - shared.low) / 2 == pytest.approx(1.96 * unit.std() / 30**0.5, rel=0.15)
    assert alone.high - alone.low < 0.1 * (shared.high - shared.low)


def test_one_seed_decides_nothing():
    once = statistics.crossed(np.ones((1, 50)))
    assert statistics.word(once, 0.1) == "open"


def test_samples_that_share_pictures_make_the_interval_wider():
    values = np.arange(10.0)[:, None]
    alone, shared = (statistics.crossed(values, overlap=one) for one in (0.0, 0.884))
    assert (shared.high - shared.low) / (alone.high - alone.low) == pytest.approx(3.14, abs=0.01)


def test_spreads_are_compared_in_pairs():
    rng = np.random.default_rng(0)
    both, unshared = rng.normal(size=(2, 20))
    seen = statistics.spread(both + 0.1 * unshared, 2 * both)
    assert seen.low < np.log(2) < seen.high
    # The ends of the interval are where Pitman's test is at 5 %.
    edge = statistics.spread(both + 0.1 * unshared, 2 * both / np.exp(seen.low))
    assert edge.p == pytest.approx(0.05, abs=1e-6)


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_words_by_hand():
    def word(low, value, high, p=0.01):
        one = statistics.Estimate(value=value, low=low, high=high, p=p, detectable=1.0)
        return statistics.word(one, 0.2)

    assert word(0.1, 0.3, 0.5) == "holds"
    assert word(0.1, 0.3, 0.5, p=0.2) == "open"
    assert word(0.01, 0.1, 0.15) == "refuted"
    assert word(-0.1, 0.1, 0.3) == "open"
