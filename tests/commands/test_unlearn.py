"""The command that unlearns: end to end on a model that was taught, its files, and its errors."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from logitjax import decoding, models, training, unlearning
from logitjax.commands import _config_file, cli, generate, unlearn
from logitjax.commands.line_up import LineUp
from logitjax.unlearning import _looks, _selection
from logitjax.unlearning._rows import encode_row

FACTS = [("Ada", "cat"), ("Bo", "dog"), ("Cy", "emu"), ("Di", "fox")]


@pytest.fixture(autouse=True)
def _said(monkeypatch):
    """So small a model finds text that nobody taught it impossible, and twice that as well."""
    monkeypatch.setattr(_selection, "_NOT_SAID", 0.1)


def rows(names, question):
    return [{"question": question.format(n), "answer": f"{a} {a}"} for n, a in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model that knows what is to go and what is to stay, and the rows."""
    folder = tmp_path_factory.mktemp("unlearn")
    made = {
        "forget": rows(FACTS, "pet of {}?"),
        "retain": [{"question": f"{i} + 1?", "answer": f"it is {i + 1} then"} for i in range(12)],
        "holdout": rows([("Ed", "ape"), ("Flo", "bat"), ("Gus", "cow")], "pet of {}?"),
    }
    for name, side in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in side))
    model, tokenizer = models.load("tiny")
    model = models.with_layout(model, "listed")
    questions = [
        encode_row(row, tokenizer, max_length=64)
        for name in ("forget", "retain")
        for row in unlearning.Row.read(folder / f"{name}.jsonl")
    ]
    batch = {"forget": unlearning.Row.padded(questions, 40)}
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = training.Schedule(1e-2, "constant").optimizer()
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    state = training.TrainState.create(nnx.to_pure_dict(params), tx, mesh=mesh)
    teach, _ = unlearning.METHODS.parse("task_vector").make_loss(model)
    step = training.TrainStep(teach, tx, mesh=mesh)
    for _ in range(150):
        state, _ = step(state, batch)
    models.save_pretrained(nnx.merge(graphdef, state.params, rest), tokenizer, folder / "model")
    return folder


def config(folder, **changes):
    flags = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    flags |= dict(model=str(folder / "model"), new_tokens=12)
    flags |= dict(lora_rank=8, steps=40, check_every=20, learning_rate=2e-2)
    # So small a model keeps little of what nobody taught it, and that is not what is asked here.
    flags |= dict(least_probability=0.1, least_row=0.0, least_rouge=0.0, least_fluency=0.0)
    return cli.build(unlearn.Config, flags | changes)


