"""The main job on a tiny model: it prunes, every arm heals, scores, and continues after a stop."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from experiments.graph_fusion import __main__ as graph_fusion
from experiments.graph_fusion import arms, report, topics, train
from experiments.graph_fusion.programs import programs
from logitjax import distillation, models, training
from logitjax.commands import cli

ROOT = pathlib.Path(__file__).parents[2]


def config(**changes):
    smoke = {
        **graph_fusion.PRESETS["smoke"],
        "data": f"text:{ROOT / 'LICENSE'}",
        "mesh": "data:2,tensor:4",
    }
    return cli.build(graph_fusion.Config, {**smoke, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("fusion"))
    graph_fusion.run(config(loss=("sft", "kl", "uld+gld"), seeds=2), workdir)
    return workdir


def records(workdir, arm):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["arm"] == arm]


@pytest.mark.slow
def test_report_has_a_row_an_arm_and_a_plot(finished):
    report = (finished / "report.md").read_text()
    for name in (
        "| whole ",
        "| without 1 layers ",
        "| SFT ",
        "InfiGFusion)",
        "points of agreement",
    ):
        assert name in report
    assert (finished / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_healing_improves_held_out_perplexity(finished):
    before = json.loads((finished / "drop-1" / "before.json").read_text())
    sft = records(finished, "sft")
    assert len(sft) == 2
    assert all(run["perplexity"] < before["perplexity"] / 2 for run in sft)
    # The byte tokenizer has one byte a token, but for the end of a text.
    assert before["bits_per_byte"] == pytest.approx(before["loss"] / np.log(2), rel=0.02)


@pytest.mark.slow
def test_seeds_differ(finished):
    first, second = (run["perplexity"] for run in records(finished, "sft"))
    assert first != second


@pytest.mark.slow
def test_same_command_again_trains_nothing(finished, monkeypatch):
    monkeypatch.setattr(train.distillation, "train_student", None)
    before = (finished / "report.md").read_text()
    graph_fusion.run(config(loss=("sft", "kl", "uld+gld"), seeds=2), finished)
    assert (finished / "report.md").read_text() == before


@pytest.mark.slow
def test_an_arm_is_traced_once(tmp_path):
    chosen = config(loss=("uld+gld",))
    session = train.open_session(chosen, epath.Path(tmp_path))
    student = train.prune(session, 1).student
    settings = arms.first_settings(chosen, "uld+gld")
    sources = {name: one.vocabularies for name, one in session.corpus.sources.items()}
    tx, step = train.course(chosen, settings, 0).update(
        student, settings.objective(chosen), sources, mesh=session.mesh
    )
    rules = models.DECODER_RULES
    state = training.TrainState.create(student.trained, tx, mesh=session.mesh, rules=rules)
    rows = session.corpus.packed.splits["train"]
    for number in range(3):
        batch = rows.batch(number, seed=0, batch_size=chosen.course.batch_size)
        state, output = step(
            state, session.corpus.batch("train", batch, taught=True), {"model": {}}
        )
    assert bool(output.finite)
    assert step.traces == 1


def test_kl_refuses_a_source_with_another_vocabulary(tmp_path, monkeypatch):
    other = models.load_tokenizer("tiny")
    other.backend.add_tokens(["history"])
    foreign = models.Tokenizer(other.backend, eos_id=256, pad_id=256)
    ours = models.load_tokenizer
    monkeypatch.setattr(
        models, "load_tokenizer", lambda spec: foreign if spec == "tiny:1" else ours(spec)
    )
    with pytest.raises(ValueError, match="loss 'kl' needs one vocabulary"):
        graph_fusion.run(config(loss=("kl",)), epath.Path(tmp_path))


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(ValueError, match=r"loss: expected some of sft, .*got 'jsd'"):
        config(loss=("jsd",))


@pytest.mark.every_change
@pytest.mark.slow
def test_one_teacher_learns_from_the_rows_of_two(tmp_path):
    sources = {"own": ("smollm2",), "other": ("tiny",), "both": ("smollm2", "tiny")}
    rows = {}
    for name, source in sources.items():
        chosen = config(source=source, fit_to=("tiny",) if name == "own" else (), seq_len=48)
        packed = train.make_reading(chosen).pack(
            models.load_tokenizer("smollm2"), epath.Path(tmp_path / name)
        )
        split = packed.splits["train"]
        rows[name] = split.rows(np.arange(len(split)))["pivot"]["tokens"]
    np.testing.assert_array_equal(rows["own"], rows["other"])
    np.testing.assert_array_equal(rows["own"], rows["both"])
    part = cli.build(graph_fusion.Config, graph_fusion.PRESETS["heterogeneous"]).of_part(
        "healed_own"
    )
    assert part.reading.fit_to == (".cache/models/gemma-3-270m.gguf",)


def test_what_a_flag_freezes_is_not_trained(tmp_path):
    whole, _ = models.load("tiny", layout="listed")
    session = train.Session(
        config=config(freeze="final_norm", freeze_below=True),
        workdir=epath.Path(tmp_path),
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        whole=whole,
        corpus=types.SimpleNamespace(packed=types.SimpleNamespace(splits={"train": range(1)})),
    )
    (tmp_path / "drop-1").mkdir()
    chosen = {"kept": [1], "dropped": [0], "scores": [0.0, 0.0]}
    (tmp_path / "drop-1" / "pruning.json").write_text(json.dumps(chosen))
    student = train.prune(session, 0).student
    assert list(student.frozen["model"]) == ["final_norm/scale"]
    student = train.prune(session, 1).student
    assert set(student.frozen["model"]) == {"final_norm/scale", "embedding"}


def test_parts_compare_differences_with_their_spread_over_seeds():
    def part(**arms):
        runs = {
            arm: {"runs": [{"bits_per_byte": value} for value in values]}
            for arm, values in arms.items()
        }
        return {"drops": [{"layers": 0, "arms": runs}]}

    parts = {"pair": part(sft=[1.0, 1.2], kl=[1.3, 1.3], alm=[0.8, 1.0])}
    parts |= {f"healed_{name}": part(first_piece=[value]) for name, value in
              {"own": 1.0, "other": 2.0, "both": 0.9}.items()}  # fmt: skip
    parts["healed_own"]["drops"][0]["arms"]["sft"] = {"runs": [{"bits_per_byte": 1.5}]}
    first, other, second = report._bars_of_parts(parts)
    assert first["bar"] == "pair: SFT + ALM below SFT, bits a byte"
    assert first["seen"] == pytest.approx(0.2)
    # The sample standard deviation of either is .1414.
    assert first["promised"] == "> 0.2, the spread"
    assert other["seen"] == pytest.approx(-0.5)
    assert second["seen"] == pytest.approx(0.1)
    assert second[""] == "met"


def test_healed_students_are_compared_with_sft_of_the_same_seed():
    def part(**arms):
        runs = {
            arm: {"runs": [dict(row, bits_per_byte=value, seed=seed, **about)
                           for seed, value in enumerate(values)], "trials": []}
            for arm, values in arms.items()
        }  # fmt: skip
        return {"whole": None, "drops": [{"layers": 6, "before": row, "arms": runs}]}

    row = {"parameters": 1, "bits_per_byte": 2.0}
    about = {"learning_rate": 1e-3, "mix": 0.5}
    parts = {"healed_own": part(sft=[1.0, 1.5], first_piece=[0.9, 1.6])}
    parts["healed_other"] = part(first_piece=[0.75, 1.25])
    plain = report._plain_healed(parts)
    drop = parts["healed_other"]["drops"][0]
    assert report._rows(parts["healed_other"], drop, plain)[-1]["bits a byte below SFT"] == (
        "0.25 +- 0"
    )
    assert "bits a byte below SFT" not in report._rows(parts["healed_other"], drop)[-1]


@pytest.mark.parametrize(
    "gld", ["rank/row_sum:1", "rank/row_sum/closed_form", "rank/row_sum/closed_form:heavy"]
)
def test_a_wrong_graph_loss_is_named(gld):
    chosen = config(gld=(gld,))
    with pytest.raises(ValueError, match=f"gld '{gld}'"):
        arms.first_settings(chosen, "gld").objective(chosen)


def test_arms_are_sums_of_their_losses():
    chosen = config(mix=(0.25,), gld=("rank/row_sum/closed_form:0.1",))
    terms = {
        arm: {
            term.name: weight
            for term, weight in arms.first_settings(chosen, arm).objective(chosen).terms
        }
        for arm in ("sft", "kl_only", "kl", "uld+gld")
    }
    assert terms["sft"] == {"sft": 1.0}
    assert terms["kl_only"] == {"kl": 1.0}
    assert terms["kl"] == {"sft": 0.75, "kl": 0.25}
    assert terms["uld+gld"] == pytest.approx({"sft": 0.75, "uld": 0.25, "gld": 0.025})


def searched(loss, **changes):
    """A search whose outcome is a formula."""
    values = dict(learning_rate=(1.0, 2.0, 4.0), mix=(0.5, 0.75, 0.25))
    values |= dict(gld=("rank/row_sum/closed_form:1", "token/row_rms/closed_form:1"))
    chosen = config(**(values | changes))
    chosen_by_arm = {}
    for arm in ("sft", "kl", "uld+gld"):
        chosen_by_arm[arm] = arms.choose(chosen, arm, lambda settings: loss(settings))
        assert len({settings.name for settings, _ in chosen_by_arm[arm][1]}) == len(
            chosen_by_arm[arm][1]
        )
    return chosen, chosen_by_arm


def test_every_arm_has_as_many_trials():
    _, searches = searched(
        lambda s: abs(np.log2(s.learning_rate / 1.9)) + abs(s.mix - 0.7) + ("row_rms" in s.gld)
    )
    assert {len(trials) for _, trials in searches.values()} == {9}
    assert searches["kl"][0].mix == 0.75
    assert searches["kl"][0].learning_rate == searches["uld+gld"][0].learning_rate == 2.0
    assert "row_sum" in searches["uld+gld"][0].gld
    # What it has no use for, an arm spends on finer rates.
    assert len({settings.learning_rate for settings, _ in searches["sft"][1]}) == 9


def test_a_search_goes_on_beyond_an_edge():
    _, searches = searched(lambda s: abs(np.log2(s.learning_rate / 14)))
    best, trials = searches["kl"]
    assert best.learning_rate == 16.0
    assert not arms.at_edge(*searches["sft"])
    assert max(settings.learning_rate for settings, _ in trials) == 32.0
    _, searches = searched(lambda s: abs(s.learning_rate - 2) + abs(s.mix - 0.1))
    assert searches["kl"][0].mix == 0.125
    assert min(settings.mix for settings, _ in searches["kl"][1]) == 0.0625


@pytest.mark.slow
@pytest.mark.every_change
def test_paper_preset_traces_on_a_mesh():
    """Phi-4's shape, 4K inputs, three sources: the whole update, abstractly."""
    paper = cli.build(graph_fusion.Config, graph_fusion.PRESETS["paper"])
    program = next(programs(paper, training.make_mesh("data:1,fsdp:4,tensor:2")))
    assert program.name == "update of the uld+gld arm"
    state = program.trace().args_info[0][0]
    sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
    # Parameters and two moments of AdamW, 14.66B each.
    assert sum(np.prod(shape, dtype=np.int64) for shape in sizes) > 3 * 14.6e9


