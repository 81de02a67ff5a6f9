"""The unlearning experiment: a smoke run, its caches, its rows, and what each arm minimises."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from experiments.unlearning import __main__ as experiment
from experiments.unlearning import arms, train
from experiments.unlearning import data as unlearning_data
from experiments.unlearning import report as unlearning_report
from logitjax import unlearning
from logitjax.evaluation import PromptTemplate
from logitjax.models import load_model, load_tokenizer, with_layout
from logitjax.unlearning import tofu

TOFU = pathlib.Path(__file__).parents[1] / "unlearning" / "tofu"
ARMS = ("npo_kl", "difference_clean")


def configured(**changes):
    return experiment.Config(
        **{
            **experiment.PRESETS["smoke"],
            "arm": ARMS,
            "alphas": (0.75,),
            "betas": (6.5, 1.0),
            "rates": (0.5, 1.0),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("unlearning"))
    config = configured()
    experiment.run(config, workdir)
    return config, workdir


@pytest.mark.slow
def test_report_has_every_arm_what_it_took_and_a_plot(finished):
    _, workdir = finished
    report = (workdir / "report.md").read_text()
    for arm in ("target", "retrained", *ARMS, "difference, bypassed"):
        assert f"| {arm} " in report
    assert "leaves the target's weights as they are" in report
    assert (workdir / "scatter.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["arm"] for record in records] == list(ARMS)
    npo, clean = records
    # Each rate was tried on validation, the better one is the arm's, weights of neither are left.
    results = workdir / "results"
    scores = {
        rate: json.loads((results / f"rate-{rate}-npo_kl.json").read_text())
        for rate in ("0.5", "1")
    }
    assert scores[f"{npo['rate']:g}"] == max(scores.values())
    tried = list((workdir / "models").glob("npo_kl-*/seed-0"))
    assert len(tried) == 2
    assert not any((directory / "best").exists() for directory in tried)
    assert f"x{npo['rate']:g}" in report.split("## Learning rates")[1]
    # So was each beta.
    betas = [json.loads((results / f"beta-{beta}.json").read_text()) for beta in ("6.5", "1")]
    assert clean["beta"] == max(betas, key=lambda record: record["validation"])["beta"]
    assert clean["peak_bytes"] < npo["peak_bytes"]
    assert clean["trained"] < npo["trained"]
    assert 1 <= npo["epoch"] <= 2
    # Without the assistant nothing was unlearned at all.
    bypassed = json.loads((workdir / "results" / "bypassed.json").read_text())
    assert bypassed["largest difference"] < 1e-5


@pytest.mark.slow
def test_same_command_again_trains_nothing_and_asks_what_is_missing(finished, monkeypatch):
    config, workdir = finished
    before = (workdir / "report.md").read_text()
    for name in ("difference_clean-0", "alphas", "target"):
        (workdir / "results" / f"{name}.json").unlink()

    def fail(*_, **__):
        raise AssertionError("something was trained again")

    monkeypatch.setattr(train, "planned_bytes", fail)
    experiment.run(config, workdir)
    again = (workdir / "report.md").read_text()
    assert again == before


def item(n, **more):
    return tofu.Item(question=f"q{n}?", answer=f"a{n}.", **more)


def test_paraphrases_are_paired_and_wrong_answers_are_not_the_right_one():
    rows = [
        item(0, question_paraphrases=("Q", "Q", "R"), answer_paraphrases=("A", "a0.", "B")),
        item(1, question_paraphrases=(), answer_paraphrases=("C",)),
    ]
    wrong = [item(0, perturbed_answers=("a0.", "x", "x", "y", "z"))]
    added, false = unlearning_data.augment(rows, wrong, 2, 2)
    assert [(i.question, i.answer) for i in added] == [("Q", "A"), ("R", "B"), ("q1?", "C")]
    assert [(i.question, i.answer) for i in false] == [("q0?", "x"), ("q0?", "y")]


def test_the_tables_of_the_release_are_read_from_their_first_row():
    config = configured(augmentation_dir=str(TOFU), paraphrases=2)
    added, false = unlearning_data._augmentations(config, 40)
    assert len({i.question for i in added}) == len(added) == 2
    assert "Kuwait" in added[0].question
    assert false
    assert unlearning_data._augmentations(configured(augment=False), 40) == ((), ())


def test_rows_of_several_questions_hold_each_once_and_predict_the_same():
    tokenizer, template = load_tokenizer("tiny"), PromptTemplate(before="", after=" ")
    items = [item(n) for n in range(5)]
    pairs = [template.encode_answer(tokenizer, i.question, i.answer, max_length=12) for i in items]
    single = unlearning.Row.padded(pairs, 12)
    together = unlearning_data.packed(items, tokenizer, template, 12, 24)
    assert len(together["tokens"]) < len(items)
    assert together["mask"].sum() == single["mask"].sum()
    model = load_model("tiny")
    params = nnx.state(model, nnx.Param)
    loss_fn = jax.jit(unlearning.make_answer_loss(model))
    (one, count, _), (other, same, _) = (
        loss_fn(nnx.to_pure_dict(params), rows, None) for rows in (single, together)
    )
    assert count == same
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_an_epoch_sees_every_row_once_whatever_the_size_of_a_step():
    rows = {"tokens": np.arange(10)[:, None]}
    seen = np.concatenate(
        [unlearning_data.picked(rows, s, size=4, seed=3)["tokens"][:, 0] for s in range(5)]
    )
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert unlearning_data.steps_an_epoch(rows, 4) == 3


@pytest.mark.every_change
@pytest.mark.slow
def test_a_model_with_its_assistant_is_scored_as_it_is_decoded():
    from logitjax import decoding

    config = experiment.Config(**experiment.PRESETS["smoke"])
    target = with_layout(load_model("tiny:3"), "listed")
    fresh = unlearning.Assistant.init(target, 1, rank=2, key=jax.random.key(0))
    noisy = jax.tree.map(
        lambda x: jax.device_put(
            x + 0.3 * np.sin(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        ),
        jax.device_get(fresh.lora),
    )
    deployed = dataclasses.replace(
        arms.deployed(
            target,
            unlearning.Assistant(base=fresh.base, lora=noisy),
            arms.differences(config)["difference_clean"],
        ),
        block=5,
    )
    tokens = np.arange(1, 15, dtype=np.int32).reshape(2, 7) * 7
    targets = np.arange(7) >= np.array([[3], [4]])
    nll, greedy = deployed.nll(tokens, targets)
    prompts, answers = zip(*[(r[:s].tolist(), r[s:].tolist()) for r, s in zip(tokens, (3, 4))])
    scores = decoding.score(deployed.line_up(), prompts, answers)
    np.testing.assert_allclose(np.asarray(nll).sum(-1), -scores.totals(), rtol=1e-4)
    assert np.asarray(greedy).sum() == scores.greedy.sum()


def test_official_and_clean_differ_where_the_release_and_we_do():
    found = arms.differences(experiment.Config())
    official, clean = found["difference_official"], found["difference_clean"]
    assert (official.uniform, official.fuse.form, official.fuse.filter) == (
        "all",
        "raw",
        "official",
    )
    assert (clean.uniform, clean.fuse.form, clean.fuse.filter) == ("answers", "centred", "none")
    assert official.generating.outside == "exclude"
    assert clean.generating.outside == "keep"
    assert official.lora_alpha / official.rank == 2
    assert clean.lora_alpha / clean.rank == 1
    assert (official.silent, clean.silent) == ("released", "all")


def test_target_does_not_depend_on_what_assistants_learn_beside():
    scene = unlearning_data.load_scene(configured())
    more = dataclasses.replace(scene, forget_more=(*scene.forget_more, item(0)))
    assert more.taught == scene.taught
    assert more.unlearned != scene.unlearned
    assert unlearning_data.load_scene(configured(authors=4)).taught != scene.taught


def test_verdicts_say_plainly_who_forgets_best_and_what_is_lost():
    def record(d, utility):
        return {"test": {"forget_quality.statistic": d, "utility": utility}}

    results = {
        "target": record(0.9, 0.5),
        "arms": {"npo": [record(0.2, 0.3)], "difference_clean": [record(0.3, 0.48)]},
    }
    text = unlearning_report.verdicts(results)
    assert "smallest D of all arms: npo (0.200), keeping 60.0 %" in text
    assert "keeps 96.0 % of the utility (LESS than 98 %), D 0.300, rank 2 of 2, NOT smaller" in text
    assert "at least 98 %:" not in text
    results["arms"]["rmu"] = [record(0.1, 0.3), record(0.2, 0.3), record(0.3, 0.3)]
    results["arms"]["difference_clean"] = [record(0.2, 0.48)]
    text = unlearning_report.verdicts(results)
    assert (
        "smallest D of all arms: difference_clean (0.200, npo too, rmu too), keeping 96.0 %" in text
    )
    assert "D 0.200, rank 1 of 3, as small as the best of the others (0.200)" in text
    results["arms"]["gradient_ascent"] = [record(0.8, 0.495)]
    results["alphas"] = [
        {"alpha": a, "filter": "none", "D": d, "forget probability": 1 - a, "% of target's": share}
        for a, d, share in ((0.5, 0.6, 99.0), (0.6, 0.6, 98.0), (1.0, 0.1, 60.0))
    ]
    text = unlearning_report.verdicts(results)
    assert "smallest D of those that keep at least 98 %: gradient_ascent (0.800)" in text
    assert "alpha 0.6 and filter none keep 98.0 % at D 0.600" in text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"method: expected one of .* got 'dpo'"):
        experiment.Config(arm=("dpo",))
    with pytest.raises(ValueError, match="filters, alphas: expected at least one each"):
        experiment.Config(filters=("official",))
    with pytest.raises(ValueError, match=r"rates: expected positive numbers, got \[0.0\]"):
        experiment.Config(rates=(0.0,))
    with pytest.raises(ValueError, match=r"betas: expected positive numbers, got \[\]"):
        experiment.Config(betas=())
    with pytest.raises(ValueError, match="row_length"):
        experiment.Config(row_length=8)
    with pytest.raises(ValueError, match="split at 2, 10 or 20"):
        unlearning_data.load_scene(configured(tofu_dir=str(tmp_path), authors=200))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        unlearning_data.load_scene(configured(tofu_dir=str(tmp_path / "none")))


def test_presets_name_fields_that_exist():
    for preset in experiment.PRESETS.values():
        experiment.Config(**preset)
