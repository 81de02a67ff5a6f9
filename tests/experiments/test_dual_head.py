"""The dual-head experiment: what it tunes, compares, measures and resumes."""

import dataclasses
import math
import pathlib
import signal
import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from experiments.dual_head import __main__ as dual_head
from experiments.dual_head import arms as dual_head_arms
from experiments.dual_head import config as dual_head_config
from experiments.dual_head import data as dual_head_data
from experiments.dual_head import diagnostics, report, udhr
from experiments.dual_head import run as dual_head_run
from experiments.dual_head import train as dual_head_train
from experiments.dual_head.score import Scorer
from experiments.shared.report import paired
from logitjax import storage, training

GOLDENS = pathlib.Path(__file__).parents[1] / "vision/goldens"

TINY = dual_head.Config(
    data="synthetic:4",
    teacher_examples=192,
    train_examples=96,
    validation_examples=64,
    test_examples=64,
    teacher="mlp-16",
    student="mlp-8",
    arm=("ce", "single", "dual_mlp_aligned"),
    alpha=(0.01, 0.1),
    seeds=2,
    epochs=2,
    teacher_epochs=1,
    batch_size=32,
    learning_rate=0.02,
    diagnose_every=1,
    mesh="data:8",
)


def make_trainer(placed, name: str, alphas=(0.01, 0.1), **changes) -> dual_head_train.Trainer:
    """A student of an untrained teacher."""
    config, arms = dataclasses.replace(TINY, **changes), dual_head_arms.arms(TINY)
    course = dual_head_train.Course(network="mlp-16", epochs=2, learning_rate=0.02, alphas=(0.0,))
    teaching = dual_head_train.Trainer(config, placed, arms["ce"], course)
    teacher = dual_head_run.make_teacher(teaching, teaching.initial(9).params, placed)
    course = dataclasses.replace(course, network="mlp-8", alphas=alphas)
    return dual_head_train.Trainer(config, placed, arms[name], course, teacher=teacher)


def train_epoch(trainer, number=0, state=None):
    """The state after an epoch, and the mean loss of every lane."""
    state = trainer.initial(0) if state is None else state
    state, output = trainer.train_epoch(state, trainer.batch(number, seed=0))
    lanes = range(len(trainer.course.alphas))
    return state, np.array([output.metrics[f"loss/{lane}"][0] for lane in lanes])


@pytest.fixture
def placed(tmp_path):
    task = dual_head_data.load_task(TINY, epath.Path(tmp_path))
    return dual_head_data.place(task, training.make_mesh("data:8"))


