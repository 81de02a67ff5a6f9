"""Distilling from a cache of the teacher's top 64 logits: the cost of a step, and the loss.

    python -m experiments.benchmark cached_teacher

The student is SmolLM2-135M without the six layers that `distillation.prune_layers` misses least, as
in the demo of graph fusion; the teacher is the whole model, on packaged Wikipedia summaries. Four
trainings see the same rows: ``sft``;
``cached``, half SFT and half KL to 64 cached logits and the exact mass of the rest; ``sampled``,
the same with 64 draws from the rest, which make the KL unbiased; ``live``, the teacher run in the
step and KL over the whole vocabulary. Seconds are of whole steps, optimizer included, taken in
turns; the live step is timed without its teacher too. Trainings that are done are kept.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared import records, suite, timing
from logitjax import data, distillation, losses, models, training

_DROPPED = 6
_CALIBRATION = 16
_K = 64
_LEARNING_RATE = 3e-4
_MIX = 0.5
ARMS = ("sft", "cached", "sampled", "live")
_TAIL = 64


def run(options: suite.Options) -> suite.Result:
    seeds, steps, held_out, rows_a_step, length = (
        (1, 3, 2, 2, 64) if options.smoke else (2, 40, 24, 1, 128)
    )
    teacher, tokenizer = models.load("tiny:1" if options.smoke else "smollm2")
    rows = _rows(tokenizer, length, options)
    calibration = [
        rows["train"].rows(range(i, i + 2))["lm"]
        for i in range(0, 2 if options.smoke else _CALIBRATION, 2)
    ]
    pruned = distillation.prune_layers(teacher, calibration, 1 if options.smoke else _DROPPED)
    student = models.keep_layers(teacher, pruned.kept)
    teacher_fn, teacher_params = models.from_nnx(teacher)
    taught = distillation.Student.of(student)
    reading = distillation.Reading(data="", top_k=_K, tail_samples=_TAIL)
    read = jax.jit(functools.partial(reading.record, teacher_fn.graphdef))

    def batch(split: str, step: int, seed: int) -> dict[str, Any]:
        return rows[split].batch(step, seed=seed, batch_size=rows_a_step)["lm"]

    def numbers(step: int) -> np.ndarray:
        return np.arange(rows_a_step, dtype=np.uint32) + step * rows_a_step

    # Read once: all that the cached training needs from its teacher.
    caches = {
        (seed, step): jax.device_get(
            read(teacher_params, batch("train", step, seed), numbers(step))
        )
        for seed in range(seeds)
        for step in range(steps)
    }
    logging.info("the teacher has read %d batches", len(caches))
    constants, mesh = {"live": teacher_params}, training.make_mesh()
    functions = {arm: _loss(arm, taught, teacher_fn.graphdef) for arm in (*ARMS, "given")}

    def trainer(arm: str, seed: int) -> tuple[Any, training.TrainStep]:
        schedule = training.Schedule(_LEARNING_RATE, warmup=steps // 10, total_steps=steps)
        tx = schedule.optimizer()
        state = training.TrainState.create(taught.trained, tx, mesh=mesh, seed=seed)
        return state, training.TrainStep(functions[arm], tx)

    def inputs(arm: str, step: int, seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {"pivot": batch("train", step, seed)}
        if arm in ("cached", "sampled"):
            inputs["teacher"] = _statistics(caches[seed, step], tail=arm == "sampled")
        return inputs

    score = training.EvalStep(taught.score)
    scored = [{"pivot": batch("test", step, 0)} for step in range(held_out // rows_a_step)]

    def taught_to(arm: str, seed: int) -> float:
        state, step_fn = trainer(arm, seed)
        for step in range(steps):
            state, _ = step_fn(state, inputs(arm, step, seed), constants.get(arm))
        result = score.means(state.params, scored, taught.frozen)
        logging.info("%s, seed %d: loss %.4g", arm, seed, result["loss"])
        return float(np.exp(result["loss"]))

    parts = epath.Path(options.directory) / f"{options.scale}-parts"
    perplexities = {
        arm: [
            records.kept(parts / f"{arm}-{seed}.json", functools.partial(taught_to, arm, seed))
            for seed in range(seeds)
        ]
        for arm in ARMS
    }
    seconds = timing.paired_seconds(
        _timed(trainer, inputs, constants, functools.partial(_hidden, teacher_fn.graphdef)),
        repeats=options.repeats,
    )
    table = []
    for arm, times in seconds.items():
        row: dict[str, Any] = {
            "training": _NAMES[arm],
            "seconds a step": float(np.median(times)),
            "/ sft": timing.paired_ratio(times, seconds["sft"]),
        }
        if arm in ARMS:
            row["perplexity"] = float(np.mean(perplexities[arm]))
            row["/ live"] = float(np.mean(np.divide(perplexities[arm], perplexities["live"])))
        table.append(row)
    by_name = {row["training"]: row for row in table}
    bars = []
    for name in (_NAMES["cached"], _NAMES["sampled"]):
        row = by_name[name]
        bars.append(suite.at_most(f"step / SFT step: {name}", row["/ sft"], 1.10))
        bars.append(suite.at_most(f"held-out perplexity / live: {name}", row["/ live"], 1.01))
    parts.rmtree()
    return suite.Result(rows=table, bars=bars)


_NAMES = {
    "sft": "SFT",
    "cached": f"SFT + KL, cached top {_K}",
    "sampled": f"SFT + KL, cached top {_K} and {_TAIL} draws",
    "given": "SFT + KL, teacher's hidden states given",
    "live": "SFT + KL, live teacher",
}


def _rows(tokenizer: Any, length: int, options: suite.Options) -> Mapping[str, data.PackedDataset]:
    spec = "text:LICENSE" if options.smoke else "tfds:wiki_summaries"
    directory = Path(options.directory) / "rows"
    return {
        split: data.pack(
            data.load_examples(spec, split="train" if options.smoke else split),
            {"lm": tokenizer},
            seq_len=length,
            directory=directory / split,
        )
        for split in ("train", "test")
    }


def _statistics(record: Mapping[str, Any], *, tail: bool) -> losses.GraphStatistics:
    """A cached batch in the losses' form, with or without its draws."""
    fields = {name: record[name] for name in ("values", "indices", "log_z", "mean", "std")}
    drawn = losses.TailSample(values=record["tail_values"], indices=record["tail_indices"])
    return losses.GraphStatistics(**fields, tail=drawn if tail else None)


