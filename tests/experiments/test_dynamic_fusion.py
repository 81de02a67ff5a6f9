"""The dynamic fusion experiment: a smoke run through its command line, and what scores mean."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

from experiments.claims.claim import Units, load
from experiments.dynamic_fusion import __main__ as dynamic_fusion
from experiments.dynamic_fusion import arms as dynamic_fusion_arms
from experiments.dynamic_fusion import claims as dynamic_fusion_claims
from experiments.dynamic_fusion import report as dynamic_fusion_report
from experiments.dynamic_fusion.data import Questions, load_task
from experiments.dynamic_fusion.train import Scored, answer_states
from logitjax import training
from logitjax.data import SPLITS
from logitjax.fusion import DynamicFusion, ProxyTuning
from logitjax.models import load_model, load_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
CHANGES = {
    "general": f"text:{ROOT / 'LICENSE'}",
    "domain": f"text:{ROOT / 'LICENSE'}",
    "mesh": "data:4,tensor:2",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dynamic_fusion")
    command = [sys.executable, "-m", "experiments.dynamic_fusion", "--preset=smoke"]
    command += [f"--workdir={workdir}", *[f"--{k}={v}" for k, v in CHANGES.items()]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "One expert, of the first domain" in done.stdout
    return epath.Path(workdir)


@pytest.mark.slow
def test_report_has_every_arm_and_a_plot(finished):
    report = (finished / "report.md").read_text()
    for arm in (*dynamic_fusion_arms.SINGLE, *dynamic_fusion_arms.SEVERAL, "static"):
        assert f"| {arm} " in report
    assert "large, tuned (ceiling)" in report
    assert "tokens/s" in report
    assert (finished / "alpha.png").read_bytes().startswith(b"\x89PNG")
    seeds = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    alone = seeds[0]["single"]["domain"]["domain"]
    assert alone["static 1"]["nll"] == pytest.approx(alone["proxy"]["nll"], abs=1e-4)
    assert seeds[0]["ceiling"]["domain"]["domain"]["nll"] < alone["large"]["nll"]


@pytest.mark.slow
def test_same_command_again_trains_nothing_and_scores_what_is_missing(finished, monkeypatch):
    monkeypatch.setattr(training, "train_loop", None)
    config = dynamic_fusion.Config(**{**dynamic_fusion.PRESETS["smoke"], **CHANGES})
    before = (finished / "report.md").read_text()
    for piece in ("seed-0-domain-on-domain-test", "seed-0-ceiling-task-on-task"):
        (finished / "results" / f"{piece}.json").unlink()
    (finished / "report.md").unlink()
    dynamic_fusion.run(config, finished)
    assert (finished / "report.md").read_text() == before


@pytest.mark.slow
def test_a_task_of_the_harness_is_answered_by_every_arm(tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from tests.rigs import _judges_tasks

    monkeypatch.setattr(_judges_tasks, "_articles", lambda rng, count: [])
    *_, name = _judges_tasks.write_tasks(tmp_path, 8)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    asked = functools.partial(lm_eval.simple_evaluate, task_manager=tasks)
    monkeypatch.setattr(lm_eval, "simple_evaluate", asked)
    changes = {**CHANGES, "graded": name, "graded_questions": 4}
    config = dynamic_fusion.Config(**{**dynamic_fusion.PRESETS["smoke"], **changes})
    dynamic_fusion.run(config, epath.Path(tmp_path / "run"))
    assert "## Answers graded" in (tmp_path / "run/report.md").read_text()
    seed = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert set(seed["graded"]) >= {"large", "expert", "proxy", "static", "dlf grid", "ceiling"}
    assert all(0 <= scores["exact_match"] <= 1 for scores in seed["graded"].values())


@pytest.mark.slow
@pytest.mark.many_programs("every part of the claims makes models and scores them")
def test_every_part_of_the_claims_has_a_value_for_each_unit(tmp_path):
    alphas = dynamic_fusion.PRESETS["claims"]["static_alpha"]
    parts = ("domain", "task", "general", "shown", "both_domain", "both_task")
    changes = {**CHANGES, "mesh": "data:1", "part": parts, "seeds": 2, "examples": 2}
    changes |= {
        "static_alpha": alphas,
        "test_tokens": 130,
        "block_size": 60,
        "validation_tokens": 130,
    }
    config = dynamic_fusion.Config(**{**dynamic_fusion.PRESETS["smoke"], **changes})
    folder = epath.Path(tmp_path)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    dynamic_fusion.run(config, folder)
    counts = {"64 tokens": 2, "question": config.test_questions}
    for name in ("DF-1", "DF-3", "DF-4", "DF-5"):
        for setting in load()[name].settings:
            units = Units(of=setting.units.of, n=counts[setting.units.of])
            changed = setting.model_copy(update={"seeds": 1, "units": units})
            made = list(dynamic_fusion_claims.records(changed, tmp_path))
            reports = [record for record in made if record.role == "report"]
            assert {record.arm for record in reports} == set(setting.arms)
            for record in reports:
                (metric,) = record.values
                assert np.isfinite(record.of(metric)).all()
                if record.arm == "static_0":
                    np.testing.assert_allclose(record.of("gap"), 0, atol=1e-3)
            assert all(len(record.validation) == 1 for record in made if record.role == "trial")


def test_questions_after_examples_are_read_as_one_row():
    task = load_task(
        "letters", load_tokenizer("tiny"), length=16, sizes=dict.fromkeys(SPLITS, 5), shown=2
    )
    questions, model = task.splits["test"], load_model("tiny", layout="listed")
    assert len(task.examples) == 2 * len("aaaa:a\n\n")
    shown = np.broadcast_to(task.examples, (5, len(task.examples)))
    whole = Questions(
        np.concatenate([shown, questions.tokens], 1),
        questions.last + len(task.examples),
        questions.answers,
    )
    np.testing.assert_allclose(
        answer_states(model, questions, 3, task.examples), answer_states(model, whole, 3), atol=1e-5
    )


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    head = rng.normal(size=(32, 8)).astype(np.float32)
    labels = rng.integers(0, 32, 11)
    return [Scored(rng.normal(size=(11, 8)).astype(np.float32), labels) for _ in range(3)], head


@pytest.mark.every_change
@pytest.mark.slow
def test_scores_are_means_over_positions_whatever_the_block(scored):
    models, head = scored
    arms = {"proxy": ProxyTuning(), "jeffreys": DynamicFusion(method="jeffreys")}
    by_size = [
        dynamic_fusion_arms.score(models, [head] * 3, arms, block_size=size, static=(0.0, 1.0))
        for size in (4, 11)
    ]
    for name, means in by_size[0].items():
        for key, value in means.items():
            assert value == pytest.approx(by_size[1][name][key], abs=1e-4), (name, key)
    large, base, expert = (np.float64(m.hidden) @ np.float64(head).T for m in models)
    fused = large + expert - base
    log_p = fused - np.log(np.exp(fused).sum(-1, keepdims=True))
    labels = models[0].labels
    means = by_size[0]
    assert means["proxy"]["nll"] == pytest.approx(-log_p[np.arange(11), labels].mean(), abs=1e-4)
    assert means["proxy"]["accuracy"] == pytest.approx((fused.argmax(-1) == labels).mean())
    assert means["static 1"]["nll"] == pytest.approx(means["proxy"]["nll"], abs=1e-5)
    assert means["static 0"]["nll"] == pytest.approx(means["large"]["nll"], abs=1e-5)
    assert dynamic_fusion_arms.best_static(means, (0.0, 1.0)) in (0.0, 1.0)
    given = {"own": np.linspace(0, 1, 11)}
    by_position = dynamic_fusion_arms.by_position(
        models, [head] * 3, {}, block_size=4, static=given
    )
    own = large + given["own"][:, None] * (expert - base)
    own -= np.log(np.exp(own).sum(-1, keepdims=True))
    nll = by_position["own"]["nll"]
    np.testing.assert_allclose(nll, -own[np.arange(11), labels], atol=1e-4)
    among = dynamic_fusion_arms.score(
        models, [head] * 3, {}, block_size=4, options=sorted(set(labels.tolist()))
    )
    assert among["large"]["accuracy"] >= means["large"]["accuracy"]


def test_alphas_are_those_of_each_position(scored):
    models, head = scored
    arms = {"grid": DynamicFusion(method="grid")}
    values = dynamic_fusion_arms.by_position(models, [head] * 3, arms, block_size=4)
    large, base, expert = (m.hidden @ head.T for m in models)
    _, info = jax.jit(DynamicFusion(method="grid").__call__)(large, expert, base)
    np.testing.assert_allclose(values["grid"]["alphas"].T, info["alpha"], atol=1e-6)


def test_questions_end_before_their_answer_and_answers_differ_at_once():
    sizes = {"train": 8, "validation": 4, "test": 4}
    task = load_task("letters", load_tokenizer("tiny"), length=16, sizes=sizes)
    for split, size in sizes.items():
        questions = task.splits[split]
        assert len(questions) == size
        assert (questions.answers == questions.tokens[:, 0]).all()
        assert (questions.last == 4).all()
    assert set(task.splits["test"].answers.tolist()) <= set(task.options)
    with pytest.raises(ValueError, match="expected topics:SOURCE or letters, got 'sums'"):
        load_task("sums", load_tokenizer("tiny"), length=16, sizes=sizes)


def test_a_gap_is_none_where_there_is_none():
    assert dynamic_fusion_report.gap_closed(3.0, 4.0, 2.0) == 50
    assert dynamic_fusion_report.gap_closed(3.0, 4.0, 4.0) is None


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="seeds: expected at least 1"):
        dynamic_fusion.Config(seeds=0)
    with pytest.raises(ValueError, match="static_alpha"):
        dynamic_fusion.Config(static_alpha=())


def test_presets_name_fields_that_exist():
    for preset in dynamic_fusion.PRESETS.values():
        dynamic_fusion.Config(**preset)