def test_convex_weights_are_the_sum_over_one_plus_alpha():
    class Student(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(np.eye(3, dtype=np.float32))

        def features(self, inputs, *, train):
            return inputs @ self.weight[...]

        def head(self, features):
            return features

    graphdef, params, stats = nnx.split(Student(), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    inputs, teacher = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    arm, gradients = dual_head_arms.arms(TINY)["kd"], {}
    for convex in (False, True):
        run = dual_head_arms.loss_function(arm, graphdef, convex=convex)
        parts, _ = jax.jit(run)(params, stats, inputs, np.arange(4) % 3, teacher, 9.0)
        gradients[convex] = np.array(parts)
    np.testing.assert_allclose(gradients[True], gradients[False] / 10, rtol=1e-6)
    assert (gradients[True] > 0).all()


@pytest.mark.slow
def test_a_run_reports_every_arm_and_is_not_repeated(tmp_path):
    workdir = epath.Path(tmp_path)
    results = dual_head_run.train_all(TINY, workdir)
    assert sorted(results["arms"]) == sorted(TINY.arm)
    text = report.write(TINY, results, workdir)
    assert "dual_mlp_aligned against single" in text
    assert (workdir / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "collapse.png").read_bytes().startswith(b"\x89PNG")
    line = results["arms"]["single"][0]["curves"][0]
    assert {f"nc/{name}" for name in diagnostics.MEASURES} <= set(line)
    path = workdir / "arms" / "single" / "seed-1" / "result.json"
    record = storage.read_json(path)
    path.unlink()
    storage.kept(path, lambda: record | {"test": [0.5, 0.25]})
    again = dual_head_run.train_all(TINY, workdir)
    assert again["arms"]["single"][1]["test"] == [0.5, 0.25]


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(placed, tmp_path, monkeypatch):
    trainer = make_trainer(placed, "dual_mlp_aligned")
    scorer = Scorer(trainer)
    lanes, record = dual_head_run.fit(scorer, epath.Path(tmp_path) / "a", seed=3)
    batch, halted = trainer.batch, epath.Path(tmp_path) / "b"

    def interrupted(number, *, seed):
        signal.raise_signal(signal.SIGTERM)
        return batch(number, seed=seed)

    monkeypatch.setattr(trainer, "batch", interrupted)
    with pytest.raises(training.Preempted):
        dual_head_run.fit(scorer, halted, seed=3)
    monkeypatch.undo()
    resumed, again = dual_head_run.fit(scorer, halted, seed=3)
    chex.assert_trees_all_equal(resumed, lanes)
    assert again == record
    assert [len(line["loss"]) for line in record["curves"]] == [2, 2]


@pytest.mark.every_change
@pytest.mark.slow
def test_lanes_are_independent_and_alpha_stops(placed):
    both = make_trainer(placed, "single")
    alone = make_trainer(placed, "single", alphas=(0.1,))
    off = make_trainer(placed, "single", alphas=(0.0,))
    trained = [
        jax.device_get(train_epoch(trainer)[0].params["params"]) for trainer in (both, alone)
    ]
    second = jax.tree.map(lambda x: x[1:], trained[0])
    chex.assert_trees_all_close(second, trained[1], rtol=1e-4, atol=1e-6)
    stopped = make_trainer(placed, "single", stop_epoch=1)
    lanes, plain = (
        jax.device_get(train_epoch(trainer, 1)[0].params["params"]) for trainer in (stopped, off)
    )
    first = jax.tree.map(lambda x: x[:1], lanes)
    chex.assert_trees_all_close(first, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.every_change
@pytest.mark.slow
def test_data_that_comes_in_pieces_trains_the_same(placed):
    assert not dual_head_data.fits_on_device(placed.task, device_bytes=0)
    trained = []
    for data in (placed, dataclasses.replace(placed, arrays=None, chunk_steps=2)):
        trainer = make_trainer(data, "dual_linear")
        assert trainer.teacher.precomputed == (data.arrays is not None)
        state, loss = train_epoch(trainer)
        trained.append((state.params["params"], loss))
    chex.assert_trees_all_close(*trained, rtol=1e-4, atol=1e-6)


def test_baselines_have_their_temperature_and_their_warm_up():
    config = dataclasses.replace(TINY, warmup_epochs=4, stop_epoch=6)
    arms: Any = dual_head_arms.arms(config)
    assert sorted(arms) == sorted(dual_head_config.ARMS)

    @jax.jit
    def values(student, teacher, labels):
        names = ("kd_t2", "kd", "dkd_warm")
        return {name: arms[name].logit_loss(student, teacher, labels) for name in names}

    loss = values(np.array([[2.0, 1, 0]]), np.array([[3.0, 0, 1]]), np.array([0]))
    # Worked by hand at temperature 2.
    np.testing.assert_allclose(loss["kd_t2"], 0.302626, rtol=1e-5)
    assert abs(loss["kd"][0] - 0.302626) > 0.01
    part = types.SimpleNamespace(task=types.SimpleNamespace(train=range(8)))
    shares = {}
    for name in ("dkd", "dkd_warm"):
        given: Any = types.SimpleNamespace(config=config, placed=part, steps=1, arm=arms[name])
        batch = dual_head_train.Trainer.batch
        shares[name] = [batch(given, epoch, seed=0)["on"] for epoch in range(7)]
    assert shares["dkd"] == [1, 1, 1, 1, 1, 1, 0]
    assert shares["dkd_warm"] == [0.25, 0.5, 0.75, 1, 1, 1, 0]


def test_a_simplex_has_collapsed_and_noise_has_not():
    classes = 5
    simplex = np.eye(classes) - 1 / classes
    labels = np.tile(np.arange(classes), 20)
    rng = np.random.default_rng(0)
    geometry = jax.jit(diagnostics.geometry, static_argnums=4)
    measures = {}
    for name, noise in (("collapsed", 1e-4), ("noisy", 1.0)):
        features = simplex[labels] + noise * rng.normal(size=(len(labels), classes))
        args = [x.astype(np.float32) for x in (features, features @ simplex, simplex)]
        measures[name] = geometry(args[0], labels, args[1], args[2], classes)
    for name, value in measures["collapsed"].items():
        assert value < 1e-3, name
        assert measures["noisy"][name] > 0.05, name


def test_augmentation_keeps_shape_and_depends_on_the_key_alone(tmp_path):
    task = dual_head_data.load_task(TINY, epath.Path(tmp_path))
    rows = task.train.inputs[:4]
    for kind in ("crop_flip", "resized_crop"):
        prepare = jax.jit(dual_head_data.prepare_inputs(task, kind))
        plain = prepare(rows, None)
        first, second, other = (prepare(rows, jax.random.key(k)) for k in (0, 0, 1))
        assert first.shape == plain.shape
        np.testing.assert_array_equal(first, second)
        assert (first != other).any()
    assert abs(float(plain.mean())) < 0.5


def test_ngrams_tell_texts_apart():
    rows = dual_head_data.hashed_ngrams(["abcabc", "abcabd", "xyzxyz"])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), dual_head_data.SCALE, rtol=1e-5)
    assert rows[0] @ rows[1] > 2 * (rows[0] @ rows[2])


def records(*tests: list[float]) -> list[dict]:
    return [
        {"alphas": [0.1, 1.0], "validation": [0.5, 0.6], "test": test, "curves": []}
        # The first seed chooses and is not reported.
        for test in ([0.0, 0.0], *tests)
    ]


def test_alpha_is_chosen_on_validation_and_losses_are_reported_as_such():
    results = {
        "teacher": {"test": [0.9]},
        "arms": {
            "single": records([0.9, 0.70], [0.9, 0.72], [0.9, 0.71]),
            "dual_linear": records([0.9, 0.60], [0.9, 0.61], [0.9, 0.62]),
            "dual_mlp": records([0.9, 0.70], [0.9, 0.71], [0.9, 0.73]),
        },
    }
    assert report.best_alpha(results["arms"]["single"]) == 1.0
    text = report.verdict(results)
    assert "dual_linear against single: -10.00" in text
    assert "is WORSE" in text
    assert "dual_mlp against single: +0.33 points" in text
    assert "NOT distinguishable" in text
    # Differences without a variance: nothing to hold their mean against.
    for second in ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]):
        gain, p = paired([0.5, 0.6, 0.7], second)
        assert gain == pytest.approx(0.5 - second[0])
        assert math.isnan(p)
    assert report.best_alpha([{"alphas": [0.1, 1.0], "validation": [math.nan, 0.1]}]) == 1.0
    with pytest.raises(ValueError, match=r"^validation: expected an accuracy of some alpha"):
        report.best_alpha([{"validation": [math.nan]}])


