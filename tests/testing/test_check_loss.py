"""A loss that is wrong in one way is caught, and the message says in which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.testing import check_loss

ROWS, VOCAB = 4, 7
STUDENT, TEACHER = np.random.default_rng(0).normal(size=(2, ROWS, VOCAB)).astype(np.float32)
PAIR = {"student": STUDENT, "teacher": TEACHER}
LABELLED = {"student": STUDENT, "labels": np.array([0, 3, 6, 2], np.int32)}
MASKED = {**PAIR, "where": np.array([True, False, True, True])}


def log_softmax(x):
    return jax.nn.log_softmax(jnp.asarray(x, jnp.float32))


def divergence(student, teacher):
    """A right one, in the lines of a stranger."""
    exists = jnp.asarray(teacher) > -jnp.inf
    ours, log_p = (
        log_softmax(student),
        log_softmax(jnp.where(jnp.isnan(teacher), jnp.nan, teacher)),
    )
    gap = jnp.where(exists | jnp.isnan(log_p), log_p - ours, 0.0)
    return (jnp.exp(log_p) * gap).sum(-1)


def entropy_of(label_of):
    def loss(student, labels):
        chosen = label_of(labels)
        return -jnp.where(
            jnp.arange(student.shape[-1]) == chosen[:, None], log_softmax(student), 0.0
        ).sum(-1)

    return loss


@jax.custom_vjp
def scaled(x):
    return x


scaled.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.ones_like(cotangent),))
halved = jax.custom_vjp(lambda x: x)
halved.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent / 2,))


def masked(student, teacher, where):
    return jnp.where(where, divergence(student, teacher), 0.0)


def branching(student, teacher):
    return divergence(student, teacher) if student[0, 0] > 0 else divergence(teacher, student)


def remembering(student, teacher):
    CALLS.append(0)
    return divergence(student, teacher) + len(CALLS)


CALLS = []
WRONG = {
    "reduces over the batch": (
        lambda student, teacher: divergence(student, teacher).mean(),
        PAIR,
        "shape: result beside student: expected one number a row of (4,), got shape ()",
    ),
    "keeps the vocabulary": (
        lambda student, teacher: student - teacher,
        PAIR,
        "shape: result beside student: expected one number a row of (4,), got shape (4, 7)",
    ),
    "a branch on values": (branching, PAIR, "jit: TracerBoolConversionError: "),
    "state": (remembering, PAIR, "jit: value: expected "),
    "a result in bfloat16": (
        lambda student, teacher: divergence(student, teacher).astype(student.dtype),
        PAIR,
        "bfloat16: result: expected float32, got bfloat16",
    ),
    "sums in bfloat16": (
        lambda student, teacher: (
            jax.nn.log_softmax(student).max(-1).astype(jnp.float32) + divergence(student, teacher)
        ),
        PAIR,
        "bfloat16: value: expected ",
    ),
    "nan at -inf": (
        lambda student, teacher: (
            jnp.exp(log_softmax(teacher)) * (log_softmax(teacher) - log_softmax(student))
        ).sum(-1),
        PAIR,
        "padding: value: expected ",
    ),
    "nan at -inf in the gradient": (
        lambda student, teacher: (
            divergence(student, teacher)
            + jnp.where(student > -jnp.inf, jnp.exp(log_softmax(student)) * student, 0.0).sum(-1)
        ),
        PAIR,
        "padding: gradient of student: expected ",
    ),
    "a size of the vocabulary": (
        lambda student, teacher: divergence(student, teacher) / student.shape[-1],
        PAIR,
        "padding: value: expected ",
    ),
    "hides a nan": (
        lambda student, teacher: divergence(jnp.nan_to_num(student, nan=0.0), teacher),
        PAIR,
        "nan: student: expected nan in the value for a nan, got none",
    ),
    "a label cut off": (
        entropy_of(lambda labels: jnp.clip(labels, 0, VOCAB - 1)),
        LABELLED,
        "labels: labels: expected nan for 7 of 7, got ",
    ),
    "a gradient without its mask": (
        masked,
        MASKED,
        "where: gradient of student: expected 0, got nan at (1, 0)",
    ),
    "no mask at all": (
        lambda student, teacher, where: divergence(student, teacher),
        MASKED,
        "where: value: expected ",
    ),
    "sees other rows": (
        lambda student, teacher: (
            divergence(student, teacher) + jnp.tanh(divergence(student, teacher)).mean()
        ),
        PAIR,
        "rows: value of another: expected ",
    ),
    "pays for the next row": (
        lambda student, teacher: divergence(student, teacher) + jnp.append(student[1:, 0], 0.0),
        PAIR,
        "rows: value of another: expected ",
    ),
    "drops the cotangent": (
        lambda student, teacher: scaled(divergence(student, teacher)),
        PAIR,
        "cotangent: gradient of student: expected ",
    ),
    "half of the gradient": (
        lambda student, teacher: divergence(halved(student), teacher),
        PAIR,
        "differences: gradient of student: expected a slope of ",
    ),
    "a teacher that learns": (
        divergence,
        PAIR,
        "differences: gradient of teacher: expected 0, got ",
    ),
}
OPTIONS = {"a teacher that learns": {"constant": ("teacher",)}}


def check(fn, arrays, **options):
    labels = {"labels": VOCAB} if "labels" in arrays else {}
    where = "where" if "where" in arrays else None
    logits = [name for name in ("student", "teacher") if name in arrays]
    check_loss(fn, arrays, logits=logits, labels=labels, where=where, **options)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_is_caught_by_what_is_wrong_with_it(name):
    fn, arrays, message = WRONG[name]
    # Operation by operation each has programs of its own.
    skip = ("infinity",) if message.startswith("jit") else ("infinity", "jit")
    with pytest.raises(AssertionError) as caught:
        check(fn, arrays, skip=skip, **OPTIONS.get(name, {}))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_right_loss_passes():
    check(divergence, PAIR, skip=("infinity",))
