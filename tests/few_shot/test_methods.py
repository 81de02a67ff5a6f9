"""Few-shot heads: AMU against its formulas in float64, and what every method has in common."""

import dataclasses

import jax
import numpy as np
import pytest

from logitjax import few_shot
from logitjax.few_shot._method import z_score
from tests._compiled import compiled
from tests.few_shot import _oracle as oracle

CLASSES, FEATURES, AUXILIARY, SHOTS = 7, 16, 12, 3
LABELS = np.arange(CLASSES * SHOTS, dtype=np.int32) % CLASSES


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def problem(seed=0):
    """Noisy images of well separated classes, in two encoders, and class weights."""
    rng = np.random.default_rng(seed)
    weights = unit(rng.normal(size=(CLASSES, FEATURES)))
    means = rng.normal(size=(CLASSES, AUXILIARY))
    features = unit(weights[LABELS] + 0.2 * rng.normal(size=(len(LABELS), FEATURES)))
    auxiliary = unit(means[LABELS] + 0.5 * rng.normal(size=(len(LABELS), AUXILIARY)))
    zero_shot = 10 * features @ weights.T
    return features, auxiliary, zero_shot, weights.T


def inputs(seed=0):
    features, auxiliary, zero_shot, weights = (x.astype(np.float32) for x in problem(seed))
    made = few_shot.Inputs(zero_shot=zero_shot, features=features, auxiliary=auxiliary)
    return made, weights


def start(config, images, labels=LABELS, **options):
    """The state of a method before any gradient step."""
    return _start(config, images, labels, jax.random.key(0), options)


@compiled
def _start(config, images, labels, key, options):
    task = few_shot.FewShotTask(support=images, labels=labels, **options)
    return config.init(task, key=key)


@compiled
def logits_and_bias(config, state, images):
    return config.logits(state, images), config.bias(state, images)


MEASURES = [dict(normalizer=250.0), dict(normalizer="classes", exponent=1.3), dict(of="logits")]


@pytest.mark.parametrize("x64", [False, True])
def test_uncertainty_weights_are_the_published_formulas(x64):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, CLASSES)) * np.array([[0.3], [1], [3], [6], [10]]) + 12
    with jax.enable_x64(x64):
        given = logits if x64 else logits.astype(np.float32)
        configs = [few_shot.methods.Uncertainty(**options) for options in MEASURES]
        run = jax.jit(lambda given: [config.weight(given) for config in configs])
        for options, config, got in zip(MEASURES, configs, run(given), strict=True):
            assert got.dtype == given.dtype
            expected = oracle.weight(np.asarray(given, np.float64), config)
            np.testing.assert_allclose(got, expected, rtol=1e-12 if x64 else 1e-6, err_msg=options)
    # A class that a task lacks counts for nothing.
    lacking = np.pad(given, ((0, 0), (0, 1)), constant_values=-np.inf)
    np.testing.assert_allclose(run(lacking)[1], run(given)[1], rtol=1e-5)


def test_the_weight_of_flat_logits_is_the_largest_and_finite():
    given = np.float32([[0, 0, 0], [1, 0, 0], [-np.inf, 3, -np.inf]])
    flat, other, single = jax.jit(few_shot.methods.Uncertainty().weight)(given)[:, 0]
    assert other < flat < np.inf
    assert np.isfinite(single)


def test_kurtosis_over_a_fourth_of_the_classes_does_not_depend_on_their_number():
    def sure(classes, **options):
        logits = np.where(np.arange(classes)[None] == 0, np.float32(50), 0)
        config = few_shot.methods.Uncertainty(exponent=1.0, **options)
        return np.asarray(jax.jit(config.weight)(logits)).item()

    # One-hot probabilities: the released normaliser makes the same certainty weigh 130 times more.
    assert sure(10, normalizer=250.0) / sure(1000, normalizer=250.0) > 100
    ratio = sure(10, normalizer="classes") / sure(1000, normalizer="classes")
    assert 1 < ratio < 1.6


MOMENT = few_shot.methods.Uncertainty(normalizer=250.0)
PRESETS = {
    "released": few_shot.methods.AMU(beta=2.0),
    "released moment": few_shot.methods.AMU(uncertainty=MOMENT),
    "paper": few_shot.methods.AMU.paper(fusion_share=0.6),
}