def test_mistakes_in_the_configuration_are_named(placed):
    with pytest.raises(ValueError, match="batch_size"):
        make_trainer(placed, "ce", batch_size=97)
    for name, preset in dual_head.PRESETS.items():
        assert dual_head.Config(**preset), name


def tiny_pictures() -> dual_head_data.Task:
    rng = np.random.default_rng(0)
    part = dual_head_data.Part(
        inputs=rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), labels=rng.integers(4, size=24)
    )
    stats = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return dual_head_data.Task(train=part, validation=part, test=part, num_classes=4, **stats)


def make_resnet(config, task, *, devices, alphas=(0.0,)) -> dual_head_train.Trainer:
    mesh = training.make_mesh(f"data:{devices}", devices=jax.devices()[:devices])
    course = dual_head_train.Course(network="resnet8", epochs=2, learning_rate=0.05, alphas=alphas)
    placed, arm = dual_head_data.place(task, mesh), dual_head_arms.arms(config)["ce"]
    trainer = dual_head_train.Trainer(config, placed, arm, course)
    assert trainer.stepwise
    return trainer


@pytest.mark.slow
def test_steps_by_the_host_equal_a_scanned_epoch():
    config = dataclasses.replace(TINY, batch_size=8)
    trainer = make_resnet(config, tiny_pictures(), devices=1, alphas=(0.0, 0.5))
    given = dual_head_train.Given(*trainer.placed.arrays, None, jax.random.key(1), 1.0)
    order = jnp.arange(24).reshape(3, 8)
    apart = []
    for seed in range(3):
        by_host, host_loss = trainer.step_by_step(trainer.initial(seed), given, order)
        by_scan, loss = trainer.epoch(trainer.initial(seed), given, order)
        np.testing.assert_allclose(host_loss, loss, rtol=1e-3)
        by_host, by_scan = ((one.params, one.opt_state) for one in (by_host, by_scan))
        pairs = zip(jax.tree.leaves(by_host), jax.tree.leaves(by_scan), strict=True)
        apart.append(max(float(abs(one - other).max()) for one, other in pairs))
    # A rounding that differs (1e-6 does, in one beginning of ten) may carry a rectifier over zero,
    # which moves gradients of a batch of 8 by a tenth: one of the three may.
    assert np.median(apart) < 1e-4, apart
    counted = Scorer(trainer).accuracy(by_host[0], trainer.placed.task.test)
    trainer.stepwise = False
    counted_by_scan = Scorer(trainer).accuracy(by_host[0], trainer.placed.task.test)
    np.testing.assert_array_equal(counted, counted_by_scan)