def _hidden(graphdef: Any, params: Any, batch: Mapping[str, Any]) -> Any:
    return distillation.hidden_states(nnx.merge(graphdef, params), batch)


def _loss(arm: str, student: distillation.Student, teacher_graphdef: Any) -> Callable[..., Any]:
    """An arm's loss; ``live`` and ``given`` take the teacher's parameters as step constants."""
    sft, cached = (
        distillation.LossFunction(
            distillation.Objective(terms=distillation.parse_terms(terms), teachers=(1.0,)),
            student,
            {"teacher": distillation.Vocabularies()},
        )
        for terms in (["sft"], [f"sft:{1 - _MIX}", f"kl:{_MIX}"])
    )

    def loss_fn(params: Any, batch: Any, rng: Any, teacher: Any = None) -> Any:
        if arm == "sft":
            return sft(params, batch, rng, student.frozen)
        if arm in ("cached", "sampled"):
            sources = {"teacher": distillation.Teacher(statistics=batch["teacher"])}
            given = {"pivot": batch["pivot"], "sources": sources}
            return cached(params, given, rng, student.frozen)
        labels, where = batch["pivot"]["tokens"][:, 1:], batch["pivot"]["loss_mask"][:, 1:]
        model, source = student.model(params), nnx.merge(teacher_graphdef, teacher)
        hidden, head = distillation.hidden_states(model, batch["pivot"]), model.head_of()
        present = batch.get("hidden")
        if arm == "live":
            present = distillation.hidden_states(source, batch["pivot"])
        weights = where.astype(np.float32)
        ce = losses.linear_cross_entropy(hidden, head, labels, weights=weights)
        kl = losses.linear_kl_divergence(
            hidden, head, jax.lax.stop_gradient(present), source.head_of(), weights=weights
        )
        return (1 - _MIX) * ce + _MIX * kl, where.sum(), {}

    return loss_fn


def _timed(
    trainer: Callable[..., Any],
    inputs: Callable[..., Any],
    constants: Mapping[str, Any],
    hidden: Callable[..., Any],
) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    for arm in ("sft", "cached", "sampled", "given", "live"):
        state, step_fn = trainer(arm, 0)
        batch = inputs(arm, 0, 0)
        given = constants["live"] if arm in ("given", "live") else None
        if arm == "given":
            batch["hidden"] = jax.jit(hidden)(given, batch["pivot"])
        calls[arm] = timing.repeated(step_fn, state, jax.device_put(batch), given)
    return calls
