"""Measurements of a converted head, and the heads that are made for each arm."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from experiments.shared.records import Record
from experiments.shared.timing import paired_ratio, paired_seconds
from experiments.vq_head import arms, rescored
from experiments.vq_head.data import Context, Split, in_blocks

#: Stretches of a split whose losses are kept separate: 250 of 14,000 positions each.
UNITS = 56
#: Arms with V cheap logits, so that exact rows can re-score the best of them.
SCREENS = ("product", "packed_product")


def run_arm(
    ctx: Context, workdir: epath.Path, arm: str, codes: int, seed: int, rates: Sequence[float]
) -> Record:
    """Records of an arm at its best rate, and of the heads that are made from it."""
    config = ctx.config
    logging.info("%s, %d codes, seed %d", arm, codes, seed)
    trials = [arms.Trial(arm, codes, seed, rate) for rate in rates]
    made = [arms.convert(ctx, trial) for trial in trials]
    best, tried = 0, []
    if len(made) > 1:
        tried = [scores(one, ctx.splits["validation"])["nll"] for one in made]
        best = int(np.argmin(tried))
    trial, head = trials[best], made[best]
    record = functools.partial(converted_record, ctx, trial)
    records = [record(arm, head)]
    if arm == "vq_likelihood" and seed == 0 and jax.process_index() == 0:
        head.head.save(workdir / "heads" / f"{arm}_{codes}")
    if arm in SCREENS:
        for count in config.candidates:
            name = f"screened_{arm}_{count}"
            records.append(record(name, rescored.screened(ctx, head, count)))
    return {"lr": trial.rate, "tried": dict(zip(map(str, rates), tried)), "records": records}


def scores(converted: arms.Converted, split: Split) -> Record:
    """Held-out perplexity ratio to the old head, and agreement with its first choices."""
    nll_fn, top_fn = jax.jit(converted.nll), jax.jit(converted.top_k)
    arrays = converted.arrays
    nll = in_blocks(lambda h, y: nll_fn(arrays, h, y), split.hidden, split.labels)
    stretches = np.array_split(nll - split.targets.nll, min(UNITS, len(nll)))
    tokens = in_blocks(lambda h: top_fn(arrays, h), split.hidden)
    teacher = split.targets.top_tokens[:, : tokens.shape[1]]
    return {
        "nll": float(nll.mean()),
        "log_factors": [float(part.mean()) for part in stretches],
        "ratio": float(np.exp(nll.mean() - split.targets.nll.mean())),
        "top1": float((tokens[:, 0] == teacher[:, 0]).mean()),
        "top5": float((tokens[:, :, None] == teacher[:, None, :]).any(1).mean()),
        "accuracy": float((tokens[:, 0] == split.labels).mean()),
    }


def converted_record(
    ctx: Context, trial: arms.Trial, name: str, converted: arms.Converted
) -> Record:
    """All of the report's numbers about one head."""
    old = arms.full(ctx)
    hidden = jnp.asarray(np.asarray(ctx.splits["test"].hidden[:1]))
    jitted = {"full": (jax.jit(old.top_k), old.arrays)}
    jitted["new"] = (jax.jit(converted.decode or converted.top_k), converted.arrays)
    functions = {name: lambda f=f, p=p: f(p, hidden) for name, (f, p) in jitted.items()}
    seconds = paired_seconds(functions, repeats=ctx.config.timing_repeats, warmup=2)
    record = scores(converted, ctx.splits["test"])
    logging.info("%s: perplexity x%.4f, top-1 %.4f", name, record["ratio"], record["top1"])
    return record | {
        "arm": name,
        "codes": trial.codes,
        "seed": trial.seed,
        "lr": trial.rate,
        "floor": converted.floor,
        "curve": list(converted.curve),
        "moved": list(converted.moved),
        "decode_ms": 1e3 * statistics.median(seconds["new"]),
        "decode_speedup": paired_ratio(seconds["full"], seconds["new"]),
        # Times of training are taken once an arm: they do not depend on the learned values.
        "training_speedup": _training_speedup(ctx, converted) if trial.seed == 0 else None,
        "cost": dataclasses.asdict(converted.cost),
    }


def _training_speedup(ctx: Context, converted: arms.Converted) -> float | None:
    """The full head's time for loss and gradients, blocked, over this one's."""
    if not converted.trains:
        return None
    train, count = ctx.splits["train"], ctx.config.timing_batch
    batch = (jnp.asarray(np.asarray(train.hidden[:count])), jnp.asarray(train.labels[:count]))
    steps = {"full": _training_step(arms.full(ctx)), "new": _training_step(converted)}
    functions = {name: functools.partial(step, *batch) for name, step in steps.items()}
    seconds = paired_seconds(functions, repeats=3)
    return paired_ratio(seconds["full"], seconds["new"])


def _training_step(converted: arms.Converted) -> Callable[..., Any]:
    """Loss and gradients, for the head's parameters and the trunk: `(hidden, labels) -> ...`."""

    def loss(params: Any, given: Any, hidden: Any, labels: Any) -> Any:
        return converted.nll({**params, **given}, hidden, labels).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    return functools.partial(step, converted.params, converted.given)
