"""Labels, features, pictures and scores that nobody should give a classifier, case by case."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from logitjax import data, distillation, few_shot, vision
from logitjax.few_shot import methods
from logitjax.few_shot._method import unit_rows, z_score
from logitjax.vision._preprocessing import Preprocessing

CLASSES, WIDTH, SHOTS = 3, 4, 2
COUNT = CLASSES * SHOTS
LABELS = np.arange(COUNT, dtype=np.int32) % CLASSES
RECIPE = few_shot.Recipe(epochs=1, batch_size=COUNT)


@pytest.fixture(autouse=True)
def _errors_of_our_own(monkeypatch):
    # Users have no checks of annotations: what is refused has to be refused by the library.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def images(count=COUNT, scale=1.0):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(count, WIDTH)).astype(np.float32) for _ in range(2)]
    features, auxiliary = (scale * x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rows)
    zero_shot = rng.normal(size=(count, CLASSES)).astype(np.float32)
    return few_shot.Inputs(zero_shot=zero_shot, features=features, auxiliary=auxiliary)


def task(labels=LABELS, count=COUNT, **options):
    weights = np.eye(WIDTH, CLASSES, dtype=np.float32)
    support = images(count, **options)
    return few_shot.FewShotTask(support=support, labels=labels, class_weights=weights)


def fitted(labels=LABELS, order=None, **options):
    given = task(labels, **options)
    method = methods.TaskRes()
    state = method.init(given)
    order = RECIPE.order(0, COUNT) if order is None else order
    return RECIPE.train(method, given, state, order)


def decoupled(labels):
    logits = np.zeros((2, CLASSES), np.float32)
    return distillation.decoupled_knowledge_distillation(logits, logits + 1.0, labels)


def runs(labels=LABELS, held_out_labels=LABELS):
    one = task(labels)
    support = jax.tree.map(lambda x: x[None], one.support)
    several = dataclasses.replace(one, support=support, labels=np.asarray(labels)[None])
    held_out = {"test": (support, np.asarray(held_out_labels)[None])}
    return few_shot.sweep(methods.TipAdapter(), several, held_out, training=RECIPE)


def identity():
    return few_shot.FeatureIdentity(
        encoder="net",
        encoder_fingerprint="n",
        preprocessing="",
        views="plain",
        data="dots",
        data_fingerprint="d",
        class_names=("a", "b"),
        num_views=1,
        num_features=2,
    )


def cached(labels, directory, rows=(0, 1)):
    def compute(batch):
        features = np.zeros((len(batch), 1, 2), np.float32)
        return few_shot.Features(features=features, logits=None, labels=np.asarray(labels))

    few_shot.FeatureCache(directory, identity()).fill(rows, compute, batch_size=2)


LABEL_CASES = {
    "decoupled_knowledge_distillation, K": (
        lambda tmp: decoupled(np.int32([0, 3])),
        "labels: expected 0 to 2, got 3 at 1",
    ),
    "decoupled_knowledge_distillation, -1": (
        lambda tmp: decoupled(jnp.int32([-1, 0])),
        "labels: expected 0 to 2, got -1 at 0",
    ),
    "decoupled_knowledge_distillation, half": (
        lambda tmp: decoupled(np.float32([0.5, 0])),
        "labels: expected integers, got float32",
    ),
    "decoupled_knowledge_distillation, shorter": (
        lambda tmp: decoupled(np.int32([0])),
        "labels: expected the shape (2,), got (1,)",
    ),
    "fit, K": (
        lambda tmp: fitted(np.where(LABELS == 2, 3, LABELS)),
        "labels: expected -1 to 2, got 3 at 2",
    ),
    "fit, -1 in the order": (
        lambda tmp: fitted(np.where(LABELS == 2, -1, LABELS)),
        "order: expected rows with a label, got ",
    ),
    "fit, a row that is not there": (
        lambda tmp: fitted(order=np.int32([[0, 6]])),
        "order: expected -1 to 5, got 6 at (0, 1)",
    ),
    "fit, labels shorter than images": (
        lambda tmp: fitted(LABELS[:4]),
        "labels: expected one for each of (6,) images in 1 views, got shape (4,)",
    ),
    "init, labels shorter than images": (
        lambda tmp: methods.TipAdapter().init(task(LABELS[:4])),
        "labels: expected one for each of (6,) images in 1 views, got shape (4,)",
    ),
    "init, zero shots": (
        lambda tmp: methods.AMU().init(task(LABELS[:0], 0)),
        "labels: expected at least one labelled image, got none",
    ),
    "Recipe.order, zero shots": (
        lambda tmp: RECIPE.order(0, 0),
        "num_examples: expected at least one image, got 0",
    ),
    "sweep, zero shots": (
        lambda tmp: runs(np.full_like(LABELS, -1)),
        "num_examples: expected at least one image, got 0",
    ),
    "sweep, K": (
        lambda tmp: runs(np.where(LABELS == 2, 3, LABELS)),
        "labels: expected -1 to 2, got 3 at (0, 2)",
    ),
    "sweep, K held out": (
        lambda tmp: runs(held_out_labels=np.where(LABELS == 2, 3, LABELS)),
        "held_out['test']: expected -1 to 2, got 3 at (0, 2)",
    ),
    "sweep, fewer labels held out": (
        lambda tmp: runs(held_out_labels=LABELS[:4]),
        "held_out: expected (1, 6) labels of 'test', got (1, 4)",
    ),
    "FeatureCache, 7 of 2 classes": (
        lambda tmp: cached([0, 7], tmp),
        "labels: expected 0 to 1, got 7 at 1",
    ),
    "FeatureCache, .5": (lambda tmp: cached([0, 0.5], tmp), "labels: expected integers, got float"),
    "FeatureCache, negative rows": (
        lambda tmp: cached([0, 1], tmp, rows=[1, -1]),
        "rows: expected 0 or more, got -1 at 1",
    ),
    "FeatureCache, a mask of rows": (
        lambda tmp: cached([0, 1], tmp, rows=[True, False]),
        "rows: expected integers, got bool",
    ),
    "dist, 3-D logits": (
        lambda tmp: distillation.dist(*np.zeros((2, 2, 5, CLASSES), np.float32)),
        "student_logits: expected [batch, classes], got shape (2, 5, 3)",
    ),
    "TipAdapter, rows that are not unit": (
        lambda tmp: methods.TipAdapter().init(task(scale=30.0)),
        "features: expected rows of length one, got 30 at 0",
    ),
    "TipAdapterF, a test image that is not unit": (
        lambda tmp: methods.TipAdapterF().logits(
            methods.TipAdapterF().init(task()), images(scale=0.5)
        ),
        "features: expected rows of length one, got 0.5 at 0",
    ),
    "AMU, a feature that is nan": (
        lambda tmp: methods.AMU().init(task(scale=np.nan)),
        "auxiliary: expected rows of length one, got nan at 0",
    ),
    "best_setting, nothing but nan": (
        lambda tmp: few_shot.best_setting(
            {"accuracy": np.array([[0.5], [0.5]]), "cross_entropy": np.array([[1.0], [np.nan]])}
        ),
        "scores: expected a setting without nan in each run, got none in 1",
    ),
}


@pytest.mark.parametrize("name", LABEL_CASES)
def test_an_error_of_one_line_names_the_argument_and_the_first_offending_index(name, tmp_path):
    call, message = LABEL_CASES[name]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(tmp_path / "cache")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_under_jit_a_label_that_is_no_class_is_nan_and_has_no_gradient():
    logits = np.random.default_rng(1).normal(size=(2, 4, CLASSES)).astype(np.float32)

    def loss(student, labels):
        values = distillation.decoupled_knowledge_distillation(student, logits[1], labels)
        return jnp.where(jnp.isnan(values), 0.0, values).sum(), values

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, values), gradient = run(logits[0], np.int32([0, 1, -1, 3]))
    assert np.isnan(values).tolist() == [False, False, True, True]
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[2:].any()


def test_dist_does_not_see_examples_that_do_not_count_nor_classes_that_are_not_there():
    student, teacher = np.random.default_rng(2).normal(size=(2, 5, CLASSES)).astype(np.float32)
    valid = np.arange(5) < 4

    def loss(student, teacher):
        values = distillation.dist(student, teacher, where=jnp.asarray(valid))
        return jnp.where(valid, values, 0.0).sum()

    run = jax.jit(jax.value_and_grad(loss))
    expected, slope = run(student, teacher)
    poisoned = np.where(valid[:, None], student, np.nan)
    value, gradient = run(poisoned, np.where(valid[:, None], teacher, np.inf))
    assert value == expected
    np.testing.assert_array_equal(gradient, slope)

    def padded(x):
        return np.pad(x, ((0, 0), (0, 2)), constant_values=-np.inf)

    wider, gradient = run(padded(student), padded(teacher))
    np.testing.assert_allclose(wider, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, :CLASSES], slope, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradient)[:, CLASSES:].any()


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_a_class_at_minus_infinity_does_not_change_how_sure_a_classifier_is(of):
    logits = np.float32([[3.0, 1.0, 2.0]])
    padded = np.float32([[3.0, -np.inf, 1.0, 2.0]])
    config = methods.Uncertainty(of=of, normalizer="classes")
    weights = jax.jit(lambda *rows: [config.weight(row) for row in rows])
    expected, with_padding = weights(logits, padded)
    np.testing.assert_allclose(with_padding, expected, rtol=1e-5)


def test_a_class_at_minus_infinity_stays_there_in_every_method():
    def gone(inputs):
        absent = np.arange(CLASSES) == 1
        return dataclasses.replace(inputs, zero_shot=np.where(absent, -np.inf, inputs.zero_shot))

    labels = np.where(LABELS == 1, 0, LABELS)
    given = dataclasses.replace(task(labels), support=gone(images()))
    tests = gone(images())
    for method in (
        methods.AMU.paper(),
        methods.LinearProbe(),
        methods.CLAP(),
        methods.TipAdapter(),
    ):

        @jax.jit
        def run(given, tests, method=method):
            state = method.init(given)

            def loss(trained):
                at = state._replace(trained=trained)
                return method.loss(at, tests, labels).sum(), method.logits(at, tests)

            return jax.grad(loss, has_aux=True)(state.trained)

        gradient, logits = run(given, tests)
        assert np.isneginf(logits[:, 1]).all(), method
        assert np.isfinite(np.delete(logits, 1, 1)).all(), method
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), method


def test_a_row_with_a_nan_stays_one_and_any_length_becomes_one():
    rows = np.float32([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [3e-25, 4e-25], [3e25, 4e25]])
    units = np.asarray(jax.jit(unit_rows)(rows))
    np.testing.assert_allclose(units[[0, 3, 4]], [[0.6, 0.8]] * 3, rtol=1e-6)
    assert units[1].tolist() == [0.0, 0.0]
    assert np.isnan(units[2]).all()
    scores = np.asarray(jax.jit(z_score)(np.float32([[1, 2, 3, -np.inf], [np.nan, 1, 2, 3]])))
    np.testing.assert_allclose(scores[0], [-1, 0, 1, 0], atol=1e-6)
    assert np.isnan(scores[1]).all()


def test_a_setting_without_numbers_is_never_the_best():
    scores = {
        "accuracy": np.array([[0.9, 0.5, np.nan], [0.4, 0.4, 0.2]]),
        "cross_entropy": np.array([[np.nan, 1.0, 0.1], [np.inf, np.inf, 0.1]]),
    }
    assert few_shot.best_setting(scores).tolist() == [1, 0]
    # A sharpness that is nan makes logits that are, of which argmax finds the first: class 0.
    support = jax.tree.map(lambda x: x[None], images())
    several = few_shot.FewShotTask(support=support, labels=LABELS[None])
    held_out = {"validation": (support, np.zeros_like(LABELS)[None])}
    grid = {"sharpness": [np.nan, 1.0]}
    swept = few_shot.sweep(methods.TipAdapter(), several, held_out, training=RECIPE, grid=grid)
    assert swept["validation"]["accuracy"][0, 0] == 0
    assert few_shot.best_setting(swept["validation"]).tolist() == [1]


def test_greys_of_16_bits_are_scaled_not_cut_off(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "train" / "grey"
    folder.mkdir(parents=True)
    greys = np.array([[0, 257], [32896, 65535]], np.uint16)
    Image.fromarray(greys).save(folder / "0.png")
    pixels, _ = data.load_image_set(f"folder:{tmp_path}", split="train")[0]
    assert pixels[..., 0].tolist() == [[0, 1], [128, 255]]


def test_pictures_of_floats_up_to_255_are_refused_and_nan_under_jit():
    preprocessing = Preprocessing(size=2, resize=2)
    small = np.float32(np.random.default_rng(3).uniform(size=(1, 2, 2, 3)))
    preprocessing.check(small)
    for pixels, message in (
        (255 * small, "images: expected floats 0 to 1, got "),
        (
            np.full((1, 2, 2, 3), 65535, np.uint16),
            "images: expected whole numbers 0 to 255, got 65",
        ),
        (np.full((1, 2, 2, 3), -1), "images: expected whole numbers 0 to 255, got -1 at (0, 0, 0"),
        (small[0], "images: expected [batch, height, width, 3], got (2, 2, 3)"),
    ):
        with pytest.raises(ValueError, match=r"^images: ") as caught:
            preprocessing.check(pixels)
        assert str(caught.value).startswith(message)
    normalize = jax.jit(preprocessing.normalize)
    assert np.isnan(normalize(255 * small)).any()
    whole = np.round(255 * small).astype(np.uint8)
    np.testing.assert_allclose(normalize(whole / np.float32(255)), normalize(whole), atol=1e-6)


def test_an_encoder_refuses_floats_up_to_255():
    encoder = vision.Encoder.__new__(vision.Encoder)
    encoder.preprocessing = Preprocessing(size=2, resize=2)
    with pytest.raises(ValueError, match=r"^images: expected floats 0 to 1, got 200 at \(0, 0"):
        encoder.encode(np.full((1, 2, 2, 3), 200, np.float32))


def test_rows_of_an_image_set_are_numbers_from_its_start():
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    made = data.ImageSet(
        lambda index: (pixels[index], index % 2),
        lambda: np.arange(3) % 2,
        count=3,
        class_names=("a", "b"),
        fingerprint="dots",
        source="dots",
    )
    assert made.select([2, 0]).labels.tolist() == [0, 0]
    for rows, message in (
        ([0, -1], r"^rows: expected 0 to 2, got -1 at 1"),
        ([3], r"^rows: expected 0 to 2, got 3 at 0"),
        ([True, False, True], r"^rows: expected integers, got bool"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            made.select(rows)
