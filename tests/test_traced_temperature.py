"""Whatever divides logits by a temperature takes a traced one, as a schedule under jit gives it."""

import importlib
import inspect
from typing import Unpack

import jax
import numpy as np
import pytest

from logitjax import distillation, losses, ops, vq
from logitjax.losses.sweep._run import Options

HIDDEN, VOCAB, CODES = 4, 12, 5


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PAIR = normal(0, 3, VOCAB), normal(1, 3, VOCAB)
LABELS = np.array([1, 5, 11])
HEAD = normal(2, 3, HIDDEN), normal(3, HIDDEN, VOCAB)
HEADS = *HEAD, normal(4, 3, HIDDEN), normal(5, HIDDEN, VOCAB)
TOP = ops.TopK(
    values=np.array([[3.0, 2.0]] * 3, np.float32),
    indices=np.array([[4, 7]] * 3, np.int32),
    log_z=np.full(3, 3.5, np.float32),
)
CODEBOOK, BIAS, ASSIGNMENT = normal(6, CODES, HIDDEN), normal(7, VOCAB), np.arange(VOCAB) % CODES
VQ = HEAD[0], CODEBOOK, BIAS, ASSIGNMENT


SCREEN = vq.ScreenedHead(lambda h: h @ HEADS[3], rows=HEAD[1].T, num_candidates=4)


def with_temperature(function, *arguments, **options):
    return lambda temperature: function(*arguments, temperature=temperature, **options)


# Of each function that takes a temperature: itself, of nothing else.
OF_TEMPERATURE = {
    losses: {
        "generalized_jensen_shannon": with_temperature(losses.generalized_jensen_shannon, *PAIR),
        "kl_divergence": with_temperature(losses.kl_divergence, *PAIR),
        "sparse_kl_divergence": with_temperature(
            losses.sparse_kl_divergence, PAIR[0], TOP, tail="renormalize"
        ),
        "linear_cross_entropy": with_temperature(losses.linear_cross_entropy, *HEAD, LABELS),
        "linear_generalized_jensen_shannon": with_temperature(
            losses.linear_generalized_jensen_shannon, *HEADS
        ),
        "linear_kl_divergence": with_temperature(losses.linear_kl_divergence, *HEADS),
        "linear_log_probs": with_temperature(losses.linear_log_probs, *HEAD, LABELS),
        "linear_readout": with_temperature(losses.linear_readout, *HEAD, labels=LABELS),
        "linear_sparse_kl_divergence": with_temperature(
            losses.linear_sparse_kl_divergence, *HEAD, TOP, tail="renormalize"
        ),
    },
    distillation: {
        "binary_kl": with_temperature(distillation.binary_kl, *PAIR),
        "binary_kl_norm": with_temperature(distillation.binary_kl_norm, *PAIR),
        "decoupled_knowledge_distillation": with_temperature(
            distillation.decoupled_knowledge_distillation, *PAIR, LABELS
        ),
        "dist": with_temperature(distillation.dist, *PAIR),
        "knowledge_distillation": with_temperature(distillation.knowledge_distillation, *PAIR),
        "universal_logit_distance": with_temperature(distillation.universal_logit_distance, *PAIR),
    },
    vq: {
        "ScreenedHead.nll": with_temperature(SCREEN.nll, HEAD[0], LABELS),
        "vq_logits": with_temperature(vq.vq_logits, *VQ),
        "vq_nll": with_temperature(vq.vq_nll, *VQ, LABELS),
        "VQTables.of": with_temperature(vq.VQTables.of, BIAS, ASSIGNMENT, CODES),
    },
}
CASES = [(module, name) for module, functions in OF_TEMPERATURE.items() for name in functions]


@pytest.mark.parametrize(
    ("module", "name"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_traced_temperature_gives_what_a_number_gives(module, name):
    function = OF_TEMPERATURE[module][name]
    traced, plain, one = jax.jit(lambda t: (function(t), function(2.0), function(1.0)))(2.0)
    for ours, expected in zip(jax.tree.leaves(traced), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    differs = [
        not np.array_equal(ours, other)
        for ours, other in zip(jax.tree.leaves(traced), jax.tree.leaves(one), strict=True)
    ]
    assert any(differs)


@pytest.mark.parametrize(
    "room", ["losses", "distillation", "vq", "unlearning", "few_shot", "fusion"]
)
def test_the_table_has_every_function_that_takes_a_temperature(room):
    module = importlib.import_module(f"logitjax.{room}")
    takes = {
        name
        for name, function in inspect.getmembers(module, inspect.isroutine)
        if "temperature" in (given := inspect.signature(function).parameters)
        # The losses of heads share their keywords.
        or ("options" in given and given["options"].annotation == Unpack[Options])
    }
    assert takes == {name for name in OF_TEMPERATURE.get(module, ()) if "." not in name}
