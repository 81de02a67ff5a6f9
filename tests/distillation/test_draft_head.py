import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logitjax import losses
from logitjax.distillation._draft_statistic import DraftStatistic
from logitjax.distillation.training._draft_head import _LOSSES
from logitjax.losses import sweep

P = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
DRAFTED, Z = np.array([0, 1, 3]), np.array([1.0, 0.2, -0.5], np.float32)


def read(z, name=None, *, blocks=None, weights=None):
    """The reading, or a loss, of logits that one hidden unit gives a head of three tokens."""
    one = jnp.ones((1, 1))
    statistic, tokens = DraftStatistic(), {"log_z": np.zeros(1, np.float32)}
    if name is not None:
        statistic = sweep.LossOf(statistic, _LOSSES[name])
        tokens = {"statistic": tokens, "loss": np.ones(1, bool)}
    teacher = one, losses.Head(np.log(P[DRAFTED], dtype=np.float32)[:, None], vocab_axis=0)
    head = losses.Head(z[:, None], vocab_axis=0)
    return sweep.run(
        statistic, one, head, teacher=teacher, tokens=tokens, blocks=blocks, weights=weights
    )


@pytest.mark.parametrize("columns", [None, 2])
def test_acceptance_counts_the_whole_vocabulary(columns):
    blocks = None if columns is None else losses.Blocks(vocab=columns)
    reading = jax.jit(functools.partial(read, blocks=blocks))(Z)
    # Normalised over the drafted tokens alone it would be .893664.
    np.testing.assert_allclose(reading.acceptance, 0.768664, atol=1e-6)
    np.testing.assert_allclose(reading.kl, 0.027480, atol=1e-6)
    assert reading.best.tolist() == [0]
    expected = {"alpha": 0.263102, "kl": 0.027480, "lambda": 0.211020}
    for name, value in expected.items():
        run = jax.jit(jax.value_and_grad(lambda z, name=name: read(z, name, blocks=blocks)[0]))
        got, gradient = run(Z)
        np.testing.assert_allclose(got, value, atol=2e-6)
        weighted = functools.partial(read, name=name, blocks=blocks, weights=np.ones(1, np.float32))
        again = jax.jit(jax.value_and_grad(lambda z, weighted=weighted: weighted(z)[0]))(Z)
        np.testing.assert_allclose(again[0], value, atol=2e-6)
        np.testing.assert_allclose(again[1], gradient, atol=1e-6)
        if name == "alpha":
            np.testing.assert_allclose(gradient, [0.208986, -0.255617, 0.046631], atol=2e-6)
