import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax import losses, models
from logitjax.distillation._draft_statistic import DraftStatistic
from logitjax.distillation.training._draft_head import _LOSSES
from logitjax.distillation.training._draft_start import make_copying
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


@pytest.mark.many_programs("a model, a head, and what both give")
def test_training_begins_at_a_head_that_copies():
    model = models.with_layout(models.load_model("tiny"), "listed")
    head = models.DraftHead.of(model)
    # Text in which everything occurs twice.
    tokens = np.random.default_rng(0).integers(1, 257, (16, 24))
    tokens = np.concatenate([tokens, tokens], axis=1)

    @nnx.jit
    def read(model):
        model.hidden_states(tokens, entering=(entering := []))
        return jnp.concatenate([entering[i] for i in head.layers], axis=-1)

    @nnx.jit
    def draft(head, model, features):
        embedded = model.embedding[...][np.roll(tokens, -1, axis=1)]
        (stream,) = head.unrolled(features, embedded, 1)
        return head.logits(stream).argmax(axis=-1)

    features = np.asarray(read(model))
    units = make_copying(head, model, features.reshape(-1, features.shape[-1]), tokens.reshape(-1))
    right = np.asarray(draft(head, model, features / units))[:, :-2] == tokens[:, 2:]
    # Where a token occurs for the first time, and where it is known what followed.
    assert right[:, 24:].mean() > 0.3 > 0.03 > right[:, :22].mean()
