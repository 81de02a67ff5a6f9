"""Every method of ours keeps what methods promise, and a wrong one is caught by what is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from logitjax.testing import check_method
from logitjax.unlearning import METHODS, Need, TwoSided
from tests._marks import EVERY_CHANGE

# Its adapters are those of fewer layers than the decoder's two.
OPTIONS = {"difference": "difference(layers=1)"}
# Weights of tokens, or the target, are constants for the gradient.
CONSTANTS = ("ce_u", "satimp", "wga")
# A state of its own; an assistant.
OFTEN = ("difference", "pdu")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else EVERY_CHANGE) for n in METHODS.names()]
)
def test_a_method_keeps_what_methods_promise(name):
    skip = ("differences",) if name in CONSTANTS else ()
    check_method(METHODS.parse(OPTIONS.get(name, name)), skip=skip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ascent(TwoSided):
    """Gradient ascent as an outside package would write it."""

    reads = (Need("forget", "nll"),)

    def forget(self, read):
        return -read.nll("forget"), read.where("forget")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fluid(Ascent):
    """Has an option that may be changed."""

    layers: list[int] = dataclasses.field(default_factory=list)


class Forgetful(Ascent):
    """Reads the model before, which it does not declare."""

    def forget(self, read):
        return read.nll("forget", before=True), read.where("forget")


class Lenient(Ascent):
    """Does without a side that it declares."""

    def make_loss(self, model, **options):
        loss_fn, before = super().make_loss(model, **options)

        def lenient(trained, batch, rng, constants=None):
            if not batch:
                return jnp.float32(0), 1, {}
            return loss_fn(trained, batch, rng, constants)

        return lenient, before


class Whole(Ascent):
    """Gives a loss for each token."""

    def loss(self, read, state):
        return read.nll("forget"), {}


class Still(Ascent):
    """Has no gradient."""

    def forget(self, read):
        return jax.lax.stop_gradient(read.nll("forget")), read.where("forget")


class Doubled(Ascent):
    """Has the gradient of another loss."""

    def forget(self, read):
        nll = read.nll("forget")
        return nll + (nll - jax.lax.stop_gradient(nll)), read.where("forget")


class Unmasked(Ascent):
    """Averages over prompts and padding, too."""

    reads = (Need("forget", "layer"),)

    def loss(self, read, state):
        return read.layer("forget").mean(), {}


class Counted(Ascent):
    """Averages over the places where the head is run."""

    reads = (Need("forget", "states"),)

    def loss(self, read, state):
        return read.states("forget").mean(), {}


class Bare(Ascent):
    """Sees whether adapters are trained."""

    def make_loss(self, model, *, adapters=False, **options):
        loss_fn, before = super().make_loss(model, adapters=adapters, **options)

        def other(*arguments):
            loss, count, means = loss_fn(*arguments)
            return loss + adapters, count, means

        return other, before


class Both(Ascent):
    """Trains the model before as well."""

    reads = (Need("forget", "nll"), Need("forget", "nll", before=True))

    def forget(self, read):
        return read.nll("forget") * read.nll("forget", before=True), read.where("forget")


class Idle(Ascent):
    """Has a state that it does not use."""

    def state(self):
        return jnp.float32(1)


OTHERS = ("value", "needs", "loss", "differences", "masks", "counts", "adapters", "before", "state")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Fluid(), "value: TypeError: unhashable type: 'list'"),
        (Lenient(), "needs: forget: expected an error where there is none, got a loss"),
        (Forgetful(), "loss: ValueError: Forgetful: expected Need(side='forget', of='nll', before"),
        (Whole(), "loss: TypeError: "),
        (Still(), "loss: gradient: expected one for the trained arrays, got 0"),
        (Doubled(), "differences: slope: expected "),
        (Unmasked(), "masks: loss with other tokens of forget: expected "),
        (Counted(), "counts: loss: expected "),
        (Bare(), "adapters: loss: expected "),
        (Both(), "before: gradient: expected 0, got another"),
        (Idle(), "state: gradient: expected one of all arrays of its own, got 0"),
    ],
)
def test_a_wrong_method_is_caught_by_what_is_wrong_with_it(method, message):
    skip = {"mesh", *OTHERS} - {message.partition(":")[0]}
    with pytest.raises(AssertionError) as caught:
        check_method(method, skip=skip)
    assert str(caught.value).startswith(message)
