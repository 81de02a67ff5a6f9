import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.losses import cross_entropy
from logitjax.vq import vq_logits, vq_nll
from logitjax.vq._loss import cluster_log_mass
from tests._compiled import compiled

VOCAB, CODES, WIDTH, COUNT = 203, 16, 8, 24

nll_of, logits_of = compiled(vq_nll), compiled(vq_logits)


def _case(dtype=np.float32, *, seed=0):
    rng = np.random.default_rng(seed)
    assignment = rng.integers(0, CODES - 1, VOCAB)  # the last cluster is empty
    return dict(
        hidden=rng.normal(size=(COUNT, WIDTH)).astype(dtype),
        codebook=rng.normal(size=(CODES, WIDTH)).astype(dtype),
        bias=rng.normal(size=VOCAB).astype(dtype),
        assignment=assignment.astype(np.int32),
        labels=rng.integers(0, VOCAB, COUNT).astype(np.int32),
    )


def _scattered(hidden, codebook, bias, assignment, labels, where=None, z_loss=0.0, **options):
    """The definition: V logits, then a plain cross-entropy."""
    logits = vq_logits(hidden, codebook, bias, assignment, vocab_where=where, **options)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0] + z_loss * log_z**2


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "z_loss": 1e-2}], ids=["plain", "temperature and z-loss"]
)
def test_loss_and_gradients_equal_the_scattered_reference(options):
    with jax.enable_x64(True):
        case = _case(np.float64)

        def total(fn):
            return lambda h, c, b: fn(h, c, b, case["assignment"], case["labels"], **options).sum()

        arguments = [case[name] for name in ("hidden", "codebook", "bias")]
        steps = [jax.value_and_grad(total(fn), (0, 1, 2)) for fn in (vq_nll, _scattered)]
        both = jax.jit(lambda *x: [step(*x) for step in steps])
        (value, grads), (want, want_grads) = both(*arguments)
        np.testing.assert_allclose(value, want, rtol=1e-12)
        for got, reference in zip(grads, want_grads):
            np.testing.assert_allclose(got, reference, rtol=1e-12, atol=1e-12)


def test_logits_are_a_look_up_of_the_scores():
    case = _case()
    got = logits_of(case["hidden"], case["codebook"], case["bias"], case["assignment"])
    want = (case["hidden"] @ case["codebook"].T)[:, case["assignment"]] + case["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_without_bias_equal_logits_share_the_cluster_s_mass():
    case = _case()
    nll = nll_of(case["hidden"], case["codebook"], None, case["assignment"], case["labels"])
    sizes = np.bincount(case["assignment"], minlength=CODES)
    scores = case["hidden"] @ case["codebook"].T
    z = np.log((sizes * np.exp(scores)).sum(-1))
    want = z - np.take_along_axis(scores, case["assignment"][case["labels"]][:, None], 1)[:, 0]
    np.testing.assert_allclose(nll, want, rtol=1e-5)


def test_as_many_codes_as_tokens_is_the_full_softmax():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(50, WIDTH)).astype(np.float32)
    case = _case()
    order = rng.permutation(50).astype(np.int32)
    labels = case["labels"] % 50
    bias = case["bias"][:50]
    got = nll_of(case["hidden"], rows[np.argsort(order)], bias, order, labels)
    want = compiled(cross_entropy)(case["hidden"] @ rows.T + bias, labels)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_one_code_is_the_unigram_whatever_the_context():
    case = _case()
    log_unigram = case["bias"] - np.log(np.exp(case["bias"]).sum())
    got = nll_of(
        case["hidden"], case["codebook"][:1], case["bias"], 0 * case["assignment"], case["labels"]
    )
    np.testing.assert_allclose(got, -log_unigram[case["labels"]], rtol=1e-5)


def test_excluded_tokens_and_empty_clusters_leave_no_nan():
    case = _case()
    where = np.ones(VOCAB, bool)
    where[case["assignment"] == 3] = False  # a cluster with nothing left in it
    labels = np.where(where[case["labels"]], case["labels"], np.flatnonzero(where)[0])
    args = (case["hidden"], case["codebook"], case["bias"], case["assignment"], labels)

    def total(h, c, b):
        return vq_nll(h, c, b, case["assignment"], labels, vocab_where=where).sum()

    value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    value, grads = jax.device_get(value_and_grad(*args[:3]))
    want = np.asarray(jax.jit(_scattered)(*args, where=where)).sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[2])[~where].any()
    np.testing.assert_array_equal(grads[1][-1], 0.0)
    minus_infinity = np.where(where, case["bias"], -np.inf)
    _, grads = value_and_grad(args[0], args[1], minus_infinity)
    assert all(np.isfinite(g).all() for g in grads)


def test_bfloat16_is_summed_in_float32():
    case = _case()
    low = [case[name].astype(jnp.bfloat16) for name in ("hidden", "codebook", "bias")]
    got = nll_of(*low, case["assignment"], case["labels"])
    assert got.dtype == jnp.float32
    exact = [x.astype(np.float32) for x in low]
    want = nll_of(*exact, case["assignment"], case["labels"])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_log_mass_survives_large_biases():
    bias = np.float32([1000.0, 1000.0, -1000.0, -np.inf])
    got = compiled(cluster_log_mass)(bias, np.array([0, 0, 1, 2]), 4)
    np.testing.assert_allclose(got, [1000 + np.log(2), -1000, -np.inf, -np.inf], rtol=1e-6)


@functools.cache
def _local_step():
    """The summed loss on one device, and its gradients in codebook and biases."""
    case = _case()

    def total(codebook, bias):
        return vq_nll(**case | {"codebook": codebook, "bias": bias}).sum()

    run = jax.jit(jax.value_and_grad(total, (0, 1)))
    return jax.device_get(run(case["codebook"], case["bias"]))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize("spec", [P(), P("tensor")], ids=["replicated", "split codebook"])
def test_sharded_equals_local(kind, spec):
    if kind == AxisType.Explicit and spec != P():
        pytest.skip("a split codebook on Explicit axes goes through shard_map")
    case = _case()
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    where = dict(hidden=P("data"), codebook=spec, bias=P(), assignment=P(), labels=P("data"))
    with jax.set_mesh(mesh):
        placed = {k: jax.device_put(case[k], NamedSharding(mesh, where[k])) for k in case}

        def total(codebook, bias):
            return vq_nll(**placed | {"codebook": codebook, "bias": bias}).sum()

        value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(
            placed["codebook"], placed["bias"]
        )
        value, grads = jax.device_get((value, grads))
    want, want_grads = _local_step()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, reference in zip(grads, want_grads):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-5)


def test_errors_name_the_argument():
    case = _case()
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        vq_nll(**case, temperature=0.0)


def test_labels_outside_the_vocabulary_have_no_loss():
    case = _case()
    labels = case["labels"].copy()
    labels[:2] = -100, VOCAB
    nll = nll_of(case["hidden"], case["codebook"], case["bias"], case["assignment"], labels)
    np.testing.assert_array_equal(np.isnan(nll), np.arange(COUNT) < 2)
