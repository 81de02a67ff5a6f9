"""What dynamic fusion trains: the large model's ceiling and an expert, on text."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from experiments.dynamic_fusion.models import text_loss
from experiments.shared import shapes
from logitjax import models, training


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one."""
    mesh = training.make_mesh(config.mesh, devices=devices)
    rates = {"large": config.large_learning_rate, "base": config.learning_rate}
    for name, rate in rates.items():
        if spec := getattr(config, name):
            update = functools.partial(_update, config, spec, rate, mesh)
            yield f"update of the {name} model", update


def _update(config: Any, spec: str, rate: float, mesh: Any) -> Any:
    graphdef, params = shapes.abstract_decoder(
        shapes.decoder_config(spec), dtype=config.dtype, layout=config.layout
    )
    steps = config.tune_steps
    schedule: Any = dict(schedule="cosine", warmup=max(1, steps // 10), total_steps=steps)
    trainable = None if config.train_embeddings else r"(segments|final_norm)"
    tx = training.make_optimizer(rate, weight_decay=0.01, trainable=trainable, **schedule)

    def loss_fn(params: Any, batch: Any, rng: Any) -> Any:
        del rng
        return *text_loss(nnx.merge(graphdef, params), batch), {}

    step = training.make_train_step(loss_fn, tx, mesh=mesh, trainable=trainable)
    state = training.abstract_train_state(params, tx, mesh=mesh, rules=models.DECODER_RULES)
    return step.trace(state, shapes.packed(mesh, config.batch_size, config.seq_len))