@pytest.mark.slow
def test_graph_losses_and_layers_are_tried(tmp_path):
    variants = ("rank/row_sum/closed_form:0.002", "token/off_diagonal/sorted_coupling:0.01")
    workdir = epath.Path(tmp_path)
    tried = dict(gld=variants, steps=3, drop_layers=(1, 0), drop_arm=("uld+gld",))
    graph_fusion.run(config(loss=("uld+gld",), **tried), workdir)
    folders = sorted(path.name for path in (workdir / "drop-1" / "uld+gld").iterdir())
    assert folders == [
        "rank-row_sum-closed_form-x0.002",
        "token-off_diagonal-sorted_coupling-x0.01",
    ]
    by_layers = {run["layers"]: run for run in records(workdir, "uld+gld")}
    assert set(by_layers) == {0, 1}
    assert by_layers[0]["gld"] == by_layers[1]["gld"]
    assert "## Trials" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_what_is_below_sft_is_paired_by_seed():
    def runs(*bits):
        return [{"seed": n, "bits_per_byte": b} for n, b in enumerate(bits)]

    # Seeds differ by ten times what the arms do.
    assert report._below(runs(0.9, 0.8, 0.7), runs(0.92, 0.81, 0.72)) == "0.01667 +- 0.005774"
    assert report._below(runs(0.9), ()) is None


def test_topics_are_the_likeliest_first_token_after_the_question():
    model, _ = models.load("tiny")
    student = distillation.Student.of(model)
    rng = np.random.default_rng(0)
    count, firsts = 11, np.array([7, 3, 40])
    tokens = rng.integers(1, 200, (count, 160)).astype(np.int32)
    ends = rng.integers(20, 158, count).astype(np.int32)
    logits = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokens))
    best = logits[np.arange(count), ends][:, firsts].argmax(-1)
    labels = np.where(np.arange(count) < 8, best, (best + 1) % 3)
    asked = topics.Topics(student=student, tokens=tokens, ends=ends, firsts=firsts, labels=labels)
    assert asked.accuracy(student.trained) == pytest.approx(8 / 11)
