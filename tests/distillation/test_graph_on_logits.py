"""`graph_on_logits` and its statistics against a dense float64 oracle; sharded against local."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from logitjax import losses
from logitjax.distillation import graph_on_logits
from logitjax.distillation.terms import GLD
from logitjax.losses import GraphStatistics
from tests._compiled import compiled, values_and_gradient
from tests._marks import EVERY_CHANGE

CONFIGS = [
    GLD(k=4),
    GLD(k=4, feature="off_diagonal", logits="softmax"),
    GLD(k=4, feature="row_rms", logits="raw", compare="sorted_coupling"),
    GLD(k=4, node="token"),
    GLD(k=4, node="token", feature="row_rms"),
    GLD(k=4, node="token", compare="sorted_coupling", logits="softmax"),
]


run, graph_statistics = compiled(graph_on_logits), compiled(losses.graph_statistics)


def loss_of(config):
    def loss(s, t, sw, tw, **axes):
        return graph_on_logits(s, t, config=config, student_where=sw, teacher_where=tw, **axes)[0]

    return loss


@functools.cache
def local(config):
    """The losses of `data()` and the gradient of their sum: one program for several tests."""
    return jax.device_get(values_and_gradient(loss_of(config))(*data()))


def data():
    rng = np.random.default_rng(0)
    student = 3 * rng.normal(size=(2, 8, 40)).astype(np.float32)
    teacher = 3 * rng.normal(size=(2, 6, 48)).astype(np.float32)
    return student, teacher, rng.random((2, 8)) < 0.8, rng.random((2, 6)) < 0.8


def dense_z(logits, where, config, nodes):
    """Rows of Z as [positions, nodes] float64."""
    x = np.asarray(logits, np.float64)
    finite = np.isfinite(x)
    n = finite.sum(-1, keepdims=True)
    mean = np.where(finite, x, 0).sum(-1, keepdims=True) / n
    std = np.sqrt(np.where(finite, x - mean, 0) ** 2).sum(-1, keepdims=True)
    std = np.sqrt((np.where(finite, x - mean, 0) ** 2).sum(-1, keepdims=True) / n)
    z = {
        "standardized": (x - mean) / std,
        "softmax": np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        "raw": x,
    }[config.logits]
    ids = np.argsort(-x, axis=-1, kind="stable")[:, : config.k]
    top = np.take_along_axis(z, ids, -1) * np.asarray(where)[:, None]
    if config.node == "rank":
        return top
    out = np.zeros((len(x), nodes))
    np.put_along_axis(out, ids, top, -1)
    return out


def oracle(student, teacher, student_where, teacher_where, config):
    nodes = config.k if config.node == "rank" else max(student.shape[-1], teacher.shape[-1])
    sides = []
    for logits, where in ((student, student_where), (teacher, teacher_where)):
        z = dense_z(logits, where, config, nodes)
        c = z.T @ z / max(where.sum(), 1)
        f = {
            "row_sum": c.sum(-1),
            "off_diagonal": c.sum(-1) - np.diag(c),
            "row_rms": np.sqrt((c**2).sum(-1) / config.k),
        }[config.feature]
        order = np.argsort(-f, kind="stable")
        sides.append((f[order], c[order][:, order]))
    (f, c), (g, d) = sides
    if config.compare == "sorted_coupling":
        return ((c - d) ** 2).sum() / config.k**2
    return np.abs(f - g).sum() / config.k


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_dense_oracle(config):
    expected = [oracle(*row, config) for row in zip(*data())]
    np.testing.assert_allclose(local(config)[0], expected, rtol=2e-4)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[4], CONFIGS[5]], ids=str)
def test_gradient_equals_finite_differences(config):
    student, teacher, student_where, teacher_where = data()
    _, gradient = local(config)
    direction = np.random.default_rng(1).normal(size=student.shape)
    step = 1e-6

    def value(x):
        masks = (student_where, teacher_where)
        rows = zip(x, teacher, *masks)
        return sum(oracle(*row, config) for row in rows)

    x = student.astype(np.float64)
    slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)


def test_statistics_give_the_same_as_logits_and_may_hold_more():
    student, teacher, student_where, _ = data()
    config = CONFIGS[0]
    whole, _ = run(student, teacher, config=config, student_where=student_where)
    cached, _ = run(
        graph_statistics(student, 6),
        graph_statistics(teacher, 4),
        config=config,
        student_where=student_where,
    )
    np.testing.assert_allclose(whole, cached, rtol=1e-5)
    with pytest.raises(ValueError, match="at most the 3 stored logits, got 4"):
        graph_on_logits(graph_statistics(student, 3), teacher, config=config)


def test_statistics_of_padded_and_masked_vocabulary():
    logits = np.array([[2.0, -np.inf, 5.0, 1.0]], np.float32)
    keep = np.array([True, True, True, False])
    got = graph_statistics(logits, 3, vocab_where=keep)
    np.testing.assert_allclose(got.mean, [3.5])
    np.testing.assert_allclose(got.std, [1.5])
    np.testing.assert_allclose(got.log_z, [np.log(np.exp(2) + np.exp(5))], rtol=1e-6)
    np.testing.assert_array_equal(got.values, [[5.0, 2.0, -np.inf]])
    assert got.vocab_size == 4

    # Of three live entries standardised graphs are alike, without a gradient: more of them.
    rng = np.random.default_rng(0)
    rows, teacher = (rng.normal(size=(3, n)).astype(np.float32) for n in (8, 9))
    rows[:, 1] = -np.inf
    loss = jax.grad(lambda x: graph_on_logits(x, teacher, config=GLD(k=3))[0])
    gradient = np.asarray(jax.jit(loss)(rows))
    assert np.isfinite(gradient).all()
    assert (gradient[:, 1] == 0).all()
    assert np.abs(gradient).sum() > 1


@pytest.mark.parametrize("offset", [0.0, -7.0, 5000.0])
def test_moments_survive_an_offset(offset):
    logits = np.random.default_rng(5).normal(size=(3, 500))
    # The entry about which sums are taken lies above the mean in all rows.
    logits[:, 0] = 4
    logits = (logits + offset).astype(np.float32)
    got = graph_statistics(logits, 4)
    exact = logits.astype(np.float64)
    np.testing.assert_allclose(got.mean, exact.mean(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got.std, exact.std(-1), rtol=1e-4)


def test_logits_up_to_the_largest_of_float32_have_their_graph_and_its_gradient():
    student, teacher, *_ = data()
    loss = values_and_gradient(graph_on_logits_of_k4)
    value, gradient = jax.device_get(loss(student, teacher))
    for power in (64, 100):
        large, small = jax.device_get(loss(student * 2.0**power, teacher * 2.0**power))
        np.testing.assert_allclose(large, value, rtol=1e-5)
        np.testing.assert_allclose(small * 2.0**power, gradient, rtol=1e-4, atol=1e-5)
    # As large as they can be, with a deviation of which one over it is no normal number.
    signs = np.where(student > 0, np.float32(1), np.float32(-1))
    (value, gradient), (large, small) = (loss(signs * x, teacher) for x in (1, np.float32(3e38)))
    np.testing.assert_allclose(large, value, rtol=1e-5)
    np.testing.assert_allclose(small, gradient / np.float32(3e38), atol=np.finfo(np.float32).tiny)


def test_a_head_of_large_logits_has_their_graph_and_its_gradient():
    teacher, rng = data()[1], np.random.default_rng(1)
    hidden, head = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 16), (16, 40)))

    def loss(head):
        blocks = losses.Blocks(vocab=16)
        read = losses.linear_readout(hidden, head, top_k=4, blocks=blocks).statistics
        return graph_on_logits_of_k4(read, teacher)

    run = values_and_gradient(loss)
    (value, gradient), (large, small) = (run(np.float32(x) * head) for x in (1, 2.0**100))
    np.testing.assert_allclose(large, value, rtol=1e-5)
    np.testing.assert_allclose(small * 2.0**100, gradient, rtol=1e-4, atol=1e-5)


def graph_on_logits_of_k4(student, teacher):
    return graph_on_logits(student, teacher, config=CONFIGS[0])[0]


def test_teacher_gets_no_gradient_and_empty_samples_are_zero():
    student, teacher, _, _ = data()
    nothing = np.zeros((2, 8), bool)

    def loss(s, t, where):
        return graph_on_logits(s, t, config=CONFIGS[0], student_where=where)[0].sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    whole = step(student, teacher, np.ones((2, 8), bool))
    value, (gradient, teacher_gradient) = jax.device_get(whole)
    assert value > 0
    assert (teacher_gradient == 0).all()
    value, (gradient, _) = jax.device_get(step(student, teacher, nothing))
    assert value == 0
    assert (gradient == 0).all()


def test_invariances_of_the_graph():
    """Equal graphs give zero; positions may be shuffled, and token ids renamed."""
    student, _, _, _ = data()
    rng = np.random.default_rng(3)
    shuffled = student[:, rng.permutation(8)][:, :, rng.permutation(40)]
    for config in (CONFIGS[0], CONFIGS[3]):
        np.testing.assert_allclose(run(student, student, config=config)[0], 0.0, atol=1e-6)
        np.testing.assert_allclose(run(student, shuffled, config=config)[0], 0.0, atol=2e-5)


def test_many_token_nodes_are_compacted():
    """A vocabulary larger than positions times k gives the value of a scatter into it."""
    rng = np.random.default_rng(4)
    student = 3 * rng.normal(size=(1, 3, 400)).astype(np.float32)
    teacher = 3 * rng.normal(size=(1, 5, 300)).astype(np.float32)
    for config in (CONFIGS[3], CONFIGS[5]):
        loss = np.asarray(run(student, teacher, config=config)[0])
        ones = (np.ones(3, bool), np.ones(5, bool))
        expected = oracle(student[0], teacher[0], *ones, config)
        np.testing.assert_allclose(loss[0], expected, rtol=2e-4)


@pytest.mark.parametrize(
    "config", [CONFIGS[2], pytest.param(CONFIGS[5], marks=EVERY_CHANGE)], ids=str
)
def test_a_student_near_its_teacher_keeps_the_digits_of_the_cost(config):
    """As a difference of squares of C and D nothing was left of it."""
    rng = np.random.default_rng(6)
    student = 3 * rng.normal(size=(1, 8, 40)).astype(np.float32)
    teacher = student + (1e-3 * rng.normal(size=student.shape)).astype(np.float32)
    loss, _ = jax.device_get(run(student, teacher, config=config))
    ones = np.ones(8, bool)
    expected = oracle(student[0], teacher[0], ones, ones, config)
    np.testing.assert_allclose(loss[0], expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"feature": "off_diagonal", "k": 1}, "off the diagonal"),
        ({"k": 0}, "k: expected at least 1"),
    ],
)
def test_settings_that_see_nothing_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        GLD(**options)


def test_bad_inputs_name_the_culprit():
    student, teacher, _, _ = data()
    with pytest.raises(ValueError, match="k=40 keeps the whole vocabulary"):
        run(student, teacher, config=GLD(k=40))
    with pytest.raises(ValueError, match="k: expected 1 to the vocabulary size 40, got 41"):
        run(student, teacher, config=GLD(k=41))
    with pytest.raises(ValueError, match="teacher: expected batch shape"):
        run(graph_statistics(student, 4), graph_statistics(teacher[:1], 4), config=GLD(k=4))


def test_metrics_show_degenerate_settings():
    student, teacher, _, _ = (x[..., :4] for x in data())
    _, metrics = run(student, teacher, config=GLD(k=4, logits="softmax"))
    metrics = jax.device_get(metrics)
    # Z 1 = 1: the row sum is the summed distribution and carries no co-activation.
    np.testing.assert_allclose(metrics["student_row_sum_min"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["student_row_sum_max"], 1.0, rtol=1e-5)
    assert (metrics["moved"] == 0).all()
    assert (metrics["student_rank_one"] > 0.5).all()
    assert (metrics["student_rank_one"] <= 1.0 + 1e-6).all()
    for value in metrics.values():
        assert value.shape == (2,)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=EVERY_CHANGE if i in (1, 2, 3) else [])
        for i, config in enumerate(CONFIGS)
    ],
    ids=str,
)
def test_sharded_equals_local(config):
    """Positions over 2 devices and the vocabulary over 4, value and gradient."""
    mesh = jax.make_mesh((2, 4), ("seq", "vocab"), axis_types=(AxisType.Auto,) * 2)
    both, positions = PartitionSpec(None, "seq", "vocab"), PartitionSpec(None, "seq")
    sharded = jax.shard_map(
        functools.partial(loss_of(config), axis_name="vocab", sequence_axis_name="seq"),
        mesh=mesh,
        in_specs=(both, both, positions, positions),
        out_specs=PartitionSpec(),
    )
    values, gradient = values_and_gradient(sharded)(*data())
    expected, expected_gradient = local(config)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=EVERY_CHANGE)]
)
@pytest.mark.parametrize(
    "config",
    [pytest.param(CONFIGS[0], marks=EVERY_CHANGE), CONFIGS[4]],
    ids=["by rank", "by token"],
)
def test_batch_sharded_on_both_kinds_of_mesh(config, kind):
    inputs = [np.repeat(x, 2, 0) for x in data()]
    expected, expected_gradient = (np.repeat(x, 2, 0) for x in local(config))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        inputs = jax.device_put(inputs, sharding)
        values, gradient = values_and_gradient(loss_of(config))(*inputs)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_statistics_are_a_pytree():
    student, _, _, _ = data()
    statistics = graph_statistics(student, 4)
    assert isinstance(jax.tree.map(lambda x: x, statistics), GraphStatistics)
    of_itself = jax.vmap(lambda s: graph_on_logits(s, s, config=CONFIGS[0])[0])
    np.testing.assert_allclose(jax.jit(of_itself)(statistics), 0.0, atol=1e-6)
    half, _ = run(student.astype(jnp.bfloat16), student, config=CONFIGS[0])
    assert half.dtype == jnp.float32


def test_a_row_of_equal_logits_has_no_spread_and_a_gradient_of_zero():
    def spread(logits):
        return losses.graph_statistics(logits, 2).std.sum()

    value, gradient = jax.jit(jax.value_and_grad(spread))(np.full((1, 4), 3.0, np.float32))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_a_token_that_is_missing_is_one_of_probability_zero():
    student = data()[0][..., :5]
    missing, unlikely = (np.where(np.arange(5) < 3, student, x) for x in (-np.inf, -90.0))
    config = GLD(k=4, logits="softmax")
    loss, metrics = run(missing.astype(np.float32), unlikely.astype(np.float32), config=config)
    np.testing.assert_allclose(loss, [0.0, 0.0], atol=1e-6)
    # Z 1 = 1, so that the row sums of Z^T Z / T are means of the positions' probabilities.
    p = np.exp(student[..., :3])
    largest = (p / p.sum(-1, keepdims=True)).max(-1).mean(-1)
    np.testing.assert_allclose(metrics["student_scale"], largest, rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher_scale"], largest, rtol=1e-5)
