"""The arm of graph fusion with a second LM head, against dense logits."""

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import distillation, losses, models
from logitjax.distillation import objectives
from logitjax.models import load_model


def test_dual_arm_equals_the_dense_form_and_separates_the_heads():
    model = load_model("tiny")
    apply_fn, params = models.from_nnx(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (2, 12)).astype(np.int32)
    pivot = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape),
        "loss_mask": np.ones(tokens.shape, bool),
    }
    teachers = [jnp.asarray(rng.normal(size=(2, 11, 257), scale=3), jnp.float32) for _ in "ab"]
    where = np.ones((2, 11), bool)
    batch = {
        "pivot": pivot,
        "sources": {
            f"source{i}": (losses.graph_statistics(teacher, 257), where)
            for i, teacher in enumerate(teachers)
        },
    }
    objective = objectives.Objective(loss=objectives.DUAL, weights=(1.0, 3.0))
    loss_fn = objectives.loss_function(objective, apply_fn.graphdef, ("source0", "source1"))
    trained = objectives.with_auxiliary_head(apply_fn.graphdef, params)
    assert objectives.pivot_of(trained) is params
    assert objectives.pivot_of(params) is params

    @jax.jit
    def run(trained):
        def total(trained):
            value, count, metrics = loss_fn(trained, batch, None)
            return value, (count, metrics)

        return jax.value_and_grad(total, has_aux=True)(trained)

    (value, (count, metrics)), gradient = run(trained)
    logits, labels = model(jnp.asarray(tokens))[:, :-1], jnp.asarray(tokens[:, 1:])
    # The second head starts as a copy of the first.
    distances = [distillation.binary_kl_norm(logits, t, reduction="mean") for t in teachers]
    dual = (0.25 * distances[0] + 0.75 * distances[1]).sum()
    sft = losses.cross_entropy(logits, labels).sum()
    assert int(count) == 22
    np.testing.assert_allclose(metrics["dual"][0], dual, rtol=1e-4)
    np.testing.assert_allclose(value, 0.5 * sft + 0.5 * dual, rtol=1e-4)
    auxiliary = gradient["auxiliary"]["head"]["kernel"]
    hidden, _ = model.hidden_states(jnp.asarray(tokens))
    expected = jax.grad(
        lambda w: sum(
            0.5 * share * distillation.binary_kl_norm(hidden[:, :-1] @ w, t, reduction="mean").sum()
            for share, t in zip((0.25, 0.75), teachers)
        )
    )(trained["auxiliary"]["head"]["kernel"])
    np.testing.assert_allclose(auxiliary, expected, rtol=1e-3, atol=1e-5)
