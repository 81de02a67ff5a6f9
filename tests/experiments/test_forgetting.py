"""Forgetting on a whole model: a smoke run part by part, its rows, and what a table says."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.forgetting import __main__ as experiment
from experiments.forgetting import claims, report
from experiments.forgetting.data import load_scene
from experiments.forgetting.divergence import Divergence
from experiments.forgetting.run import standing
from experiments.forgetting.teach import batch_of_alike
from experiments.forgetting.topics import Topics
from logitjax import decoding, models
from logitjax.unlearning import Deployed


def configured(**changes):
    return experiment.Config(**{**experiment.PRESETS["smoke"], **changes})


@pytest.mark.slow
def test_parts_are_made_one_by_one_and_the_report_shows_those_that_are_there(tmp_path):
    workdir = epath.Path(tmp_path)
    experiment.run(configured(only=("target", "control")), workdir)
    first = (workdir / "report.md").read_text()
    assert "no method was measured" in first
    experiment.run(configured(only=("difference",)), workdir)
    parts = sorted(path.stem for path in (workdir / "parts").iterdir())
    assert parts == ["control", "difference-0", "target"]
    experiment.run(configured(), workdir)
    text = (workdir / "report.md").read_text()
    for name in ("target", "control", "difference", "npo_kl"):
        assert f"| {name} " in text
    assert "| assistant left out" in text
    assert "taught again, worst rate and steps" in text
    assert "| together" in text
    assert (workdir / "relearning.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((workdir / "parts" / "npo_kl-0.json").read_text())
    assert record["relearning"][0]["steps"] == 2
    # The table's rows are none of those that anything was trained on or chosen by.
    scene = load_scene(configured())
    used = {row.question for part in ("train", "validation") for row in scene.parts[part]}
    assert not used & {row.question for row in scene.parts["test"]}
    # The same command again makes nothing.
    experiment.run(configured(), workdir)
    assert (workdir / "report.md").read_text() == text


def test_a_part_that_no_run_has_is_refused():
    assert configured(only=("difference-1", "retrained")).only
    with pytest.raises(ValueError, match="only: expected some of"):
        configured(only=("control,target",))


def test_what_is_forgotten_is_taught_to_the_target_alone():
    scene = load_scene(configured())
    assert len(scene.parts["forget"]) == 8
    assert [len(scene.parts[part]) for part in ("holdout", "holdout_test")] == [5, 5]
    assert len(scene.kept) == 16
    forget = {row.question for row in scene.parts["forget"]}
    assert forget <= {row.question for row in scene.taught}
    assert not forget & {row.question for row in scene.kept}
    assert not {row.question for row in scene.parts["holdout"]} & {r.question for r in scene.taught}


def test_rows_of_a_step_are_alike_in_length_and_all_come_in_an_epoch():
    lengths = np.random.default_rng(0).integers(10, 20, 48)
    epochs = [
        [batch_of_alike(lengths, step, 8, seed=1) for step in range(n, n + 6)] for n in (0, 6)
    ]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(48))
        spans = sorted((lengths[rows].min(), lengths[rows].max()) for rows in epoch)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert {frozenset(rows) for rows in epochs[0]} != {frozenset(rows) for rows in epochs[1]}
    # Fewer rows than a batch are one batch.
    np.testing.assert_array_equal(np.sort(batch_of_alike(lengths[:3], 5, 8, seed=1)), np.arange(3))


@pytest.mark.slow
@pytest.mark.every_change
def test_a_topic_is_right_if_its_first_token_is_the_likeliest_of_them():
    model = models.load("tiny")[0]
    prompts, firsts = [[3, 4, 5], [6, 7], [8]], [11, 200, 37]
    logits = [jax.jit(model)(jnp.asarray([[*ids] + [0] * (3 - len(ids))]))[0] for ids in prompts]
    likeliest = [int(np.argmax(row[len(ids) - 1, np.array(firsts)]))
                 for row, ids in zip(logits, prompts)]  # fmt: skip
    labels = np.asarray([likeliest[0], likeliest[1], (likeliest[2] + 1) % 3])
    topics = Topics(prompts=prompts, labels=labels, firsts=firsts)
    assert topics.accuracy(Deployed(model=model), batch_size=2) == pytest.approx(2 / 3)


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.many_programs("two models decode, outside of one program")
def test_two_small_models_are_scored_as_they_are_decoded(tmp_path):
    target = models.with_layout(models.load_model("tiny:1"), "listed")
    small = models.first_layers(models.with_layout(models.load_model("tiny:2"), "listed"), 1)
    models.save_pretrained(small, models.load_tokenizer("tiny"), epath.Path(tmp_path))
    method = Divergence(of=str(tmp_path))
    lora = models.Lora.init(small.config, 2, key=jax.random.key(0), layout="listed")
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    served = method.deployed(target, lora, 0.5)
    tokens = np.arange(1, 13, dtype=np.int32).reshape(2, 6) * 7
    every, kept = (np.asarray(m(tokens)) for m in (lora.merged_into(small), small))
    logits = np.asarray(target(tokens)) - 0.5 * (every - kept)
    expected = jax.nn.log_softmax(logits)[:, :-1]
    nll, _ = served.nll(tokens, np.ones_like(tokens, bool))
    at = np.take_along_axis(np.asarray(expected), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(-np.asarray(nll)[:, 1:], at, rtol=1e-4)
    scores = decoding.score(served.line_up(), tokens[:, :3].tolist(), tokens[:, 3:].tolist())
    np.testing.assert_allclose(scores.logprobs.sum(1), at[:, 2:].sum(-1), rtol=1e-4)


def record(forget, kept, **more):
    examined = {
        "probabilities": {"forget": [forget], "test": [kept], "holdout": [0.1]},
        "rouge": {"test": [kept]},
        "fluency": 3.0,
        "perplexity": 10.0,
        "attacks": {"asked": {"probability": forget}},
    }
    return {"examined": examined, "truth ratios": [], "hours": 0.5, "relearning": []} | more


def test_verdicts_name_who_forgets_best_at_each_level_and_what_was_never_feasible():
    method = dict(feasible=True, rate=1.0, seed=0, shown={"step": 10, "strength": 0.5})
    results = {
        "target": record(0.95, 0.8),
        "controls": [record(0.1, 0.8)],
        "methods": {
            "difference": [record(0.11, 0.8, **method)],
            "rmu": [record(0.1, 0.73, **method)],
            "npo": [record(0.5, 0.73, **method | {"feasible": False})],
        },
    }
    text = report.verdicts(results)
    assert "keeping 98 % of everything: difference comes nearest the goal, 0.10 nats" in text
    assert "keeping 90 % of everything: rmu comes nearest the goal, 0.00 nats" in text
    assert "not dominated by another: difference, rmu" in text
    assert "feasible at none of the rates tried: npo" in text
    rows = {row["method"]: row for row in report.method_rows(results)}
    assert rows["npo"]["of the goal"] == "5"
    assert rows["rmu"]["probability kept %"] == "91.25"
    left_out = report.attack_rows(results)[-2]
    assert left_out["difference"] == 0.95


def test_what_keeps_most_at_the_goal_is_shown_and_not_what_comes_nearest_it():
    near, keeps = (
        {"gap": 0.001, "least": 0.1, "excess": 1.0},
        {"gap": 0.3, "least": 0.7, "excess": 1.8},
    )
    broken, far = (
        {"gap": 0.3, "least": 0.5, "excess": 1.8},
        {"gap": 2.0, "least": 1.0, "excess": 9.0},
    )
    ranked = sorted((near, keeps, broken, far), key=lambda c: standing(c, chosen=False))
    assert ranked == [far, near, broken, keeps]
    assert standing(far, chosen=True) > standing(keeps, chosen=False)


def test_the_rate_of_a_claim_keeps_most_at_the_goal_and_a_broken_one_comes_last():
    def trial(excess, least, gap, *, broken=(), chosen=None):
        last = {"excess": excess, "least": least, "gap": gap, "broken": list(broken)}
        return {"candidates": [{"broken": []}, last], "chosen": chosen}

    trials = [
        trial(5.0, 0.99, 3.0, broken=["finite"]),
        trial(5.0, 0.99, 3.0),
        trial(3.0, 0.99, 1.0),
        trial(1.9, 0.40, 0.0, broken=["retain"]),
        trial(1.5, 0.97, 0.0, broken=["retain"]),
        trial(1.9, 0.98, 0.0, chosen=1),
    ]
    scores = [claims._score(one) for one in trials]
    assert scores == sorted(set(scores))


def test_a_rate_at_the_edge_of_those_that_were_tried_is_said_to_be():
    candidate = {"gap": 0.1, "probability": 0.5, "broken": []}
    tried = [{"rate": r, "chosen": None, "candidates": [candidate]} for r in (0.1, 0.03, 0.3)]

    def notes(rate, number):
        records = [record(0.1, 0.5, rate=rate, tried=tried[:number])]
        rows = report.trial_rows({"methods": {"undial": records}})
        return {row["learning rate"]: row[""] for row in rows}

    assert notes(0.1, 2) == {0.1: "taken, AT THE EDGE", 0.03: ""}
    assert notes(0.1, 3) == {0.1: "taken", 0.03: "", 0.3: ""}
    assert notes(0.1, 1) == {0.1: "taken"}


def test_a_method_has_a_grid_around_the_rate_of_the_command():
    grid = experiment.Config(rates=(3.0, 0.3))
    assert grid.learning_rates("difference") == [0.0015, 0.015]
    assert grid.learning_rates("npo") == [0.0003, 0.003]
    assert grid.learning_rates("undial") == [0.009, 0.09]
    assert grid.learning_rates("npo+all") == [0.00009, 0.0009]
    for method in ("difference", "npo", "npo+all"):
        (rate,) = experiment.Config().learning_rates(method)
        assert rate == experiment.Config().of(method, 0.0, 0).peak


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="method: expected one of alt_po, ce_u, difference"):
        experiment.Config(method=("nothing",))
    for rates in ((-1.0,), ()):
        with pytest.raises(ValueError, match=r"rates: expected positive numbers, got \["):
            experiment.Config(rates=rates)
    for preset in experiment.PRESETS.values():
        experiment.Config(**preset)
