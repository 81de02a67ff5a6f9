"""The main job on a tiny model: every arm trains, scores, reports, and continues after a stop."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from experiments.graph_fusion import __main__ as graph_fusion
from experiments.graph_fusion import train
from experiments.graph_fusion.programs import programs
from logitjax import distillation, losses, models, training
from logitjax.distillation import objectives
from logitjax.models import load_model, load_tokenizer

ROOT = pathlib.Path(__file__).parents[2]


def config(**changes):
    smoke = {
        **graph_fusion.PRESETS["smoke"],
        "data": f"text:{ROOT / 'LICENSE'}",
        "mesh": "data:2,tensor:4",
    }
    return graph_fusion.Config(**{**smoke, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("fusion"))
    graph_fusion.run(config(loss=("sft", "uld+gld"), seeds=2), workdir)
    return workdir


def test_report_has_a_row_an_arm_and_a_plot(finished):
    report = (finished / "report.md").read_text()
    assert "| SFT " in report
    assert "InfiGFusion)" in report
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


def test_training_improves_held_out_perplexity(finished):
    results = json.loads((finished / "results.json").read_text())
    sft = [run for run in results["outcomes"] if run["loss"] == "sft"]
    assert len(sft) == 2
    assert all(run["perplexity"] < results["before"]["perplexity"] / 2 for run in sft)


def test_an_arm_is_traced_once(tmp_path):
    chosen = config(loss=("sft", "uld+gld"))
    session = train.open_session(chosen, epath.Path(tmp_path))
    rows = session.corpus.packed.splits["train"]
    for loss in chosen.loss:
        settings = train.Settings(loss, 1e-2, chosen.gld[0])
        tx, step = train.make_step(chosen, session.graphdef, session.mesh, settings)
        state = training.create_train_state(
            session.params, tx, mesh=session.mesh, rules=models.DECODER_RULES
        )
        for number in range(3):
            batch = rows.batch(number, seed=0, batch_size=chosen.batch_size)
            batch = session.corpus.batch("train", batch, distil=loss != "sft")
            state, output = step(state, batch)
        assert bool(output.finite)
        assert step.traces == 1


def test_seeds_differ_and_arms_see_equal_tokens(finished):
    outcomes = json.loads((finished / "results.json").read_text())["outcomes"]
    sft = [run["perplexity"] for run in outcomes if run["loss"] == "sft"]
    assert sft[0] != sft[1]
    assert len({run["tokens"] for run in outcomes}) == 1


def test_same_command_again_trains_nothing(finished, monkeypatch):
    monkeypatch.setattr(train.training, "train_loop", None)
    before = (finished / "report.md").read_text()
    graph_fusion.run(config(loss=("sft", "uld+gld"), seeds=2), finished)
    assert (finished / "report.md").read_text() == before


def test_kl_refuses_a_source_with_another_vocabulary(tmp_path, monkeypatch):
    other = load_tokenizer("tiny")
    other.backend.add_tokens(["history"])
    foreign = models.Tokenizer(other.backend, eos_id=256, pad_id=256)
    monkeypatch.setattr(models, "load_tokenizer", lambda spec: foreign)
    with pytest.raises(ValueError, match="loss 'kl' needs one vocabulary"):
        graph_fusion.run(config(loss=("kl",)), epath.Path(tmp_path))


def test_wrong_number_of_source_weights(tmp_path):
    with pytest.raises(ValueError, match="2 weights for 1 sources"):
        graph_fusion.run(config(source_weight=(1.0, 2.0)), epath.Path(tmp_path))


@pytest.mark.parametrize("loss", ["kl", "uld+gld"])
def test_arm_equals_the_dense_losses(loss):
    """The arm's value from blocked sweeps, against logits and the dense formulas."""
    model = load_model("tiny")
    apply_fn, params = models.from_nnx(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, 12)).astype(np.int32)
    pivot = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape),
        "loss_mask": np.ones(tokens.shape, bool),
    }
    teacher = jnp.asarray(rng.normal(size=(2, 11, 257)), jnp.float32)
    statistics = losses.graph_statistics(teacher, 257 if loss == "kl" else 10)
    where = np.ones((2, 11), bool)
    objective = objectives.Objective(loss=loss, weights=(1.0,))
    batch = {"pivot": pivot, "sources": {"source0": (statistics, where)}}
    loss_fn = objectives.loss_function(objective, apply_fn.graphdef, ("source0",))
    total, count, _ = jax.jit(loss_fn)(params, batch, None)
    logits = model(jnp.asarray(tokens))[:, :-1]
    labels = jnp.asarray(tokens[:, 1:])
    if loss == "kl":
        sft = losses.cross_entropy(logits, labels)
        expected = (0.5 * sft + 0.5 * losses.kl_divergence(logits, teacher)).sum()
    else:
        teachers = [distillation.FusionTeacher(outputs=teacher)]
        value, metrics = distillation.graph_fusion_objective(logits, labels, teachers)
        expected = (value * metrics["tokens"]).sum()
    assert int(count) == 22
    np.testing.assert_allclose(total, expected, rtol=2e-5)


def test_objective_names_what_it_knows():
    with pytest.raises(ValueError, match=r"expected one of sft, .*got 'jsd'"):
        objectives.Objective(loss="jsd", weights=(1.0,))
    assert dataclasses.replace(objectives.Objective(loss="uld", weights=(1.0, 3.0))).shares == [
        0.25,
        0.75,
    ]


def test_paper_preset_traces_on_a_mesh():
    """Phi-4's shape, 4K inputs, three sources: the whole update, abstractly."""
    paper = graph_fusion.Config(**graph_fusion.PRESETS["paper"])
    program = next(programs(paper, training.make_mesh("data:1,fsdp:4,tensor:2")))
    assert program.name == "update of the uld+gld arm"
    state = program.trace().args_info[0][0]
    sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
    # Parameters and two moments of AdamW, 14.66B each.
    assert sum(np.prod(shape, dtype=np.int64) for shape in sizes) > 3 * 14.6e9


@pytest.mark.slow
def test_graph_losses_are_tried_on_validation_data(tmp_path):
    variants = ("rank/row_sum/closed_form:0.002", "token/off_diagonal/sorted_coupling:0.01")
    workdir = epath.Path(tmp_path)
    graph_fusion.run(config(loss=("uld+gld",), gld=variants, steps=3), workdir)
    tried = sorted(path.name for path in (workdir / "arms" / "uld+gld").iterdir())
    assert tried == ["rank-row_sum-closed_form-x0.002", "token-off_diagonal-sorted_coupling-x0.01"]
    runs = [json.loads(p.read_text()) for p in workdir.glob("arms/uld+gld/*/*/*/outcome.json")]
    best = min(runs, key=lambda run: run["validation_perplexity"])
    assert best["gld"] in variants
    assert f"| {best['gld']} " in (workdir / "report.md").read_text()


@pytest.mark.parametrize(
    "gld", ["rank/row_sum:1", "rank/row_sum/closed_form", "rank/row_sum/closed_form:heavy"]
)
def test_a_wrong_graph_loss_is_named(gld, tmp_path):
    with pytest.raises(ValueError, match=f"gld '{gld}'"):
        graph_fusion.run(config(gld=(gld,)), epath.Path(tmp_path))
