"""Positions that do not count: every loss with weights or a mask, and its second derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import distillation, losses, ops, unlearning, vq
from logitjax.losses import Blocks, Head
from logitjax.unlearning.assistant._objective import linear_assistant_objective
from tests.unlearning.test_losses import undial

BATCH, LENGTH, WIDTH, VOCAB = 2, 5, 4, 24
# The last block of columns slides back, and the last one of positions is padded.
BLOCKS = Blocks(vocab=10, tokens=3)
COUNTS = np.array([[True, True, False, True, False], [False, True, True, True, True]])


def _inputs() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "hidden": normal(BATCH, LENGTH, WIDTH),
        "teacher_hidden": normal(BATCH, LENGTH, WIDTH + 1),
        "teacher_logits": normal(BATCH, LENGTH, VOCAB),
        "labels": rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
    }


def _heads() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    kernels = {"head": (WIDTH, VOCAB), "teacher_head": (WIDTH + 1, VOCAB)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in kernels.items()}


def _masked(function: Callable[..., Any]) -> Callable[..., Any]:
    def loss(x: Any, hidden: Any, head: Any, where: Any) -> Any:
        return ops.masked_mean(function(x, hidden, head, blocks=BLOCKS), where)

    return loss


def _weighted(function: Callable[..., Any]) -> Callable[..., Any]:
    """By weights and by a mask: nan in one of them would be one in the sum."""

    def loss(x: Any, hidden: Any, head: Any, where: Any) -> Any:
        weights = jnp.where(where, 0.5, 0.0)
        weighted = function(x, hidden, head, weights=weights, blocks=BLOCKS)
        return weighted + _masked(function)(x, hidden, head, where)

    return loss


def _cross_entropy(x: Any, hidden: Any, head: Any, **options: Any) -> Any:
    return losses.linear_cross_entropy(
        hidden, head, x["labels"], label_smoothing=0.1, z_loss=0.01, **options
    )


def _capped(x: Any, hidden: Any, head: Any, **options: Any) -> Any:
    return losses.linear_cross_entropy(hidden, Head(head, soft_cap=3.0), x["labels"], **options)


def _pair(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    def loss(x: Any, hidden: Any, head: Any, **options: Any) -> Any:
        teacher = (x["teacher_hidden"], _heads()["teacher_head"])
        return function(hidden, head, *teacher, **settings, **options)

    return loss


def _sparse(**settings: Any) -> Callable[..., Any]:
    def loss(x: Any, hidden: Any, head: Any, **options: Any) -> Any:
        top = ops.TopK.of(x["teacher_logits"], 3)
        return losses.linear_sparse_kl_divergence(hidden, head, top, **settings, **options)

    return loss


def _undial(x: Any, hidden: Any, head: Any, **options: Any) -> Any:
    teacher = (x["teacher_hidden"], _heads()["teacher_head"])
    method = unlearning.METHODS.parse("undial")
    return method.values(hidden, head, *teacher, x["labels"], **options)


def _fused(x: Any, hidden: Any, head: Any, where: Any) -> Any:
    def loss(readout: Any, teacher: Any) -> Any:
        sparse = losses.sparse_kl_divergence(readout, teacher)
        return readout.cross_entropy + sparse + jnp.log(readout.statistics.std)

    top = ops.TopK.of(x["teacher_logits"], 3)
    arrays = (hidden, head, loss, top, where.astype(jnp.float32))
    options = {"labels": x["labels"], "ids": top.indices, "top_k": 4, "blocks": BLOCKS}
    return losses.linear_fused_loss(*arrays, **options)[0]


def _readout(x: Any, hidden: Any, head: Any, *, blocks: Any) -> Any:
    readout = losses.linear_readout(hidden, head, labels=x["labels"], top_k=4, blocks=blocks)
    return readout.cross_entropy + readout.statistics.std + readout.statistics.values.sum(-1)


def _log_probs(x: Any, hidden: Any, head: Any, *, blocks: Any) -> Any:
    support = jnp.stack([x["labels"], (x["labels"] + 5) % VOCAB], -1).at[:, 0].set(-1)
    options = {"support": support, "entropy": True, "blocks": blocks}
    log_probs = losses.linear_log_probs(hidden, head, x["labels"], **options)
    return log_probs.values - 0.1 * log_probs.entropy


def _assistant(x: Any, hidden: Any, head: Any, where: Any) -> Any:
    retain = jnp.arange(LENGTH) % 2 == jnp.zeros((BATCH, 1), jnp.int32)
    options = {"where": where, "blocks": BLOCKS}
    total, means = linear_assistant_objective(hidden, head, x["labels"], retain, **options)
    return total + means["forget"] + means["retain"]


def _vq(x: Any, hidden: Any, head: Any, where: Any) -> Any:
    codebook, bias, codes = head[:, :5].T, head[0], jnp.arange(VOCAB) % 5
    return ops.masked_mean(vq.vq_nll(hidden, codebook, bias, codes, x["labels"]), where)


def _graph(**settings: Any) -> Callable[..., Any]:
    config = distillation.terms.GLD(k=3, **settings)

    def loss(x: Any, hidden: Any, head: Any, where: Any) -> Any:
        masks = {"student_where": where, "teacher_where": where}
        sides = (hidden, x["teacher_logits"])
        return distillation.graph_on_logits(*sides, config=config, **masks)[0].sum()

    return loss


POSITIONED: dict[str, Callable[..., Any]] = {
    "linear_cross_entropy": _cross_entropy,
    "linear_cross_entropy, soft cap": _capped,
    "linear_kl_divergence": _pair(losses.linear_kl_divergence, temperature=2.0),
    "linear_kl_divergence, reverse": _pair(losses.linear_kl_divergence, direction="reverse"),
    "linear_generalized_jensen_shannon": _pair(losses.linear_generalized_jensen_shannon),
    "linear_sparse_kl_divergence": _sparse(),
    "linear_sparse_kl_divergence, renormalize": _sparse(tail="renormalize", temperature=2.0),
    "linear_undial": _undial,
}
LOSSES: dict[str, Callable[..., Any]] = {
    **{name: _weighted(loss) for name, loss in POSITIONED.items()},
    "linear_readout, masked_mean": _masked(_readout),
    "linear_log_probs, masked_mean": _masked(_log_probs),
    "linear_fused_loss, weights": _fused,
    "linear_assistant_objective, where": _assistant,
    "vq_nll, masked_mean": _vq,
}
# These take logits in the place of hidden states, and no head.
OF_LOGITS: dict[str, Callable[..., Any]] = {
    "graph_on_logits, where": _graph(),
    "graph_on_logits, token nodes, where": _graph(node="token", compare="sorted_coupling"),
}


def _poisoned(inputs: dict[str, Any], number: float) -> dict[str, Any]:
    """The same inputs with a number where nothing counts, and labels that no vocabulary has."""
    return {
        name: np.where(COUNTS, x, np.int32(-100 if number < 0 else 10**6))
        if name == "labels"
        else np.where(COUNTS[..., None], x, np.float32(number))
        for name, x in inputs.items()
    }


def _often(names: Any) -> list[Any]:
    """The nightly run takes those, too, whose statistics others of these have."""
    return [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in names
    ]


LIKE_OTHERS = {
    "linear_kl_divergence",
    "linear_sparse_kl_divergence, renormalize",
    "linear_cross_entropy, soft cap",
    "linear_undial",
}


@pytest.mark.parametrize("name", _often(LOSSES))
def test_a_position_that_does_not_count_changes_no_value_and_no_gradient(name):
    def of(hidden: Any, head: Any, inputs: Any) -> Any:
        return LOSSES[name](inputs, hidden, head, jnp.asarray(COUNTS))

    evaluate = jax.jit(jax.value_and_grad(of, (0, 1)))
    clean, head = _inputs(), _heads()["head"]
    expected = evaluate(clean["hidden"], head, clean)
    assert np.isfinite(jax.tree.leaves(expected)[0])
    for number in (np.nan, np.inf, -np.inf):
        inputs = _poisoned(clean, number)
        poisoned = evaluate(inputs["hidden"], head, inputs)
        for one, other in zip(jax.tree.leaves(poisoned), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"{name} with {number}")
    for key, array in clean.items():
        wrong = VOCAB if key == "labels" else np.nan
        inputs = clean | {key: array.copy()}
        inputs[key][0, 0] = wrong
        value, _ = evaluate(inputs["hidden"], head, inputs)
        # What counts is seen, or it is not read: `expected` is to the last bit.
        assert not np.isfinite(value) or value == expected[0], f"{name} without {key}"
        assert key != "hidden" or np.isnan(value), name


@pytest.mark.parametrize("name", _often(OF_LOGITS))
def test_logits_that_do_not_count_change_no_value_and_no_gradient(name):
    def of(logits: Any, inputs: Any) -> Any:
        return OF_LOGITS[name](inputs, logits, None, jnp.asarray(COUNTS))

    evaluate = jax.jit(jax.value_and_grad(of))
    clean = _inputs()
    clean["logits"] = clean["hidden"] @ _heads()["head"]
    expected = evaluate(clean["logits"], clean)
    assert np.isfinite(expected[0])
    for number in (np.nan, np.inf, -np.inf):
        inputs = _poisoned(clean, number)
        poisoned = evaluate(inputs["logits"], inputs)
        for one, other in zip(poisoned, expected, strict=True):
            # A sum about another origin where one of the logits is not finite: rounding.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=str(number))


# Dense losses of the same arrays, for what has to be equal to them.
DENSE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear_cross_entropy": (
        _cross_entropy,
        lambda x, z, before, where: losses.cross_entropy(
            z, x["labels"], label_smoothing=0.1, z_loss=0.01, vocab_where=where
        ),
    ),
    "linear_kl_divergence, reverse": (
        _pair(losses.linear_kl_divergence, direction="reverse"),
        lambda x, z, before, where: losses.kl_divergence(
            z, before, direction="reverse", vocab_where=where
        ),
    ),
    "linear_generalized_jensen_shannon": (
        _pair(losses.linear_generalized_jensen_shannon),
        lambda x, z, before, where: losses.generalized_jensen_shannon(z, before, vocab_where=where),
    ),
    "linear_undial": (
        _undial,
        lambda x, z, before, where: undial(
            *(jnp.where(where, logits, -jnp.inf) for logits in (z, before)), x["labels"]
        ),
    ),
}


@pytest.mark.parametrize("name", _often(DENSE))
def test_second_derivatives_of_blocked_losses_are_those_of_dense_ones(name):
    blocked, dense = DENSE[name]
    x, kernels = _inputs(), _heads()
    exists = jnp.arange(VOCAB) != 7
    x["labels"] = jnp.where(x["labels"] == 7, 8, x["labels"])
    before = x["teacher_hidden"] @ kernels["teacher_head"]
    weights = jnp.asarray(np.random.default_rng(2).uniform(size=COUNTS.shape), jnp.float32)

    def products(loss: Callable[..., Any]) -> Any:
        # The square: what depends on the value has to see its derivative, too.
        def scalar(hidden: Any, kernel: Any) -> Any:
            return jnp.square((weights * loss(hidden, kernel)).sum())

        def along(hidden: Any, kernel: Any) -> Any:
            by_hidden, by_kernel = jax.grad(scalar, (0, 1))(hidden, kernel)
            return jnp.vdot(by_hidden, jnp.cos(hidden)) + jnp.vdot(by_kernel, jnp.sin(kernel))

        return jax.jit(jax.grad(along, (0, 1)))(x["hidden"], kernels["head"])

    def of_head(hidden: Any, kernel: Any) -> Any:
        head = Head(kernel, soft_cap=2.0)
        return blocked(x, hidden, head, vocab_where=exists, blocks=BLOCKS)

    def of_logits(hidden: Any, kernel: Any) -> Any:
        return dense(x, Head(kernel, soft_cap=2.0).logits(hidden), before, exists)

    for one, other in zip(products(of_head), products(of_logits), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3 * float(jnp.abs(other).max()))


def test_a_third_in_float64_is_no_third_in_float32():
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        student, teacher = rng.normal(size=(2, LENGTH, WIDTH)), rng.normal(size=(2, WIDTH, VOCAB))
        sides = (student[0], teacher[0], student[1], teacher[1])

        @jax.jit
        def both(a, b, c, d):
            return (
                losses.linear_kl_divergence(a, b, c, d, temperature=3.0),
                losses.kl_divergence(a @ b, c @ d, temperature=3.0),
            )

        linear, dense = both(*sides)
        assert linear.dtype == np.float64
        np.testing.assert_allclose(linear, dense, rtol=1e-12, atol=1e-14)