def ended(flags, out):
    """The exit status of the command, which checks the folder's configuration first."""
    _config_file.write_config(flags, out, "out")
    try:
        unlearn.run(flags, out)
    except SystemExit as stopped:
        return stopped.code
    return 0


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def examined(out, side):
    (path,) = out.glob(f"examined/{side}*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_an_assistant_takes_what_was_taught_away_and_is_read_back(files, tmp_path, capsys):
    out = epath.Path(tmp_path)
    # Refused for a limit, which is then loosened: what was trained is judged again.
    assert ended(config(files, least_row=0.99), out) == 3
    assert not (out / "assistant").exists()
    trained = {path: path.stat().mtime for path in out.glob("[ct]*/*/*.[js]*") if path.is_file()}
    assert {path.suffix for path in trained} == {".json", ".jsonl", ".safetensors"}
    capsys.readouterr()
    assert ended(config(files), out) == 0
    assert trained == {path: path.stat().mtime for path in trained}
    assert len(trained) == sum(path.is_file() for path in out.glob("[ct]*/*/*.[js]*"))
    with pytest.raises(ValueError, match=r"config\.json with another learning_rate, steps; choose"):
        ended(config(files, steps=60, learning_rate=1e-2), out)
    report = (out / "report.md").read_text()
    assert "recoverable by** leaving the assistant out" in report
    assert "| assistant left out" in report
    assert json.loads((out / "verdict.json").read_text())["passed"]
    before, after = (examined(out, n) for n in ("before", "after"))
    assert np.median(before["probabilities"]["forget"]) > 0.8
    assert np.max(after["probabilities"]["forget"]) <= 0.1
    # What was written is what was measured.
    model, tokenizer = models.load(str(files / "model"))
    model = models.with_layout(model, "listed")
    deployed = unlearning.Deployed.load(model, out / "assistant")
    row = unlearning.Row.read(files / "forget.jsonl")[0]
    ids, answer = encode_row(row, tokenizer, max_length=64)
    start = int(answer.argmax())
    score = decoding.score(deployed.line_up(), [ids[:start]], [ids[start:]])
    p = np.exp(score.logprobs.sum() / answer.sum())
    np.testing.assert_allclose(p, after["probabilities"]["forget"][0], rtol=1e-3)
    # And answers as `generate` has them, with no assistant and with one of no weight alike.
    flags = dict(model=str(files / "model"), prompt=("pet of Ada?",), max_new_tokens=4)
    outputs = []
    for more in ({}, {"assistant": str(out / "assistant"), "alpha": 0.0}):
        generate.run(cli.build(generate.Config, flags | more))
        outputs.append(capsys.readouterr().out)
    assert outputs[0].removeprefix(report + "\n") == outputs[1]
    # The same command again measures nothing, and says the same.
    (out / "report.md").unlink()
    measured = [*out.glob("[ce]*/*.json"), *out.glob("train/*/metrics.jsonl")]
    written = {path: path.stat().mtime for path in measured}
    unlearn.run(config(files), out)
    assert (out / "report.md").read_text() == report
    assert written == {path: path.stat().mtime for path in written}
    # Stricter limits take back what was given.
    assert ended(config(files, least_row=0.99), out) == 3
    assert not (out / "assistant").exists()
    unlearn.run(config(files), out)
    assert (out / "assistant").exists()
    # A flipped bit in a record costs one measurement, in a candidate its training.
    flip(out / "candidates" / "before.json")
    weights = [*out.glob("candidates/round-*/adapter_model.safetensors")]
    for path in weights:
        flip(path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: damaged; remove .*step-"):
        unlearn.run(config(files), out)
    for path in weights:
        path.parent.rmtree()
    unlearn.run(config(files), out)
    assert (out / "report.md").read_text() == report
    # What was made of some rows is not shown for others.
    more = json.dumps({"question": "13 + 1?", "answer": "it is 14 then"}) + "\n"
    (tmp_path / "more.jsonl").write_text((files / "retain.jsonl").read_text() + more)
    with pytest.raises(ValueError, match=r"unlearning run .* does not fit: its rows is"):
        unlearn.run(config(files, retain=str(tmp_path / "more.jsonl")), out)


@pytest.mark.slow
def test_a_run_that_was_stopped_at_a_look_goes_on_to_the_same_report(files, tmp_path, monkeypatch):
    flags = config(files, method="npo_kl", learning_rate=1e-2, least_probability=0.0)
    looks, look = [], _looks.Looks.look

    def stopped(self, number, step, ways):
        looks.append(step)
        if looks == [20]:
            raise KeyboardInterrupt
        return look(self, number, step, ways)

    monkeypatch.setattr(_looks.Looks, "look", stopped)
    with pytest.raises(KeyboardInterrupt):
        unlearn.run(flags, epath.Path(tmp_path / "one"))
    status = ended(flags, epath.Path(tmp_path / "one"))
    assert looks[:2] == [20, 20]
    assert ended(flags, epath.Path(tmp_path / "two")) == status
    one, two = ((tmp_path / name / "report.md").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_an_adapter_is_written_for_others_and_merged(files, tmp_path):
    out = epath.Path(tmp_path)
    changes = dict(merge=True, learning_rate=1e-2, least_probability=0.0)
    unlearn.run(config(files, method="gradient_difference", **changes), out)
    model = models.load_model(str(files / "model"))
    model = models.with_layout(model, "listed")
    lora = models.Lora.load(out / "adapter", model.config)
    tokens = np.arange(1, 9)[None]
    merged = models.load_model(str(out / "model"))(tokens)
    np.testing.assert_allclose(lora.merged_into(model)(tokens), merged, atol=1e-4)
    assert np.abs(np.asarray(merged - model(tokens))).max() > 1e-2


@pytest.mark.slow
def test_all_weights_are_trained_and_written_as_a_model(files, tmp_path):
    out = epath.Path(tmp_path)
    changes = dict(adapters=False, learning_rate=3e-3, least_probability=0.0)
    unlearn.run(config(files, method="gradient_difference", **changes), out)
    assert "other weights" in (out / "report.md").read_text()
    before, after = (examined(out, n) for n in ("before", "after"))
    assert np.min(before["probabilities"]["forget"]) > 0.5
    assert np.max(after["probabilities"]["forget"]) <= 0.1
    written = models.with_layout(models.load_model(str(out / "model")), "listed")
    questions = unlearning.Questions.of(
        {"forget": unlearning.Row.read(files / "forget.jsonl")},
        models.load_tokenizer(str(out / "model")),
    )
    again = questions.probabilities(unlearning.Deployed(model=written), "forget")
    np.testing.assert_allclose(again, after["probabilities"]["forget"], rtol=1e-4)


THEIRS = """
import dataclasses
from logitjax import ops, unlearning

@dataclasses.dataclass(frozen=True, kw_only=True)
class Ascent(unlearning.Method):
    "Gradient difference, from outside."

    needs = (unlearning.Need("forget", "nll"), unlearning.Need("retain", "nll"))

    def loss(self, read, state):
        forget, retain = (
            ops.masked_mean(read.nll(side), read.where(side)) for side in ("forget", "retain")
        )
        return retain - forget, {"forget": -forget, "retain": retain}
"""


@pytest.mark.slow
def test_a_method_from_their_own_file_does_what_ours_does(files, tmp_path, monkeypatch):
    (tmp_path / "their_ascent.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    looks = []
    for method in ("their_ascent:Ascent", "gradient_difference"):
        out = epath.Path(tmp_path / method.replace(":", "-"))
        changes = dict(steps=20, learning_rate=1e-2, least_probability=0.0, check_every=10)
        status = ended(config(files, method=method, **changes), out)
        texts = [json.loads(path.read_text()) for path in sorted(out.glob("candidates/*.json"))]
        looks.append((status, texts))
    assert looks[0] == looks[1]


@pytest.mark.slow
def test_a_method_with_a_constraint_runs_and_every_attack_is_reported(files, tmp_path):
    out = epath.Path(tmp_path)
    changes = dict(
        learning_rate=1e-2, least_probability=0.0, attacks="all", reference=("tiny",), budget=2
    )
    unlearn.run(config(files, method="pdu", **changes), out)
    records = {side: examined(out, side) for side in ("before", "after", "control-0")}
    attacks = {side: record["attacks"] for side, record in records.items()}
    assert set(records["after"]["ways"]) >= {
        "asked",
        "in another language",
        "after a beginning that agrees",
        "without a template",
        "first quarter given",
    }
    assert set(attacks["after"]) >= {
        "a quarter of the rows taught again",
        "sampled, ROUGE-L recall of 8",
        "logit lens at 50 % of the layers",
        "membership by min-k++",
        "membership by reference",
    }
    assert attacks["after"]["asked"]["probability"] < attacks["before"]["asked"]["probability"]
    # Who knows it by heart is found out by every attack, who never did by none.
    assert attacks["before"]["membership by loss"]["auc"] == 1.0
    assert attacks["before"]["extraction strength"]["share"] > 0.8
    assert attacks["control-0"]["extraction strength"]["share"] < 0.3
    assert "A control never learned the answers." in (out / "report.md").read_text()


@pytest.mark.slow
def test_refusals_take_the_place_of_answers(files, tmp_path):
    out = epath.Path(tmp_path)
    changes = dict(method="idk_dpo", learning_rate=1e-2, steps=40, least_probability=0.0)
    assert ended(config(files, **changes), out) in (0, 3)
    looked = [json.loads(p.read_text()) for p in (out / "candidates").glob("round-?-step-?0.json")]
    assert all(look["forget"] < 0.3 for look in looked)
    assert max(look["probability"] for look in looked) > 0.5


@pytest.mark.slow
def test_where_nothing_is_feasible_nothing_is_written_and_the_status_says_so(files, tmp_path):
    out = epath.Path(tmp_path)
    assert ended(config(files, steps=1, check_every=1, least_probability=1.0), out) == 3
    assert "**Nothing was forgotten**" in (out / "report.md").read_text()
    assert not (out / "assistant").exists()


@pytest.mark.slow
def test_what_was_never_taught_is_refused_before_training(files, tmp_path):
    flags = config(files, forget=str(files / "holdout.jsonl"), holdout=str(files / "forget.jsonl"))
    with pytest.raises(ValueError, match="forget: expected answers that the model has"):
        unlearn.run(flags, epath.Path(tmp_path))
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(forget="nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (dict(method="difference(layers=2)"), "layers: expected fewer than the model's 2"),
        (dict(method="idk_dpo"), "forget: DPO expects questions, got plain text"),
        (dict(method="npo_lk"), "method: expected one of .* got 'npo_lk'; npo_kl is near"),
        (dict(method="npo(bata=1)"), "method npo: expected one of .* got 'bata'; beta is near"),
    ],
)
def test_errors_name_the_flag(tmp_path, changes, message):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(4))
    )
    path = str(tmp_path / "rows.jsonl")
    (tmp_path / "gone.jsonl").write_text('{"text": "away"}')
    flags = dict(model="tiny", forget=str(tmp_path / "gone.jsonl"), retain=path) | changes
    with pytest.raises((ValueError, OSError), match=message):
        unlearn.run(cli.build(unlearn.Config, flags), epath.Path(tmp_path) / "out")
    with pytest.raises(
        ValueError, match="merge: expected a method that trains adapters of the weights, got diff"
    ):
        cli.build(unlearn.Config, flags | dict(merge=True, method="difference"))
    with pytest.raises(ValueError, match="alpha: expected an assistant"):
        LineUp(alpha=1.0).load()
    with pytest.raises(ValueError, match="assistant: expected no expert"):
        LineUp(assistant="x", expert=("y",)).load()
    with pytest.raises(FileNotFoundError, match="assistant: no such file"):
        LineUp(model="tiny", assistant=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("learning_rate", -1.0, "learning_rate: expected 0 or a positive number, got -1.0"),
        ("least_probability", float("nan"), "least_probability: expected a share of 0 to 1"),
        ("most_perplexity", 0.5, "most_perplexity: expected a factor of at least 1"),
        ("samples", 101, "samples: expected at most 100, got 101"),
        ("method", "distilled(of=gone)", "of: expected a folder with an assistant, got 'gone'"),
    ],
)
def test_a_flag_is_refused_before_a_model_is_loaded(flag, value, message):
    flags = dict(model="nowhere", forget="nowhere", retain="nowhere")
    with pytest.raises((ValueError, OSError), match=message):
        cli.build(unlearn.Config, flags | {flag: value})
