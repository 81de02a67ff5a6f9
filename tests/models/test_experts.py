"""Mixtures of experts: by hand, on a mesh, and memory to which experts add nothing."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import models, training
from logitjax.models import DECODER_RULES, _experts
from tests._marks import EVERY_CHANGE
from tests.models._checkpoints import write_checkpoint
from tests.models._configs import TOKENS

ROWS, HIDDEN, WIDE, EXPERTS, EACH = 12, 8, 6, 4, 2
KINDS = [_experts._scanned, pytest.param(_experts._ragged, marks=EVERY_CHANGE)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_gets_the_weighted_sum_of_its_experts_and_parts_of_them_add_up(kind):
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(ROWS, HIDDEN)), rng.uniform(size=(ROWS, EACH))
    ids = np.stack([rng.permutation(EXPERTS)[:EACH] for _ in range(ROWS)])
    shapes = [(EXPERTS, HIDDEN, WIDE)] * 2 + [(EXPERTS, WIDE, HIDDEN)]
    kernels = [rng.normal(size=shape) for shape in shapes]
    expected = np.zeros_like(x)
    for row, weight, expert in zip(np.repeat(range(ROWS), EACH), weights.flat, ids.flat):
        gate, up, down = (kernel[expert] for kernel in kernels)
        expected[row] += weight * (np.maximum(x[row] @ gate, 0) * (x[row] @ up)) @ down
    run = jax.jit(functools.partial(kind, jax.nn.relu))
    x, weights = np.float32(x), np.float32(weights)
    kernels = [np.float32(kernel) for kernel in kernels]
    np.testing.assert_allclose(run(x, weights, ids, kernels), expected, rtol=2e-5, atol=1e-5)
    halves = [run(x, weights, ids - at, [k[at : at + 2] for k in kernels]) for at in (0, 2)]
    np.testing.assert_allclose(sum(halves), expected, rtol=2e-5, atol=1e-5)


def test_memory_does_not_grow_with_the_experts():
    def backward(x, weights, ids, kernels):
        run = functools.partial(_experts._scanned, jax.nn.silu)
        return jax.grad(lambda x, w: (run(x, w, ids, kernels) ** 2).sum(), argnums=(0, 1))(
            x, weights
        )

    def temporary(experts):
        shapes = [(256, 32), (256, 2), (256, 2)]
        x, weights, ids = (jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, ("f4", "f4", "i4")))
        kernel = jax.ShapeDtypeStruct((experts, 32, 32), "f4")
        program = jax.jit(backward).lower(x, weights, ids, [kernel] * 3).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(16) <= 1.1 * temporary(4)


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("mixtral", marks=EVERY_CHANGE)])
def test_a_mesh_of_experts_gives_what_one_device_gives(name, tmp_path):
    spec = str(write_checkpoint(name, tmp_path, 2))
    experts = models.load_config(spec).num_experts
    mesh = training.make_mesh(f"expert:{experts},data:-1")
    whole = models.load_model(spec)
    split = models.load_model(spec, mesh=mesh, rules=DECODER_RULES)
    kernel = split.segments[0].layers[0].mlp.experts.gate.kernel[...]
    assert kernel.addressable_shards[0].data.shape[1] == 1
    weights = np.random.default_rng(0).normal(size=(8, 10, 96)).astype(np.float32)

    def loss(model, tokens):
        logits = model(tokens)
        return (logits * weights).sum(), logits

    # Rows enough that the axis of the experts splits them too.
    tokens, program = (
        TOKENS.reshape(-1)[:40].repeat(2).reshape(8, 10),
        nnx.jit(nnx.grad(loss, has_aux=True)),
    )
    expected, other = jax.tree.map(np.asarray, program(whole, tokens))
    with jax.set_mesh(mesh):
        rows = jax.device_put(tokens, NamedSharding(mesh, P(("data", "expert"))))
        gradients, logits = jax.tree.map(np.asarray, program(split, rows))
        gathered = program.lower(split, rows).compile().as_text()
    np.testing.assert_allclose(logits, other, atol=1e-5 * np.abs(other).max())
    for ours, one in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-5 * np.abs(one).max())
    # No device asks for the experts of another.
    wide = models.load_config(spec).expert_size or models.load_config(spec).intermediate_size
    assert f"f32[{experts},32,{wide}]" not in gathered
