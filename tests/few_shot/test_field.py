"""The methods of 2023 to 2025 by hand-worked values and by float64 oracles."""

import dataclasses

import jax
import numpy as np
import pytest

from logitjax import few_shot
from logitjax.few_shot import methods
from tests.few_shot import _oracle as oracle

# Four images of two classes on the unit circle, the classes' weights the axes.
F = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]])
Y = np.array([0, 0, 1, 1], np.int32)
Q = np.array([[0.6, 0.8]])
W0 = np.eye(2)


def inputs(features, scale=100.0, weights=W0, **more):
    return few_shot.Inputs(zero_shot=scale * features @ weights, features=features, **more)


def task(**more):
    return few_shot.FewShotTask(support=inputs(F), labels=Y, class_weights=W0, **more)


@pytest.fixture(scope="module")
def worked():
    """Logits of every method for one query, in float64 and one program."""
    kernel = dict(sharpness=2.0, penalty=0.5, scale=1.0)
    chosen = {
        "gda": methods.GDA(),
        "proker": methods.ProKeR(**kernel),
        "proker, large penalty": methods.ProKeR(**{**kernel, "penalty": 1e6}),
        "proker, no penalty": methods.ProKeR(**{**kernel, "penalty": 0.0}),
    }

    @jax.jit
    def run(given, query):
        states = {name: method.init(given) for name, method in chosen.items()}
        biases = {name: method.bias(states[name], query) for name, method in chosen.items()}
        return states, biases

    with jax.enable_x64(True):
        return jax.device_get(run(task(), inputs(Q)))