@pytest.mark.parametrize("name", PRESETS)
def test_amu_loss_and_gradient_are_the_published_formulas(name):
    config = PRESETS[name]
    _, auxiliary, zero_shot, _ = problem()
    kernel = np.zeros((AUXILIARY, CLASSES))
    np.add.at(kernel.T, LABELS, auxiliary / SHOTS)
    factor = oracle.weight(zero_shot, config.uncertainty)
    expected, slope = oracle.loss_and_gradient(
        kernel,
        auxiliary,
        zero_shot,
        LABELS,
        beta=config.beta,
        share=config.fusion_share,
        factor=factor,
        standardize=config.standardize,
    )
    for x64 in (False, True):
        with jax.enable_x64(x64):
            kind = np.float64 if x64 else np.float32
            given = few_shot.Inputs(
                zero_shot=zero_shot.astype(kind), auxiliary=auxiliary.astype(kind)
            )
            state = start(config, given)
            np.testing.assert_allclose(state.trained.T, kernel, rtol=1e-6, atol=1e-7)

            def mean_loss(kernel, given=given, state=state):
                return config.loss(state._replace(trained=kernel), given, LABELS).mean()

            value, grad = jax.jit(jax.value_and_grad(mean_loss))(state.trained)
        np.testing.assert_allclose(value, expected, rtol=1e-12 if x64 else 1e-6)
        np.testing.assert_allclose(grad.T, slope, rtol=1e-6, atol=1e-12 if x64 else 1e-6)


def test_z_scores_of_equal_logits_are_zero_without_a_gradient():
    logits = np.float32([[2.0, 2.0, 2.0], [1.0, 2.0, 4.0]])
    scores = np.asarray(compiled(z_score)(logits))
    np.testing.assert_array_equal(scores[0], 0)
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    slope = np.asarray(jax.jit(jax.grad(lambda z: (weights * z_score(z)).sum()))(logits))
    np.testing.assert_array_equal(slope[0], 0)
    assert np.abs(slope[1]).max() > 0.1
    np.testing.assert_allclose(compiled(z_score)(5 * logits + 3), scores, atol=1e-6)


