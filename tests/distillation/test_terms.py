"""A stranger's term equals the built-in that it imitates, and needs are what is declared."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses
from logitjax.distillation import Objective, StudentNeeds, Teacher, TeacherNeeds, Term, parse_terms
from logitjax.distillation.terms import KL, SFT, TERMS, ULD, FullKL
from logitjax.losses import sweep
from tests._compiled import compiled

RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(4, 5, 8)), RNG.normal(size=(8, 13))
OTHER, OTHER_HEAD = RNG.normal(size=(2, 4, 5, 6)), RNG.normal(size=(6, 13))
BATCH = {"labels": RNG.integers(0, 13, (4, 5))}
WHERE = np.arange(20).reshape(4, 5) % 4 > 0


@functools.cache
def statistics(number=0):
    return jax.device_get(compiled(losses.graph_statistics)(OTHER[number] @ OTHER_HEAD, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imitation(Term):
    """`KL` as an outside package would write it."""

    name = "imitation"
    teacher = TeacherNeeds(top_k=1, same_vocabulary=True)

    def student(self, teacher):
        return StudentNeeds(ids=teacher.top.indices)

    def value(self, read, teacher, batch, params):
        return losses.sparse_kl_divergence(read.top, teacher.top)


class Undeclared(Imitation):
    """Forgets its teacher."""

    teacher = None


class Unasked(Imitation):
    """Asks the student for nothing but its label."""

    def student(self, teacher):
        return StudentNeeds(label=True)


class Unnamed(Imitation):
    """Reads a column that it does not name."""

    def value(self, read, teacher, batch, params):
        return super().value(read, teacher, batch, params) * batch["rewards"]


class Rewarded(Unnamed):
    """Names it."""

    batch = ("rewards",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPasses(FullKL):
    """Jensen-Shannon, whose statistic cannot share a sweep."""

    name = "js"

    def student(self, teacher):
        return StudentNeeds(statistic=sweep.MixtureStatistic(beta=0.5, weights=(0.5, 0.5)))

    def value(self, read, teacher, batch, params):
        return read.statistic


def value_and_grad(*terms, teachers=None, hidden=HIDDEN, **options):
    teachers = [Teacher(statistics=statistics())] if teachers is None else teachers
    objective = Objective(terms=tuple((term, 1 / (i + 1)) for i, term in enumerate(terms)))

    def loss(hidden, head):
        total, count, metrics = objective.value(
            hidden, head, BATCH, teachers, where=WHERE, **options
        )
        return total / count, metrics

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, HEAD)


@pytest.mark.parametrize("beside", [(), (SFT(),), (ULD(k=3),)])
def test_a_term_of_ones_own_equals_the_built_in_that_it_imitates_to_the_bit(beside):
    (imitated, metrics), gradient = value_and_grad(Imitation(), *beside)
    (built_in, expected), expected_gradient = value_and_grad(KL(), *beside)
    assert imitated == built_in
    assert float(metrics["imitation"][0]) == float(expected["kl"][0]) > 0
    for ours, expected_part in zip(gradient, expected_gradient, strict=True):
        np.testing.assert_array_equal(ours, expected_part)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Undeclared(), "loss 'imitation': reads teacher.top, which it does not declare"),
        (Unasked(), r"loss 'imitation': reads read.top, which it does not declare"),
        (Unnamed(), r"loss 'imitation': reads batch\['rewards'\], which it does not declare"),
        (Rewarded(), r"loss 'imitation': expected batch\['rewards'\], got labels"),
        (FullKL(), "loss 'full_kl': expected a teacher's hidden states and head, got cached"),
        (ULD(k=9), "loss 'uld': expected at least 9 top logits of a teacher, got 4"),
        (TERMS.parse("first_piece"), "loss 'first_piece': expected the projection 'first_piece'"),
        (TERMS.parse("alm"), "loss 'alm': expected chunks"),
    ],
)
def test_a_need_that_nobody_provides_or_declares_is_an_error_and_never_a_zero(term, message):
    with pytest.raises(ValueError, match=message):
        value_and_grad(term)
    if term.teacher is not None:
        with pytest.raises(ValueError, match=f"loss '{term.name}': expected a teacher, got none"):
            Objective(terms=((term, 1.0),)).value(
                HIDDEN, HEAD, BATCH | {"rewards": WHERE}, where=WHERE
            )


def test_the_divergence_of_a_live_teacher_is_that_of_whole_rows():
    live = Teacher(hidden=OTHER[0], head=losses.Head(OTHER_HEAD))
    terms = (SFT(), FullKL(temperature=2.0), FullKL(forward=0.0), TwoPasses())
    (value, metrics), gradient = value_and_grad(*terms, teachers=[live])

    @jax.jit
    def dense(hidden):
        student, teacher = hidden @ HEAD, OTHER[0] @ OTHER_HEAD
        parts = (
            losses.cross_entropy(student, BATCH["labels"]),
            losses.kl_divergence(student, teacher, temperature=2.0),
            losses.kl_divergence(student, teacher, direction="reverse"),
            losses.generalized_jensen_shannon(student, teacher),
        )
        return sum(np.where(WHERE, 1 / (i + 1), 0) * p for i, p in enumerate(parts)).sum()

    expected, slope = jax.value_and_grad(dense)(jnp.asarray(HIDDEN))
    np.testing.assert_allclose(value * WHERE.sum(), expected, rtol=1e-5)
    np.testing.assert_allclose(gradient[0] * WHERE.sum(), slope, rtol=1e-4, atol=1e-6)
    assert set(metrics) == {"sft", "js", *(str(term) for term in terms[1:3])}


def test_a_live_teacher_and_its_cache_say_the_same():
    live = Teacher(hidden=OTHER[0], head=losses.Head(OTHER_HEAD), top_k=4)
    (value, _), _ = value_and_grad(KL(), SFT(), teachers=[live])
    (expected, _), _ = value_and_grad(KL(), SFT())
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole_where_terms_see_different_shares():
    seen = np.array([[False] * 4 + [True], [True] * 5, [False, True] * 2 + [False], [True] * 5])
    teacher = Teacher(statistics=statistics(), where=seen)
    objective = Objective(terms=((ULD(k=3), 1.0), (SFT(), 0.5)))

    @jax.jit
    def run(*batch):
        hidden, columns, teachers, where = batch
        counts = objective.counts(columns, teachers, where=where)
        whole = objective.value(hidden, HEAD, columns, teachers, where=where)[0]
        sums = []
        for shared_counts in (counts, None):
            for i in (0, 2):
                hidden, columns, teachers, where = jax.tree.map(lambda x, i=i: x[i : i + 2], batch)
                part = objective.value(
                    hidden, HEAD, columns, teachers, where=where, counts=shared_counts
                )
                sums.append(part[0])
        return whole, sums[0] + sums[1], sums[2] + sums[3]

    whole, parts, alone = run(HIDDEN, BATCH, [teacher], WHERE)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert abs(alone / whole - 1) > 1e-3


def test_each_row_learns_from_the_teacher_that_it_is_sent_to():
    teachers = [Teacher(statistics=statistics(i)) for i in (0, 1)]
    sent = np.eye(2)[[0, 1, 1, 0]]
    (value, _), _ = value_and_grad(KL(), teachers=teachers, teacher_weights=sent)
    mixed = jax.tree.map(
        lambda a, b: jnp.where((sent[:, 0] > 0).reshape(4, *[1] * (a.ndim - 1)), a, b), *teachers
    )
    (expected, _), _ = value_and_grad(KL(), teachers=[mixed])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"teacher_weights: expected \[2\] or \[rows, 2\], got"):
        value_and_grad(KL(), teachers=teachers, teacher_weights=np.ones(3))


def test_what_does_not_count_is_not_looked_at():
    silent = np.where(WHERE[..., None], HIDDEN, np.nan)
    (value, _), (slope, head) = value_and_grad(KL(), SFT(), ULD(k=3), hidden=silent)
    (expected, _), (expected_slope, expected_head) = value_and_grad(KL(), SFT(), ULD(k=3))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(head, expected_head, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope[WHERE], expected_slope[WHERE], rtol=1e-5, atol=1e-6)
    assert not np.asarray(slope)[~WHERE].any()


def test_flags_name_terms_with_options_and_weights_and_every_term_has_a_line_of_help():
    named = parse_terms(["kl(temperature=2):.5", "alm(temperature=inf)", f"{__name__}:Imitation:2"])
    assert [(str(term), weight) for term, weight in named] == [
        ("kl(temperature=2.0)", 0.5),
        ("alm(temperature=inf)", 1.0),
        ("imitation", 2.0),
    ]
    lines = TERMS.help().splitlines()
    assert len(lines) == len(TERMS.names())
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)
