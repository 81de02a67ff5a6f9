"""Students behind a recovered head: the report, resuming, and what each arm starts from."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from experiments.replication import __main__ as replication
from experiments.replication import arms, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("replication"))
    settings = replication.PRESETS["smoke"] | {"arm": ("recovered_1", "copied_1"), "steps": 2}
    config = replication.Config(**settings)
    replication.run(config, workdir)
    return config, workdir


@pytest.mark.slow
def test_the_report_holds_teacher_and_students(finished):
    config, workdir = finished
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    teacher, recovered, copied = map(json.loads, lines)
    assert teacher["arm"] == "teacher"
    # A mixing matrix more, a layer less; nothing is counted twice.
    width, vocab = config.width, config.vocab
    assert recovered["parameters"] - copied["parameters"] == width**2
    assert copied["parameters"] - copied["trained"] == 2 * vocab * width
    for record in (recovered, copied):
        assert math.isfinite(record["nll"])
        assert abs(record["null_procrustes_r2"]) < 0.2
    text = (workdir / "report.md").read_text()
    assert "decimals: width 16" in text
    assert "recovered_1" in text
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_students_are_not_trained_again(finished, monkeypatch):
    config, workdir = finished
    before = (workdir / "metrics.jsonl").read_text()

    def fail(*_, **__):
        raise AssertionError("something was trained again")

    monkeypatch.setattr(train, "train_student", fail)
    replication.run(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_a_student_with_everything_of_the_teacher_is_the_teacher(finished):
    config, workdir = finished
    scene = train.prepare(config, workdir)
    same = arms.dropped(scene.teacher["trunk"], 2)
    params = {"trunk": same, "head": scene.teacher["head"]}
    whole = arms.Student(scene.trunk, "teacher")
    mine = train.nll(scene.text, "test", whole, params, {})
    teacher = train.teacher_record(scene)
    assert mine["nll"] == pytest.approx(teacher["nll"], abs=1e-6)
    # The recovered columns hold the teacher's head up to one matrix and, for log-probabilities,
    # up to one vector: some mix gives its distribution back.
    head = np.asarray(scene.teacher["head"], np.float64)
    centred = head - head.mean(axis=0)
    basis = np.asarray(scene.basis, np.float64)
    mix = np.linalg.lstsq(basis, centred, rcond=None)[0]
    undone = {"trunk": same, "mix": jax.numpy.asarray(mix, jax.numpy.float32)}
    student = arms.Student(scene.trunk, "recovered")
    scores = train.nll(scene.text, "test", student, undone, {"basis": scene.basis})
    assert scores["nll"] == pytest.approx(teacher["nll"], abs=1e-2)


@pytest.mark.slow
def test_what_the_recovered_subspace_lacks_is_measured(finished):
    config, workdir = finished
    scene = train.prepare(config, workdir)
    mix = np.random.default_rng(0).standard_normal((config.width, config.width))
    whole = dataclasses.replace(scene, basis=scene.teacher["head"] @ mix)
    record = train.teacher_record(whole)
    assert record["nll_behind"] == pytest.approx(record["nll"], abs=1e-5)
    part = dataclasses.replace(scene, basis=scene.basis[:, :1])
    assert abs(train.teacher_record(part)["nll_behind"] - record["nll"]) > 1e-4


def test_arms_are_checked():
    with pytest.raises(ValueError, match="arm: expected KIND_LAYERS"):
        replication.Config(arm=("stolen_6",))
    with pytest.raises(ValueError, match="more layers than the teacher"):
        replication.Config(arm=("dropped_7",))
    with pytest.raises(ValueError, match=r"prompts: more than width \+ 1"):
        replication.Config(prompts=100)