METHODS = {
    "amu": few_shot.methods.AMU(beta=2.0),
    "tip_adapter": few_shot.methods.TipAdapter(beta=3.0, sharpness=5.0),
    "tip_adapter_f": few_shot.methods.TipAdapterF(beta=3.0, sharpness=5.0),
    "rehark": few_shot.methods.ReHARK(scale=10.0),
    "task_res": few_shot.methods.TaskRes(),
    "linear_probe": few_shot.methods.LinearProbe(),
    "linear_probe_auxiliary": few_shot.methods.LinearProbe(source="auxiliary"),
    "lp_plus_plus": few_shot.methods.LPPlusPlus(),
    "gda": few_shot.methods.GDA(beta=1.0),
    "proker": few_shot.methods.ProKeR(scale=10.0),
    "clap": few_shot.methods.CLAP(scale=10.0),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_zero_shot_logits_plus_a_bias(name):
    config = METHODS[name]
    images, weights = inputs()
    off = dataclasses.replace(config, beta=0.0)
    split = jax.tree.map(lambda x: x.reshape(SHOTS, CLASSES, -1), images)

    @jax.jit
    def run(images, split, weights, key):
        task = few_shot.FewShotTask(support=images, labels=LABELS, class_weights=weights)
        state = config.init(task, key=key)
        one = config.logits(state, images), config.bias(state, images)
        return *one, off.logits(state, images), config.logits(state, split)

    outputs = run(images, split, weights, jax.random.key(0))
    logits, bias, unmoved, by_shot = jax.device_get(outputs)
    assert logits.shape == bias.shape == (len(LABELS), CLASSES)
    expected = images.zero_shot + config.beta * bias
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(unmoved, images.zero_shot, atol=1e-5)
    # Leading axes are the caller's.
    np.testing.assert_allclose(by_shot, logits.reshape(SHOTS, CLASSES, -1), atol=1e-4)
    if name != "task_res" and "probe" not in name:
        accuracy = (logits.argmax(-1) == LABELS).mean()
        assert accuracy >= (images.zero_shot.argmax(-1) == LABELS).mean()


def test_a_random_beginning_of_amu_is_that_of_torchs_linear():
    images, _ = inputs()
    kernel = np.asarray(start(few_shot.methods.AMU(initial="random"), images).trained)
    limit = kernel.shape[1] ** -0.5
    assert np.abs(kernel).max() <= limit
    # Uniform: a third of the square, and no mean, each within four of its deviations.
    assert abs(kernel.mean()) < 4 * limit / np.sqrt(3 * kernel.size)
    assert abs(np.square(kernel / limit).mean() - 1 / 3) < 4 * 0.3 / np.sqrt(kernel.size)


def test_a_cache_is_the_published_formula():
    features, *_ = problem()
    images, _ = inputs()
    # The published sharpness, 1.
    config = few_shot.methods.TipAdapter()
    got = logits_and_bias(config, start(config, images), images)[1]
    cache = np.exp(features @ features.T - 1) @ np.eye(CLASSES)[LABELS]
    np.testing.assert_allclose(got, cache, rtol=1e-5)


@pytest.mark.parametrize("scale", [100.0, 20.0])
def test_residual_methods_rewrite_their_published_classifiers(scale):
    features, _, zero_shot, weights = problem()
    zero_shot = scale * features @ weights
    images, class_weights = inputs()
    images = dataclasses.replace(images, zero_shot=zero_shot.astype(np.float32))
    rng = np.random.default_rng(1)
    residual = 0.1 * rng.normal(size=weights.shape).astype(np.float32)

    @jax.jit
    def run(images, class_weights, residual, key):
        task = few_shot.FewShotTask(support=images, labels=LABELS, class_weights=class_weights)
        config = few_shot.methods.TaskRes(beta=0.5, scale=scale)
        state = config.init(task, key=key)._replace(trained=residual)
        return config.logits(state, images)

    by_residual = jax.device_get(run(images, class_weights, residual, jax.random.key(0)))
    moved = weights + 0.5 * residual
    np.testing.assert_allclose(by_residual, scale * features @ moved, rtol=1e-4, atol=1e-3)


def test_lp_plus_plus_starts_and_steps_as_published():
    features, _, _, weights = problem()
    images, class_weights = inputs()
    text = features @ weights
    means = np.stack([features[k == LABELS].mean(0) for k in range(CLASSES)], 1)
    blend = 250 * np.mean([text[k == LABELS, k].mean() for k in range(CLASSES)])
    config = few_shot.methods.LPPlusPlus(iterations=1, blend_every=1)
    state = start(config, images, class_weights=class_weights)
    p = oracle.softmax(features @ means + blend * text) - np.eye(CLASSES)[LABELS]
    n = len(LABELS)
    rate = 4 * n / np.linalg.eigvalsh(features.T @ features)[-1]
    np.testing.assert_allclose(
        state.trained["prototypes"], means - rate * features.T @ p / n, rtol=1e-3, atol=1e-4
    )
    blend_rate = n / (4 * np.square(text).sum(0).max())
    expected = blend - blend_rate * (p * text).sum(0) / n
    np.testing.assert_allclose(state.trained["blend"], expected, rtol=1e-5)


@pytest.mark.parametrize("count", [len(LABELS), 10])  # more and fewer images than channels
def test_lp_plus_plus_is_its_gradient_descent(count):
    features, _, _, weights = (x[:count] if len(x) == len(LABELS) else x for x in problem())
    labels = LABELS[:count]
    hit = np.eye(CLASSES)[labels]
    text, share = features @ weights, hit / np.maximum(hit.sum(0), 1)
    rate = 4 * count / np.linalg.eigvalsh(features.T @ features)[-1]
    blend_rate = count / (4 * np.square(text).sum(0).max())
    moving = [features.T @ share, np.zeros(CLASSES)]
    blend = np.full(CLASSES, 250 * (share * text).sum(0).mean())
    speed = [0.0, 0.0]
    for step in range(23):
        p = oracle.softmax(features @ moving[0] + moving[1] + blend * text) - hit
        for k, slope in enumerate((features.T @ p / count, p.mean(0))):
            speed[k] = 0.9 * speed[k] + slope
            moving[k] = moving[k] - rate * speed[k]
        if step % 10 == 9:
            blend = blend - blend_rate * (p * text).mean(0)
    config = few_shot.methods.LPPlusPlus(iterations=23)
    with jax.enable_x64(True):
        given_inputs = few_shot.Inputs(zero_shot=np.zeros_like(text), features=features)
        # Rows that are not there change nothing, the steps' sizes included.
        rows = ((0, 3), (0, 0))
        padded = jax.tree.map(lambda x: np.pad(x, rows, constant_values=2.0), given_inputs)
        fewer = np.pad(labels, (0, 3), constant_values=-1)
        for images, classes in ((given_inputs, labels), (padded, fewer)):
            state = start(config, images, classes, class_weights=weights).trained
            np.testing.assert_allclose(state["prototypes"], moving[0], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(state["bias"], moving[1], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(state["blend"], blend, rtol=1e-8)


def test_views_of_an_image_are_averaged_and_class_means_are_not_of_length_one():
    images, _ = inputs()
    other, _ = inputs(seed=1)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), images, other)
    mean = unit((images.auxiliary + other.auxiliary) / 2)
    kernel = start(few_shot.methods.AMU(), both, views=2).trained.T
    expected = np.stack([mean[k == LABELS].mean(0) for k in range(CLASSES)], 1)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(kernel, axis=0).max() < 0.999


def test_mistakes_are_named():
    images, _ = inputs()
    bare = few_shot.Inputs(zero_shot=images.zero_shot)
    for config, missing in [
        (few_shot.methods.AMU(), "auxiliary"),
        (few_shot.methods.TipAdapter(), "features"),
        (few_shot.methods.ProKeR(), "class_weights"),
    ]:
        with pytest.raises(ValueError, match=missing):
            start(config, bare)
    with pytest.raises(Exception, match="of"):
        few_shot.methods.Uncertainty(of="doubt")  # pyright: ignore[reportArgumentType]