def train_in_float64(trainer, epochs):
    """The weights, and the mean losses of the epochs."""
    state = jax.tree.map(
        lambda x: x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        trainer.initial(0),
    )
    losses = []
    for epoch in range(epochs):
        state, loss = train_epoch(trainer, epoch, state)
        losses.append(loss)
    return state.params["params"], np.array(losses)


# In float32 some gradients may differ by percents: where an input of a rectifier is within rounding
# of 0. `benchmark processes` compares in float32, at a lower rate.
@pytest.mark.slow
def test_eight_devices_equal_one_where_rounding_moves_no_rectifier():
    config = dataclasses.replace(TINY, batch_size=8)
    with jax.enable_x64(True):
        trained = [
            train_in_float64(make_resnet(config, tiny_pictures(), devices=devices), 1)
            for devices in (8, 1)
        ]
        chex.assert_trees_all_close(*trained, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_twenty_steps_of_the_smoke_preset_are_the_same_on_eight_devices(tmp_path):
    config = dual_head.Config(**dual_head.PRESETS["smoke"] | {"train_examples": 320})
    assert config.teacher_learning_rate == 0.05
    task = dual_head_data.load_task(config, epath.Path(tmp_path))
    with jax.enable_x64(True):
        losses = [
            train_in_float64(make_resnet(config, task, devices=devices), 2)[1] for devices in (8, 1)
        ]
    np.testing.assert_allclose(*losses, rtol=1e-10)


def test_udhr_keeps_paragraphs_in_one_split(tmp_path):
    page = "<html><head><title>x</title></head><body>{}</body></html>"
    texts = [f"paragraph {i} of words &amp; letters " + "abc " * i for i in range(30)]
    (tmp_path / "eng.html").write_text(page.format("".join(f"<p>{t}</p>" for t in texts)))
    paragraphs = udhr.read_paragraphs(tmp_path / "eng.html")
    assert paragraphs[3] == "paragraph 3 of words & letters abc abc abc"
    pieces = {s: [text for _, text in udhr.windows(paragraphs, s)] for s in udhr._STRIDE}
    assert all(len(text) == 24 for texts in pieces.values() for text in texts)
    assert all(pieces.values())
    firsts = {s: {t for t in texts if t.startswith("paragraph")} for s, texts in pieces.items()}
    assert not firsts["train"] & firsts["test"]
    assert not firsts["train"] & firsts["validation"]
    assert len(set(udhr.LANGUAGES)) == 100


def test_of_equal_rates_the_first_is_best_as_reports_say():
    rates = dict(learning_rate=0.02, alphas=(1.0,) * 3, rates=(0.3, 1.0, 3.0))
    course = dual_head_train.Course(network="mlp-16", epochs=2, **rates)
    assert course.best([0.80, 0.85, 0.85]).rates == (1.0,)
