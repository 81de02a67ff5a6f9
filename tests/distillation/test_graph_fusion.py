"""`graph_fusion_objective` is the stated sum of its parts, whatever form its inputs come in."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from logitjax import distillation, losses
from logitjax.distillation import (
    FusionTeacher,
    GraphConfig,
    GraphFusionConfig,
    graph_fusion_objective,
    graph_on_logits,
)
from logitjax.losses import cross_entropy
from tests._compiled import compiled

CONFIG = GraphFusionConfig(mix=0.3, uld_weight=2.0, gld_weight=0.5, graph=GraphConfig(k=4))


def data():
    rng = np.random.default_rng(0)
    student = 2 * rng.normal(size=(2, 8, 40)).astype(np.float32)
    labels = rng.integers(0, 40, size=(2, 8)).astype(np.int32)
    teachers = [2 * rng.normal(size=(2, t, v)).astype(np.float32) for t, v in ((6, 48), (8, 32))]
    wheres = [rng.random((2, t)) < 0.7 for t in (8, 6, 8)]
    return student, labels, teachers, wheres


objective = compiled(graph_fusion_objective)
graph_statistics = compiled(losses.graph_statistics)


def pack(teachers, wheres, weights=(1.0, 3.0)):
    return [
        FusionTeacher(outputs=t, where=w, weight=weight)
        for t, w, weight in zip(teachers, wheres, weights)
    ]


def top_probabilities(logits):
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.sort(-p, axis=-1)[:, :4]


def test_is_the_weighted_sum_of_its_parts():
    student, labels, teachers, wheres = data()
    packed = pack(teachers, wheres[1:])
    # A teacher counts once unless it is said how often.
    assert FusionTeacher(outputs=teachers[0]).weight == packed[0].weight
    loss, metrics = jax.device_get(
        objective(student, labels, packed, where=wheres[0], config=CONFIG)
    )
    sft = np.asarray(compiled(cross_entropy)(student, labels))
    graph = functools.partial(compiled(graph_on_logits), config=CONFIG.graph)
    graphs = [
        np.asarray(graph(student, t, student_where=wheres[0], teacher_where=w)[0])
        for t, w in zip(teachers, wheres[1:])
    ]
    for b in range(2):
        valid = wheres[0][b]
        expected = 0.7 * sft[b][valid].mean()
        for i, (share, teacher) in enumerate(zip((0.25, 0.75), teachers)):
            s, t = (
                top_probabilities(student[b][valid]),
                top_probabilities(teacher[b][wheres[1 + i][b]]),
            )
            n = min(len(s), len(t))
            uld = np.abs(s[:n] - t[:n]).sum(-1).mean()
            np.testing.assert_allclose(metrics[f"uld/{i}"][b], uld, rtol=1e-5)
            np.testing.assert_allclose(metrics[f"gld/{i}"][b], graphs[i][b], rtol=1e-5)
            expected += 0.3 * share * (2.0 * uld + 0.5 * graphs[i][b])
        np.testing.assert_allclose(loss[b], expected, rtol=1e-5)
        assert metrics["tokens"][b] == valid.sum()


def test_statistics_and_cross_entropy_stand_in_for_logits():
    student, labels, teachers, wheres = data()

    def from_logits(x):
        loss, _ = graph_fusion_objective(
            x, labels, pack(teachers, wheres[1:]), where=wheres[0], config=CONFIG
        )
        return loss.sum()

    cached = [graph_statistics(t, 6) for t in teachers]

    def from_statistics(x):
        loss, _ = graph_fusion_objective(
            losses.graph_statistics(x, 5),
            None,
            pack(cached, wheres[1:]),
            where=wheres[0],
            config=CONFIG,
            cross_entropy=cross_entropy(x, labels),
        )
        return loss.sum()

    expected, expected_gradient = jax.jit(jax.value_and_grad(from_logits))(student)
    value, gradient = jax.jit(jax.value_and_grad(from_statistics))(student)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_parts_of_weight_zero_are_left_out_and_no_teacher_is_plain_sft():
    student, labels, teachers, wheres = data()
    loss, metrics = objective(student, labels, [], where=wheres[0], config=CONFIG)
    np.testing.assert_allclose(loss, metrics["sft"])
    config = GraphFusionConfig(gld_weight=0.0, uld_top_k=3)
    assert config.k == 3
    packed = pack(teachers, wheres[1:])
    _, metrics = objective(student, labels, packed, where=wheres[0], config=config)
    metrics = jax.device_get(metrics)
    assert "gld/0" not in metrics
    assert (metrics["gld"] == 0).all()
    assert (metrics["uld"] > 0).all()


def test_large_logits_have_a_finite_objective():
    student, labels, teachers, wheres = data()
    packed = pack([1e30 * t for t in teachers], wheres[1:])
    loss, _ = objective(1e30 * student, labels, packed, where=wheres[0], config=CONFIG)
    assert np.isfinite(loss).all()


def test_sharded_vocabulary_and_positions_equal_local():
    student, labels, teachers, wheres = data()
    teacher, where = teachers[1], wheres[0]
    mesh = jax.make_mesh((2, 4), ("seq", "vocab"), axis_types=(AxisType.Auto,) * 2)
    both, positions = PartitionSpec(None, "seq", "vocab"), PartitionSpec(None, "seq")

    def loss(student, labels, teacher, where, **axes):
        return graph_fusion_objective(
            student,
            labels,
            [FusionTeacher(outputs=teacher, where=where)],
            where=where,
            config=CONFIG,
            **axes,
        )[0]

    sharded = jax.shard_map(
        functools.partial(loss, axis_name="vocab", sequence_axis_name="seq"),
        mesh=mesh,
        in_specs=(both, positions, both, positions),
        out_specs=PartitionSpec(),
    )
    results = []
    for f in (loss, sharded):

        def total(s, *rest, f=f):
            return f(s, *rest).sum()

        results.append(jax.jit(jax.value_and_grad(total))(student, labels, teacher, where))
    (expected, expected_gradient), (value, gradient) = results
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_bad_inputs_name_the_culprit():
    student, _, teachers, _ = data()
    few = compiled(graph_statistics)
    with pytest.raises(ValueError, match=r"mix: expected 0 to 1, got 1\.5"):
        GraphFusionConfig(mix=1.5)
    with pytest.raises(ValueError, match="cross_entropy: needed"):
        graph_fusion_objective(few(student, 4), None, [], config=CONFIG)
    with pytest.raises(ValueError, match="hold the top 2 logits, 4 are needed"):
        graph_fusion_objective(
            few(student, 4),
            None,
            [FusionTeacher(outputs=few(teachers[0], 2))],
            config=CONFIG,
            cross_entropy=np.zeros((2, 8), np.float32),
        )


def test_aligned_teacher_is_compared_where_both_count():
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 6, 32)).astype(np.float32)
    where = np.array([[True, True, True, True, True, False]])
    correspond = np.array([[True, False, True, True, False, True]])
    both = np.flatnonzero((where & correspond)[0])
    labels = np.zeros((1, 6), np.int32)
    config = distillation.GraphFusionConfig(mix=1.0)
    aligned, metrics = objective(
        student,
        labels,
        [distillation.FusionTeacher(outputs=teacher, where=correspond, aligned=True)],
        where=where,
        config=config,
    )
    expected, _ = objective(
        student[:, both],
        labels[:, both],
        [distillation.FusionTeacher(outputs=teacher[:, both])],
        config=config,
    )
    np.testing.assert_allclose(aligned, expected, rtol=1e-6)
    assert np.asarray(metrics["tokens"])[0] == 5


def test_aligned_teacher_has_the_students_length():
    student, labels = np.zeros((1, 6, 32), np.float32), np.zeros((1, 6), np.int32)
    outputs = np.zeros((1, 5, 40), np.float32)
    teacher = distillation.FusionTeacher(outputs=outputs, aligned=True)
    with pytest.raises(ValueError, match=r"teachers\[0\]: aligned outputs"):
        objective(student, labels, [teacher])