def test_gda_by_hand(worked):
    states, biases = worked
    classifier = states["gda"].trained
    expected = [[6.948529, 4.301471], [4.301471, 6.948529]]
    np.testing.assert_allclose(classifier["kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(classifier["bias"], [-4.465206, -4.465206], atol=1e-6)
    np.testing.assert_allclose(biases["gda"][0], [3.145088, 3.674500], atol=1e-6)


def test_proker_by_hand(worked):
    states, biases = worked
    expected = [[-0.018525, 0.101186], [0.309253, -0.429987]]
    coefficients = states["proker"].trained
    np.testing.assert_allclose(coefficients[:2], expected, atol=1e-6)
    np.testing.assert_allclose(coefficients[2:], np.asarray(expected)[:, ::-1], atol=1e-6)
    for name, logits in (
        ("proker", [0.514993, 0.745374]),
        ("proker, large penalty", [0.184624, 0.446131]),
        ("proker, no penalty", [0.6, 0.8]),
    ):
        np.testing.assert_allclose(Q[0] @ W0 + biases[name][0], logits, atol=1e-6, err_msg=name)


def test_what_is_held_near_its_start_by_hand():
    hidden = np.eye(2)[:1]
    of_hidden = few_shot.Inputs(zero_shot=hidden, hidden=hidden)
    start = np.eye(2)
    moved = np.array([[1, 0.5], [0, 1]])

    @jax.jit
    def run(given, w):
        clap, free = methods.CLAP(scale=10.0), methods.CLAP(scale=10.0, penalty=0.0)
        state = clap.init(given)
        images = given.support
        at = state._replace(trained=w)
        # Only the first class is held.
        one = at._replace(fixed=(start, np.array([1.0, 0.0])))
        parts = [m.loss(at, images, Y).mean() for at in (at, one) for m in (clap, free)]
        lip = methods.ProLIP(scale=10.0, penalty=0.5)
        of_lip = few_shot.FewShotTask(
            support=of_hidden, labels=Y[:1], class_weights=W0, projection=start
        )
        shifted = lip.init(of_lip)._replace(trained=moved)
        loss = lip.loss(shifted, of_hidden, Y[:1])
        return state.fixed[1], clap.logits(state, images), parts, loss

    # The zero-shot logits are at CLAP's own scale here.
    given = dataclasses.replace(task(), support=inputs(F, 10.0))
    with jax.enable_x64(True):
        weights, logits, (loss, free, *one), lip = jax.device_get(
            run(given, np.array([[0.9, 0.3], [0.1, 1]]))
        )
    np.testing.assert_allclose(weights, [0.940376, 0.940376], atol=1e-6)
    np.testing.assert_allclose(logits, 10 * F, atol=1e-12)  # before a step it is zero-shot
    np.testing.assert_allclose(loss - free, 0.051721, atol=1e-6)
    np.testing.assert_allclose(free, 0.131488, atol=1e-6)
    np.testing.assert_allclose(one[0] - one[1], (0.1**2 + 0.1**2) / 2, atol=1e-6)
    p = oracle.softmax(10 * np.array([1, 0.5]) / np.sqrt(1.25))
    np.testing.assert_allclose(lip[0], -np.log(p[0]) + 0.125, atol=1e-12)


def test_lp_plus_plus_by_hand():
    expected = {10: (6.625364, -5.425364, 1.002080), 20: (10.183454, -8.983454, 1.002558)}

    # The start at 225 is saturated; the values were worked from a blend of 1.
    @jax.jit
    def run(given):
        made = [methods.LPPlusPlus(iterations=n, blend_scale=1 / 0.9) for n in expected]
        return [method.init(given).trained for method in made]

    with jax.enable_x64(True):
        steps = jax.device_get(run(task()))
    for state, (prototype, other, blend) in zip(steps, expected.values(), strict=True):
        np.testing.assert_allclose(state["prototypes"][0], [prototype, other], atol=2e-6)
        np.testing.assert_allclose(state["blend"], blend, atol=2e-6)


def unit_rows(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def gaussian_oracle(f, y, classes):
    means = np.stack([f[y == k].mean(0) for k in range(classes)])
    centred = f - means[y]
    trace = np.square(centred).sum() / (len(f) - 1)
    precision = f.shape[1] * np.linalg.inv(centred.T @ centred + trace * np.eye(f.shape[1]))
    kernel = precision @ means.T
    return kernel, -np.log(classes) - (means.T * kernel).sum(0) / 2


def test_gda_is_the_inverse_whatever_is_longer():
    rng = np.random.default_rng(0)
    run = jax.jit(lambda given: methods.GDA().init(given).trained)
    for count, width in ((9, 6), (9, 12)):
        f = rng.normal(size=(2 * count, width))
        f /= np.linalg.norm(f, axis=1, keepdims=True)
        y = np.arange(count, dtype=np.int32) % 3
        labels = np.concatenate([y, [-1]]).astype(np.int32)
        # Two views, and a row that is not there.
        views = np.concatenate([f[:count], f[:1], f[count:], f[:1]])
        images = few_shot.Inputs(zero_shot=np.zeros((len(views), 3)), features=views)
        given = few_shot.FewShotTask(support=images, labels=labels, views=2)
        for x64, tolerance in ((True, 1e-10), (False, 1e-4)):
            with jax.enable_x64(x64):
                cast = np.float64 if x64 else np.float32
                classifiers = run(dataclasses.replace(given, support=jax.tree.map(cast, images)))
            kernel, bias = gaussian_oracle(f, np.tile(y, 2), 3)
            for name, expected in (("kernel", kernel), ("bias", bias)):
                np.testing.assert_allclose(
                    classifiers[name], expected, rtol=tolerance, atol=tolerance
                )


def test_gda_of_classes_that_are_empty_or_have_no_spread():
    f = np.float32(np.concatenate([F, F[:1]]))
    images = few_shot.Inputs(zero_shot=np.zeros((5, 3), np.float32), features=f)
    method = methods.GDA()
    labels = np.array([0, 0, 1, 1, -1], np.int32)
    given = few_shot.FewShotTask(support=images, labels=labels)
    run = jax.jit(lambda given: method.bias(method.init(given), given.support))
    bias = np.asarray(run(given))
    assert np.isfinite(bias).all()
    np.testing.assert_allclose(bias[:, 2], bias[0, 2])  # an empty class is told by zero-shot alone
    lone = dataclasses.replace(given, labels=np.array([0, 1, 2, -1, -1], np.int32))
    np.testing.assert_array_equal(run(lone), 0)
    with pytest.raises(ValueError, match="estimate GDA's covariance, got one of each"):
        method.init(lone)


def test_proker_is_one_system_a_setting_and_one_program():
    rng = np.random.default_rng(1)
    f = rng.normal(size=(8, 5))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    y = np.array([0, 1, 2, 0, 1, 2, -1, 0], np.int32)
    w = f[:3].T
    images = inputs(f, weights=w)
    given = few_shot.FewShotTask(support=images, labels=y, class_weights=w)

    @jax.jit
    def run(given, penalty):
        def one(penalty):
            method = methods.ProKeR(penalty=penalty)
            return method.bias(method.init(given), given.support)

        return jax.vmap(one)(penalty)

    penalties = np.array([0.01, 0.25])
    with jax.enable_x64(True):
        biases = np.asarray(run(given, penalties))
    here = y >= 0
    kernel = np.exp(-3 * (1 - f @ f[here].T))
    rest = np.eye(3)[y[here]] - f[here] @ w
    for bias, penalty in zip(biases, penalties, strict=True):
        alpha = np.linalg.solve(kernel[here] / penalty + np.eye(here.sum()), rest)
        np.testing.assert_allclose(bias, 100 * kernel @ alpha, rtol=1e-9)


def test_rehark_and_transclip_equal_a_transcript_of_their_released_code():
    """By loops over pictures and classes, in float64; the released code itself gives 1.5e-6."""
    rng = np.random.default_rng(0)
    w, f, q = (unit_rows(rng.normal(size=(n, 6))) for n in (3, 9, 20))
    y = np.arange(9, dtype=np.int32) % 3
    # The last row is padding.
    padded, labels = np.concatenate([f, f[:1]]), np.append(y, np.int32(-1))
    given = few_shot.FewShotTask(
        support=inputs(padded, weights=w.T), labels=labels, class_weights=w.T
    )
    method = methods.ReHARK(mix=0.4, penalty=0.1, text=6.0, refine=0.3, bridge=0.7)

    @jax.jit
    def run(given, query):
        logits = method.logits(method.init(given), query)
        return logits, few_shot.transduce(query.zero_shot / 10, query.features, rounds=3)

    with jax.enable_x64(True):
        logits, together = jax.device_get(run(given, inputs(q, weights=w.T)))

    shaped = [unit_rows(np.sign(x) * np.abs(x) ** 0.8) for x in (w, f, q)]
    means = unit_rows(np.stack([shaped[1][y == k].mean(0) for k in range(3)]))
    prior = unit_rows(0.7 * shaped[0] + 0.3 * means)
    keys = np.concatenate([shaped[1], unit_rows(shaped[1] + 0.7 * prior[y])])

    def kernel(a, b):
        squares = np.square(a[:, None] - b).sum(-1)
        return 0.4 * np.exp(-5 * squares) + 0.6 * np.exp(-0.5 * squares)

    rest = np.eye(3)[np.tile(y, 2)] - 6 * keys @ prior.T
    alpha = np.linalg.solve(kernel(keys, keys) + 0.1 * np.eye(18), rest)
    expected = 6 * shaped[2] @ prior.T + kernel(shaped[2], keys) @ alpha
    np.testing.assert_allclose(logits, 100 / 6 * expected, rtol=1e-8)

    prior = z = oracle.softmax(10 * q @ w.T)
    cosines = q @ q.T
    near = np.argsort(-cosines, 1)[:, 1:4]
    weights = np.zeros((20, 20))
    for i in range(20):
        weights[i, near[i]] = cosines[i, near[i]]
    surest = np.argsort(-z, 0)[:8]
    mu = unit_rows(
        np.stack([(z[surest[:, k], k, None] * q[surest[:, k]]).mean(0) for k in range(3)])
    )
    variance = np.full(6, 1 / 6)
    for number in range(4):
        fit = -np.square(q[:, None] - mu) @ (1 / variance) / 2
        for _ in range(5):
            z = prior * np.exp((fit + 50 / 6 * (weights.T @ z + weights @ z)) / 50)
            z /= z.sum(1, keepdims=True)
        if number < 3:
            mu = unit_rows(z.T @ q)
            variance = (z[..., None] * np.square(q[:, None] - mu)).sum((0, 1)) / 20
    np.testing.assert_allclose(np.exp(together), z, atol=1e-8)
    with pytest.raises(Exception, match="features"):
        few_shot.transduce(np.zeros((3, 2)), np.zeros((4, 2)))


def test_timo_weighs_texts_by_hand_and_is_gda_of_pictures_and_texts():
    # Of the paper's card: v = (.9, .3) / |.|, three texts.
    texts = np.array([[[1, 0], [0.8, 0.6], [0.6, 0.8]], [[0, 1], [0.6, 0.8], [0.8, 0.6]]])

    @jax.jit
    def run(given, kept, query):
        every = methods.TIMO().init(given)
        few = methods.TIMO(kept=kept)
        state = few.init(given)
        return every.trained, state.trained, few.logits(state, query)

    with jax.enable_x64(True):
        every, few, logits = jax.device_get(run(task(texts=texts), 0.8, inputs(Q)))
    np.testing.assert_allclose(every["guided"][0], [0.946979, 0.321297], atol=1e-6)
    match = np.array([0.948683, 0.948683, 0.822192])
    # .8 of the way from one to six, so five: the best two, which are as good, count twice.
    for chosen, learnt in (((0, 1, 2), every), ((0, 1, 2, 0, 1), few)):
        chosen = list(chosen)
        taught = np.concatenate([t[chosen] * match[chosen, None] for t in texts] + [F])
        labels = np.concatenate([np.repeat([0, 1], len(chosen)), Y])
        kernel, bias = gaussian_oracle(taught, labels, 2)
        np.testing.assert_allclose(learnt["kernel"], kernel, atol=1e-4)
        np.testing.assert_allclose(learnt["bias"], bias, atol=1e-4)
    expected = 10 * Q @ few["guided"].T + Q @ few["kernel"] + few["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def test_pictures_in_their_order_are_scored_with_caches_that_hold_them_already():
    f, classes = unit_rows(np.random.default_rng(0).normal(size=(30, 4))), 3
    logits = 3 * f[:, :classes]
    adapted = np.asarray(few_shot.adapt_online(logits, f, shots=2))
    kept, off = {}, {}
    for row, (feature, score) in enumerate(zip(f, logits)):
        p = oracle.softmax(score)
        entropy = -(p * np.log(p)).sum()

        k = int(score.argmax())

        def put(cache, most, item, k=k, entropy=entropy):
            entries = cache.setdefault(k, [])
            if len(entries) < most:
                entries.append((entropy, item))
            elif entropy < entries[-1][0]:
                entries[-1] = (entropy, item)
            entries.sort(key=lambda one: one[0])

        put(kept, 2, feature)
        # Nats over bits, as released.
        if 0.2 < entropy / np.log2(classes) < 0.5:
            put(off, 2, (feature, (p > 0.03) & (p < 1)))
        expected = score.copy()
        for k, entries in kept.items():
            expected[k] += 2 * sum(np.exp(-5 * (1 - feature @ g)) for _, g in entries)
        for entries in off.values():
            for _, (g, named) in entries:
                expected -= 0.117 * np.exp(-(1 - feature @ g)) * named
        np.testing.assert_allclose(adapted[row], expected, atol=2e-5)
    assert off


def test_the_rate_of_clap_waits_an_epoch_and_falls_by_epochs():
    recipe = few_shot.Recipe(
        epochs=3,
        learning_rate=0.1,
        weight_decay=0.0,
        algorithm="sgd",
        b1=0.0,
        first_epoch_rate=1e-5,
    )
    tx, rates = recipe.optimizer(6), []
    state = tx.init(np.ones(()))
    for _ in range(6):
        step, state = tx.update(np.ones(()), state, np.ones(()))
        rates.append(-float(step))
    np.testing.assert_allclose(rates, np.repeat([1e-5, 0.1, 0.075], 2), rtol=1e-5)


def test_prolip_of_texts_starts_at_their_mean_and_its_penalty_is_one_over_the_shots():
    texts, start = np.array([[[2.0, 0], [0, 1]], [[0, 1], [0, 3]]]), np.eye(2)

    @jax.jit
    def run(given):
        lip = methods.ProLIPText(scale=10.0)
        state = lip.init(given)
        moved = state._replace(trained=start + np.array([[0, 1], [0, 0]]))
        return state.fixed[1], lip.logits(state, given.support), lip.loss(moved, given.support, Y)

    with jax.enable_x64(True):
        penalty, logits, loss = jax.device_get(run(task(texts=texts, text_projection=start)))
    assert penalty == 0.5
    np.testing.assert_allclose(logits, 10 * F @ unit_rows(texts.mean(1)).T, atol=1e-9)
    p = oracle.softmax(10 * F @ unit_rows(texts.mean(1) @ [[1, 1], [0, 1]]).T)
    np.testing.assert_allclose(loss, -np.log(p[np.arange(4), Y]) + 0.5, atol=1e-9)
