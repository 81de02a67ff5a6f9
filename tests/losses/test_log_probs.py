"""Log-probabilities of tokens and entropies against dense float64, on one device and on eight."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import losses
from tests._compiled import compiled
from tests.losses.test_pallas import _tpu_mesh

BATCH, LENGTH, HIDDEN, VOCAB = 8, 5, 16, 8 * 37
CAP, TEMPERATURE = 4.0, 1.7
BLOCKS = losses.Blocks(vocab=24, tokens=2)
WHERE = np.arange(VOCAB) % 7 != 3


def _case():
    rng = np.random.default_rng(0)
    hidden, bias = rng.normal(size=(BATCH, LENGTH, HIDDEN)), rng.normal(size=VOCAB)
    head = rng.normal(size=(VOCAB, HIDDEN), scale=0.5)
    tokens = rng.choice(np.flatnonzero(WHERE), (BATCH, LENGTH))
    # Sets of 0 to 9 ids: with their token and without it, with ids that do not exist.
    support = np.stack([rng.permutation(VOCAB)[:9] for _ in tokens.flat]).reshape(*tokens.shape, 9)
    support[..., :4] = np.where(rng.random((*tokens.shape, 4)) < 0.3, -1, support[..., :4])
    support[:, 0] = -1
    support[:, 1:3, 8] = tokens[:, 1:3]
    cotangents = rng.normal(size=(2, BATCH, LENGTH))
    return (hidden, head, bias), tokens, support, cotangents


ARRAYS, TOKENS, SUPPORT, COTANGENTS = _case()


def _dense(arrays, support):
    hidden, head, bias = arrays
    logits = CAP * jnp.tanh((hidden @ head.T + bias) / CAP) / TEMPERATURE
    kept = np.broadcast_to(WHERE, logits.shape)
    if support is not None:
        chosen = (support[..., None] == np.arange(VOCAB)).any(-2)
        chosen |= (TOKENS[..., None] == np.arange(VOCAB)) | ~chosen.any(-1, keepdims=True)
        kept = kept & chosen
    log_p = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf))
    entropy = -jnp.where(kept, jnp.exp(log_p) * jnp.where(kept, log_p, 0.0), 0.0).sum(-1)
    return jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0], entropy


def _ours(arrays, support, tokens=TOKENS, where=WHERE, **options):
    hidden, head, bias = arrays
    return losses.linear_log_probs(
        hidden,
        losses.Head(head, bias, vocab_axis=0, soft_cap=CAP),
        tokens,
        temperature=TEMPERATURE,
        support=support,
        entropy=True,
        vocab_where=where,
        blocks=BLOCKS,
        **options,
    )


def _with_gradients(function, arrays, support):
    def total(arrays):
        results = function(arrays, support)
        pairs = zip(results, COTANGENTS, strict=True)
        return sum((x * c.astype(x.dtype)).sum() for x, c in pairs), tuple(results)

    return jax.grad(total, has_aux=True)(arrays)


@functools.cache
def _oracle(cut):
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(_with_gradients, _dense))
        return jax.device_get(run(ARRAYS, SUPPORT if cut else None))


def _sharded(arrays, support):
    """The vocabulary split over eight devices."""
    mesh = jax.make_mesh((8,), ("tensor",), (AxisType.Auto,))
    head = P("tensor")

    def local(arrays, where):
        return _ours(arrays, support, where=where, axis_name="tensor")

    specs = ((P(), head, head), head)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())(arrays, WHERE)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "support"])
@pytest.mark.parametrize("function", [_ours, _sharded], ids=["one_device", "eight"])
def test_values_and_gradients_are_those_of_dense_float64(function, cut):
    narrow = tuple(x.astype(np.float32) for x in ARRAYS)
    run = jax.jit(functools.partial(_with_gradients, function))
    gradients, values = jax.device_get(run(narrow, SUPPORT if cut else None))
    wanted_gradients, exact = _oracle(cut)
    for got, want, bar in (
        *((*pair, 1e-6) for pair in zip(values, exact, strict=True)),
        *((*pair, 1e-5) for pair in zip(gradients, wanted_gradients, strict=True)),
    ):
        assert got.dtype == np.float32
        assert np.abs(got - want).max() < bar * np.abs(want).max()


def test_a_support_as_one_list_is_laid_out_before_jit():
    listed = SUPPORT >= 0
    splits = np.concatenate([[0], np.cumsum(listed.sum(-1))])
    padded = losses.pad_support(SUPPORT[listed], splits, TOKENS.shape)
    assert [sorted(x[x >= 0]) for x in padded.reshape(-1, 9)] == [
        sorted(x[x >= 0]) for x in SUPPORT.reshape(-1, 9)
    ]
    with pytest.raises(ValueError, match="row_splits: expected 2 ascending numbers from 0 to 2"):
        losses.pad_support(np.arange(2), np.array([0, 1]), (1,))


def test_of_logits_far_from_zero_nothing_cancels_and_an_id_past_the_vocabulary_is_nan():
    head = losses.Head(np.array([[1001.0, 1002.0, 1003.0, 1000.0]], np.float32))
    tokens, support = np.array([2, 2, 7]), np.array([[0, 2, 2], [0, 4, 1], [-1, -1, -1]])
    run = compiled(losses.linear_log_probs)
    values, entropy = run(np.ones((3, 1), np.float32), head, tokens, support=support, entropy=True)
    np.testing.assert_allclose(values, [-0.1269280, np.nan, np.nan], atol=1e-4)
    np.testing.assert_allclose(entropy, [0.3653339, np.nan, 0.9475370], atol=1e-4)


def test_both_numbers_take_one_product_a_logit():
    def products(jaxpr):
        inner = [
            getattr(v, "jaxpr", v)
            for e in jaxpr.eqns
            for v in jax.tree.leaves(list(e.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr"))
            if hasattr(getattr(v, "jaxpr", v), "eqns")
        ]
        here = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
        return here + sum(map(products, inner))

    assert products(jax.make_jaxpr(lambda a: _ours(a, SUPPORT))(ARRAYS).jaxpr) == 1


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize("ids", [0, 64], ids=["whole", "support"])
def test_compiled_for_a_tpu_it_holds_a_tenth_of_what_dense_holds(ids):
    positions, width, vocab = 8192, 1024, 151936
    mesh = _tpu_mesh("v5p:1x1x1", (1,), ("data",))

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def blocked(hidden, head, tokens, support):
        support = support if ids else None
        return losses.linear_log_probs(hidden, head, tokens, support=support, entropy=True)

    def dense(hidden, head, tokens, support):
        log_p = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))
        entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return jnp.take_along_axis(log_p, tokens[:, None], -1)[:, 0], entropy

    def scratch(function):
        def total(hidden, head, tokens, support):
            values, entropy = function(hidden, head, tokens, support)
            return (jnp.exp(values) - 0.01 * entropy).sum()

        arguments = (
            array(positions, width),
            array(width, vocab),
            array(positions, dtype=jnp.int32),
        )
        with jax.set_mesh(mesh):
            traced = jax.jit(jax.value_and_grad(total, (0, 1))).trace(
                *arguments, array(positions, max(ids, 1), dtype=jnp.int32)
            )
            program = traced.lower(lowering_platforms=("tpu",)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert scratch(blocked) <= 0.1 * scratch(dense)
