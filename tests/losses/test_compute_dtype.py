"""The type that hidden states and a head are multiplied in, where it is not their common one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses


def _products(function, *arguments):
    """Types of the operands of all products, and the results, of a function's program."""
    lowered = jax.jit(function).lower(*arguments)
    kinds = re.findall(
        r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)", lowered.as_text()
    )
    return {kind for pair in kinds for kind in pair}, len(kinds), lowered.compile()(*arguments)


@pytest.mark.parametrize("engine", ["scan", "rows"])
def test_a_float32_head_multiplies_in_bfloat16_and_has_a_float32_gradient(engine):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(40, 16)).astype(jnp.bfloat16)
    kernel = rng.normal(size=(300, 16), scale=0.5).astype(np.float32)
    labels, weights = rng.integers(0, 300, 40), np.ones(40, np.float32)
    blocks = losses.Blocks(vocab=64, engine=engine)

    def step(hidden, kernel, compute_dtype):
        def loss(hidden, kernel):
            head = losses.Head(kernel, vocab_axis=0, compute_dtype=compute_dtype)
            options = {"weights": weights, "blocks": blocks}
            return losses.linear_cross_entropy(hidden, head, labels, **options)

        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    narrow = functools.partial(step, compute_dtype=jnp.bfloat16)
    kinds, count, (value, gradients) = _products(narrow, hidden, kernel)
    assert (kinds, count) == ({"bf16"}, 4 if engine == "scan" else 3)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, np.float32]
    kinds, _, (wide, slopes) = _products(
        functools.partial(step, compute_dtype=None), hidden, kernel
    )
    assert kinds == {"f32"}
    np.testing.assert_allclose(value, wide, rtol=1e-3)
    for got, want in zip(gradients, slopes, strict=True):
        gap = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
        assert gap.max() < 0.02 * np.abs(want).max()
    # The sum over positions is no bfloat16.
    assert (gradients[1] != gradients[1].astype(jnp.bfloat16)).any()


def test_a_compute_dtype_of_integers_is_refused():
    with pytest.raises(TypeError, match="compute_dtype: expected floating point, got"):
        losses.Head(np.ones((2, 3), np.float32), compute_dtype=np.int32)
