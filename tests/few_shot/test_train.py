"""Few-shot training: trajectories of the published optimizer, and many runs in one program."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
import scipy.special

from logitjax import few_shot, training
from logitjax.few_shot import _sweep as few_shot_sweep
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE
from tests.few_shot import _oracle as oracle

CLASSES, AUXILIARY = 5, 8


def problem(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % CLASSES
    means = np.random.default_rng(9).normal(size=(CLASSES, AUXILIARY))
    auxiliary = means[labels] + rng.normal(size=(count, AUXILIARY))
    auxiliary /= np.linalg.norm(auxiliary, axis=-1, keepdims=True)
    zero_shot = 3 * rng.normal(size=(count, CLASSES))
    return auxiliary, zero_shot, labels


def images(auxiliary, zero_shot, kind=np.float32):
    features = {"auxiliary": auxiliary.astype(kind), "zero_shot": zero_shot.astype(kind)}
    return few_shot.Inputs(**features)


MOMENT = few_shot.methods.Uncertainty(normalizer=250.0)
PRESETS = {
    "released": few_shot.methods.AMU(beta=2.0),
    "released moment": few_shot.methods.AMU(uncertainty=MOMENT),
    "paper": few_shot.methods.AMU.paper(),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "paper" else EVERY_CHANGE) for n in PRESETS]
)
def test_fifty_steps_are_those_of_the_published_optimizer(name):
    config = PRESETS[name]
    # 19 images in batches of 4: the last batch of an epoch holds three.
    auxiliary, zero_shot, labels = problem(19)
    recipe = few_shot.Recipe(epochs=10, batch_size=4)
    order = recipe.order(0, 19)
    assert len(order) == recipe.total_steps(19) == 50
    kernel = np.stack([auxiliary[k == labels].mean(0) for k in range(CLASSES)], 1)
    trained, losses = oracle.train(
        kernel,
        auxiliary,
        zero_shot,
        labels,
        order,
        factor=oracle.weight(zero_shot, config.uncertainty),
        beta=config.beta,
        share=config.fusion_share,
        standardize=config.standardize,
    )
    assert np.abs(trained - kernel).max() > 1e-2
    for x64 in (False, True):
        with jax.enable_x64(x64):
            support = images(auxiliary, zero_shot, np.float64 if x64 else np.float32)
            task = few_shot.FewShotTask(support=support, labels=labels)
            start = compiled(lambda config, task: config.init(task))(config, task)
            run = jax.jit(lambda start, task=task: recipe.train(config, task, start, order))
            got, seen = run(start)
        tolerance = 1e-8 if x64 else 1e-6
        np.testing.assert_allclose(got.trained.T, trained, rtol=0, atol=tolerance)
        np.testing.assert_allclose(seen, losses, rtol=tolerance)


def test_an_epoch_shows_every_image_once_and_views_take_turns():
    recipe = few_shot.Recipe(epochs=3, batch_size=4)
    order = recipe.order(0, 10, views=2)
    assert order.shape == (9, 4)
    epochs = order.reshape(3, 12)
    for number, rows in enumerate(epochs):
        first = 10 * (number % 2)
        assert sorted(rows[rows >= 0]) == list(range(first, first + 10))
        assert (rows[-2:] == -1).all()
    assert (epochs[0] != epochs[2]).any()
    cut = dataclasses.replace(recipe, steps=4)
    assert cut.order(0, 10, views=2).shape == (4, 4)
    assert recipe.order(0, 3).shape == (3, 3)


def stacked(parts):
    return jax.tree.map(lambda *x: np.stack(x), *parts)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_sweep_is_its_runs_one_by_one():
    config = few_shot.methods.AMU(uncertainty=few_shot.methods.Uncertainty(), initial="random")
    recipe = few_shot.Recipe(epochs=4, batch_size=6)
    runs = [problem(15, seed) for seed in (0, 1)]
    tests = [problem(21, seed) for seed in (5, 6)]
    support, held_out = (stacked([images(*run[:2]) for run in x]) for x in (runs, tests))
    labels, truth = (np.stack([run[2] for run in x]) for x in (runs, tests))
    truth[0, 3] = -1
    grid = {
        "beta": [0.5, 0.5, 3.0, 3.0],
        "uncertainty.exponent": [0.2] * 4,
        "training.learning_rate": [1e-3, 3e-2] * 2,
    }
    options = dict(training=recipe, grid=grid, seed=3)
    task = few_shot.FewShotTask(support=support, labels=labels)
    scored = dict.fromkeys(("test", "calibration"), (held_out, truth))
    swept = few_shot.sweep(config, task, scored, **options)
    # Two runs on four devices: the last one is computed three times, and kept once.
    mesh = training.make_mesh("data:4,fsdp:2")
    for other in (dict(sequential=True), dict(mesh=mesh), dict(mesh=mesh, sequential=True)):
        again = few_shot.sweep(config, task, scored, **other, **options)
        chex.assert_trees_all_close(swept, again, rtol=1e-4)
    second = jax.tree.map(lambda x: x[1:], (task, scored))
    last = few_shot.sweep(config, *second, first=1, sequential=True, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[1:], rtol=1e-4), last, swept)
    scores = swept["test"]
    assert scores["accuracy"].shape == scores["auxiliary_accuracy"].shape == (2, 4)
    for run in range(2):
        method, settings = few_shot_sweep.with_settings(
            config, recipe, {name: column[3] for name, column in grid.items()}
        )

        @jax.jit
        def alone(task, order, held_out, run, method=method, settings=settings):
            state = method.init(task, key=jax.random.fold_in(jax.random.key(3), run))
            state, _ = settings.train(method, task, state, order)
            return method.logits(state, held_out)

        order = settings.order((3, run), 15)
        single = few_shot.FewShotTask(support=images(*runs[run][:2]), labels=labels[run])
        logits = alone(single, order, images(*tests[run][:2]), run)
        present = truth[run] >= 0
        right = (np.asarray(logits).argmax(-1) == truth[run])[present]
        np.testing.assert_allclose(scores["accuracy"][run, 3], right.mean(), rtol=1e-5)
        calm = swept["calibration"]["probabilities"][run, 3]
        by_temperature = np.asarray(logits)[present] / np.geomspace(0.01, 300, 81)[:, None, None]
        every = scipy.special.softmax(by_temperature, -1)
        likely = every[:, np.arange(present.sum()), truth[run][present]]
        # A picture of doubt beside those that there are.
        doubt = 1 / (1 + len(right))
        values = np.log((1 - doubt) * likely + doubt / every.shape[-1]).mean(1)
        np.testing.assert_allclose(calm[present], every[values.argmax()], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.every_change
def test_rows_that_are_not_there_change_nothing():
    recipe = few_shot.Recipe(epochs=3, batch_size=4)
    run, test = problem(10), problem(15, seed=5)
    weights = np.linalg.qr(np.random.default_rng(0).normal(size=(AUXILIARY, CLASSES)))[0]
    weights = weights.astype(np.float32)

    def padded(rows):
        auxiliary, zero_shot, labels = run
        made = images(auxiliary[:rows], zero_shot[:rows])
        made = dataclasses.replace(made, features=made.auxiliary)
        made = jax.tree.map(lambda x: np.pad(x, ((0, 10 - rows), (0, 0)))[None], made)
        return made, np.pad(labels[:rows], (0, 10 - rows), constant_values=-1)[None]

    held_out = images(*test[:2])
    held_out = dataclasses.replace(held_out, features=held_out.auxiliary)
    held_out = {"test": (jax.tree.map(lambda x: x[None], held_out), test[2][None])}
    for config in (
        few_shot.methods.AMU(),
        few_shot.methods.LPPlusPlus(),
        few_shot.methods.TipAdapterF(),
    ):
        before = few_shot_sweep.compiled_sweep._cache_size()
        for rows in (5, 10):
            support, labels = padded(rows)
            task = few_shot.FewShotTask(support=support, labels=labels, class_weights=weights)
            swept = few_shot.sweep(config, task, held_out, training=recipe)
            only = jax.tree.map(lambda x, rows=rows: x[:, :rows], (support, labels))
            task_of_these = dataclasses.replace(task, support=only[0], labels=only[1])
            exact = few_shot.sweep(config, task_of_these, held_out, training=recipe)
            chex.assert_trees_all_close(swept, exact, rtol=1e-4)
            one = few_shot.sweep(config, task, held_out, training=recipe, sequential=True)
            chex.assert_trees_all_close(swept, one, rtol=1e-4)
        # 5 rows with room for 10 and 10 share a program, at once and one by one; 5 have their own.
        assert few_shot_sweep.compiled_sweep._cache_size() == before + 3


def test_training_beats_its_start_for_every_method_that_trains():
    rng = np.random.default_rng(0)
    weights = np.linalg.qr(rng.normal(size=(AUXILIARY, CLASSES)))[0].astype(np.float32)
    auxiliary, _, labels = problem(20)
    features = weights.T[labels] + 0.4 * rng.normal(size=(20, AUXILIARY))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)
    support = dataclasses.replace(images(auxiliary, 100 * features @ weights), features=features)
    recipe = few_shot.Recipe(epochs=8, batch_size=5)
    order = recipe.order(0, 20)
    for config in (
        few_shot.methods.TipAdapterF(),
        few_shot.methods.TaskRes(),
        few_shot.methods.LinearProbe(),
    ):
        task = few_shot.FewShotTask(support=support, labels=labels, class_weights=weights)

        @jax.jit
        def run(config=config, task=task):
            state = config.init(task)
            after, _ = recipe.train(config, task, state, order)
            return [config.loss(s, support, labels).mean() for s in (state, after)]

        before, after = run()
        assert after < before, type(config).__name__


def test_settings_are_chosen_by_accuracy_then_by_cross_entropy():
    scores = {
        "accuracy": np.array([[0.5, 0.7, 0.7], [0.9, 0.1, 0.9]]),
        "cross_entropy": np.array([[0.1, 2.0, 1.0], [np.nan, 0.0, 5.0]]),
    }
    assert few_shot.best_setting(scores).tolist() == [2, 2]


def test_mistakes_are_named():
    auxiliary, zero_shot, labels = problem(5)
    support = jax.tree.map(lambda x: x[None], images(auxiliary, zero_shot))
    task = few_shot.FewShotTask(support=support, labels=labels[None])
    options = dict(training=few_shot.Recipe(epochs=1))
    for grid, match in [({"gamma": [1.0]}, "gamma"), ({"beta": [1.0], "beta2": []}, "length")]:
        with pytest.raises(ValueError, match=match):
            few_shot.sweep(few_shot.methods.AMU(), task, {}, grid=grid, **options)
    pair = jax.tree.map(lambda x: np.concatenate([x, x]), support)
    uneven = np.stack([labels, np.where(labels == 4, -1, labels)])
    task = few_shot.FewShotTask(support=pair, labels=uneven)
    with pytest.raises(ValueError, match="labels"):
        few_shot.sweep(few_shot.methods.AMU(), task, {}, **options)
    with pytest.raises(ValueError, match="method"):
        few_shot.Recipe.published("coop")
    with pytest.raises(ValueError, match="epochs"):
        few_shot.Recipe(epochs=0)
