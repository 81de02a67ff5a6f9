"""A training step of SFT + ULD + GLD beside one of SFT + KL, with the teacher's logits given."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared import suite, timing
from logitjax import distillation, losses, models


def _model(smoke: bool) -> models.Decoder:
    config = models.DecoderConfig(
        vocab_size=512 if smoke else 49_152,
        hidden_size=64 if smoke else 576,
        intermediate_size=128 if smoke else 1536,
        num_layers=6,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_length=1024,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0), layout="listed")


def run(options: suite.Options) -> suite.Result:
    """Forward and backward of the whole model under each objective, k = 10, one row of T tokens."""
    model = _model(options.smoke)
    apply_fn, params = models.from_nnx(model)
    length, vocab = (64 if options.smoke else 512), model.config.vocab_size
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vocab, (1, length)), jnp.int32)
    labels = jnp.roll(tokens, -1, axis=1)
    # Zipf-like logits: a few large ones and a long tail, as in real models.
    teacher = jnp.asarray(rng.gumbel(size=(1, length, vocab)), jnp.float32)
    statistics = jax.jit(lambda x: losses.graph_statistics(x, 10))(teacher)
    names = ["sft:0.5", "uld:0.5", "gld:0.5"]
    objective = distillation.Objective(terms=distillation.parse_terms(names))

    def dense(objective: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def loss(params: Any, given: Any) -> Any:
            model = nnx.merge(apply_fn.graphdef, params)
            hidden, _ = model.hidden_states(tokens)
            return objective(model.logits(hidden), given).mean()

        return jax.jit(jax.value_and_grad(loss))

    def kl(logits: Any, given: Any) -> Any:
        sft = losses.cross_entropy(logits, labels)
        return 0.5 * sft + 0.5 * losses.kl_divergence(logits, jax.lax.stop_gradient(given))

    def fused(logits: Any, given: Any) -> Any:
        sft = losses.cross_entropy(logits, labels).mean(-1)
        uld = distillation.universal_logit_distance(logits, given).mean(-1)
        return 0.5 * (sft + uld + distillation.graph_on_logits(logits, given)[0])

    def blocked(params: Any, given: Any) -> Any:
        model = nnx.merge(apply_fn.graphdef, params)
        hidden, _ = model.hidden_states(tokens)
        teachers = [distillation.Teacher(statistics=given)]
        value, count, _ = objective.value(
            hidden, model.head_of(), {"labels": labels}, teachers, where=np.ones(labels.shape, bool)
        )
        return value / count

    steps = {
        "SFT + KL, teacher logits": (dense(kl), teacher),
        "SFT + ULD + GLD, teacher logits": (dense(fused), teacher),
        "SFT + ULD + GLD, blocked, teacher statistics": (
            jax.jit(jax.value_and_grad(blocked)),
            statistics,
        ),
    }
    seconds = timing.paired_seconds(
        {name: lambda f=f, x=x: f(params, x) for name, (f, x) in steps.items()},
        repeats=options.repeats,
    )
    reference = next(iter(steps))
    rows = [
        {
            "step": name,
            "T": length,
            "V": vocab,
            "seconds": min(seconds[name]),
            "ratio to SFT + KL": timing.paired_ratio(seconds[name], seconds[reference]),
            "temp MiB": suite.temp_bytes(f, params, x) / 2**20,
        }
        for name, (f, x) in steps.items()
    ]
    bars = [
        suite.at_most(f"{row['step']} / SFT + KL", row["ratio to SFT + KL"], 1.10)
        for row in rows[1:]
    ]
    return suite.Result(rows=rows, bars=bars)
