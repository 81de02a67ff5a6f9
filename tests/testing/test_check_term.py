"""Every term of ours keeps what terms promise, and a wrong one is caught by what is wrong."""

import dataclasses

import numpy as np
import pytest

from logitjax import losses
from logitjax.distillation import StudentNeeds, TeacherNeeds, Term
from logitjax.distillation.terms import TERMS
from logitjax.testing import check_term
from tests._marks import EVERY_CHANGE

# It has all that there is: a teacher, arrays of its own, a second head.
OFTEN = ("dual",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else EVERY_CHANGE) for n in TERMS.names()]
)
def test_a_term_keeps_what_terms_promise(name):
    term, skip = TERMS.parse(name), ("jit",)
    log_probs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) - 3
    # The gradient of a policy is not that of its value.
    skip += ("differences",) if term.batch else ()
    check_term(term, skip=skip, batch=dict.fromkeys(term.batch, log_probs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imitation(Term):
    """`KL` as an outside package would write it."""

    name = "imitation"
    teacher = TeacherNeeds(top_k=1, same_vocabulary=True)

    def student(self, teacher):
        return StudentNeeds(ids=teacher.top.indices)

    def value(self, read, teacher, batch, params):
        return losses.sparse_kl_divergence(read.top, teacher.top)


class Forgetful(Imitation):
    """Reads a teacher that it does not declare."""

    teacher = None


class Batched(Imitation):
    """Weighs a position by how many there are."""

    pointwise = False

    def value(self, read, teacher, batch, params):
        return super().value(read, teacher, batch, params) * batch["labels"].size


@dataclasses.dataclass(kw_only=True)
class Fluid(Term):
    """May be changed."""

    def student(self, teacher):
        return StudentNeeds(label=True)

    def value(self, read, teacher, batch, params):
        return read.cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarded(Term):
    """Weighs labels by rewards, and a label without one by none."""

    name = "rewarded"
    batch = ("rewards",)

    def student(self, teacher):
        return StudentNeeds(label=True)

    def value(self, read, teacher, batch, params):
        return read.cross_entropy * batch["rewards"]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Fluid(), "value: Fluid: expected a frozen dataclass, got another class"),
        (Forgetful(), "jit: ValueError: loss 'imitation': reads teacher.top, which it does not"),
        (Batched(), "parts: sum: expected "),
    ],
)
def test_a_wrong_term_is_caught_by_what_is_wrong_with_it(term, message):
    alone = ("jit", "bfloat16", "padding", "vmap", "where", "differences", "mesh", "explicit")
    with pytest.raises(AssertionError) as caught:
        check_term(term, skip=alone)
    assert str(caught.value).startswith(message)


def test_a_column_that_a_term_declares_is_asked_for():
    alone = ("jit", "bfloat16", "padding", "vmap", "differences", "mesh", "explicit", "shards")
    rewards = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    check_term(Rewarded(), batch={"rewards": rewards}, skip=alone)
    with pytest.raises(ValueError, match="batch: expected rewards, which rewarded declares"):
        check_term(Rewarded())
