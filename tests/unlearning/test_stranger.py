"""A method from a file outside of the package: named by a flag, trained, and refused if it lies."""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax import unlearning
from logitjax.commands import cli, unlearn
from logitjax.models import load_model, with_layout
from logitjax.unlearning import Method, Need

FILE = '''
import dataclasses
from logitjax import unlearning
from logitjax.unlearning import Need


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softer(unlearning.TwoSided):
    """Gradient ascent whose weight fades."""

    retain: str = "nll"
    beta: float = 1.0

    reads = (Need("forget", "nll"),)

    def forget(self, read):
        ascent = unlearning.METHODS.parse(f"gradient_ascent(beta={self.beta})")
        return ascent.values(read.nll("forget")), read.where("forget")
'''


@pytest.fixture(autouse=True)
def _their_file(tmp_path, monkeypatch):
    (tmp_path / "their_file.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_file", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapped(Method):
    """Another method, told from outside."""

    inner: Method
    left_out: tuple[Need, ...] = ()

    @property
    def needs(self):
        return tuple(need for need in self.inner.needs if need not in self.left_out)

    def state(self):
        return self.inner.state()

    def fixed(self, config, key):
        return None if key is None else self.inner.fixed(config, key)

    def loss(self, read, state):
        return self.inner.loss(read, state)


def setting():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 200, (2, 8)).astype(np.int32)
    side = {"tokens": tokens, "mask": np.arange(8) >= np.array([[3], [5]])}
    other = {**side, "tokens": tokens[::-1].copy()}
    batch = {"forget": side, "retain": other, "instead": other}
    model = with_layout(load_model("tiny:1"), "listed")
    return model, nnx.to_pure_dict(nnx.state(model, nnx.Param)), batch


def test_their_method_is_25_lines_and_named_by_a_flag():
    assert len(FILE.strip().splitlines()) <= 25
    method = unlearning.METHODS.parse("their_file:Softer(beta=0.5)")
    assert (type(method).__name__, method.beta) == ("Softer", 0.5)
    flags = dict(model="m", forget="f", retain="r", method="their_file:Softer(beta=2)")
    assert cli.build(unlearn.Config, flags).settings.method.beta == 2.0
    with pytest.raises(ValueError, match="method dataclasses:field: expected a Method, got Field"):
        unlearning.METHODS.parse("dataclasses:field")


@pytest.mark.slow
@pytest.mark.every_change
def test_theirs_and_wrapped_ones_have_the_values_and_gradients_of_ours_to_the_bit():
    model, params, batch = setting()
    named = map(unlearning.METHODS.parse, ("idk_dpo", "undial", "ce_u", "pdu(bound=1)"))
    pairs: list[tuple[Any, Any]] = [(Wrapped(inner=method), method) for method in named]
    pairs.append(tuple(map(unlearning.METHODS.parse, ("their_file:Softer", "wga"))))

    def losses(methods):
        def total(params):
            return sum(
                m.make_loss(model)[0](m.start(params), batch, None, before)[0] for m in methods
            )

        return total

    before = jax.tree.map(lambda x: 1.01 * x, params)
    wrapped, ours = zip(*pairs)
    a, b = (jax.device_get(jax.jit(jax.value_and_grad(losses(s)))(params)) for s in (wrapped, ours))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("wga", Need("forget", "nll")),
        ("idk_dpo", Need("instead", "nll", True)),
        ("undial", Need("forget", "states", True)),
        ("rmu", Need("retain", "layer")),
        ("pdu(bound=1)", Need("retain", "nll")),
    ],
)
def test_what_is_read_and_not_declared_is_refused_by_name(name, need):
    model, params, batch = setting()
    whole = unlearning.METHODS.parse(name)
    method = Wrapped(inner=whole, left_out=(need,))
    loss_fn, _ = method.make_loss(model, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"Wrapped: expected (Need\(side='\w+', of|a need of)"):
        jax.eval_shape(lambda p: loss_fn(method.start(p), batch, None, p)[0], params)


def test_what_is_declared_and_not_there_is_refused_by_name():
    model, params, batch = setting()
    loss_fn, before = unlearning.METHODS.parse("npo_kl").make_loss(model)
    assert before is not None
    with pytest.raises(ValueError, match="batch: expected the side 'retain', which NPO reads"):
        jax.eval_shape(lambda p: loss_fn(p, {"forget": batch["forget"]}, None, p)[0], params)
    with pytest.raises(ValueError, match="reference: expected the model before, which NPO reads"):
        jax.eval_shape(lambda p: loss_fn(p, batch, None)[0], params)
    rmu = unlearning.METHODS.parse("rmu")
    with pytest.raises(ValueError, match="RMU: key: expected a PRNG key"):
        rmu.make_loss(model)
    loss_fn, _ = Wrapped(inner=rmu).make_loss(model)
    with pytest.raises(ValueError, match="Wrapped: expected arrays of `fixed`, which it reads"):
        jax.eval_shape(lambda p: loss_fn(p, batch, None, p)[0], params)
    with pytest.raises(ValueError, match="Need: side: expected one of forget, instead, retain"):
        Need("past", "nll")
