"""Measurements of a converted head, and the heads that are made for each arm."""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from experiments.shared.records import Record
from experiments.shared.timing import paired_ratio, paired_seconds
from experiments.vq_head import arms, rebuilt
from experiments.vq_head.data import Context, Split, in_blocks

#: Stretches of a split whose losses are kept separate: 250 of 14,000 positions each.
UNITS = 56
#: The fitting function of each arm.
FITS = arms.FITS | {"flash": rebuilt.flash, "svd": rebuilt.svd, "faiss": rebuilt.faiss}


def run_arm(
    ctx: Context, workdir: epath.Path, arm: str, codes: int, seed: int, rates: Sequence[float]
) -> Record:
    """Records of an arm's heads, at the rate that is best for the first of them."""
    logging.info("%s, %d codes, seed %d", arm, codes, seed)
    if arm == "faiss" and not importlib.util.find_spec("faiss"):
        logging.warning("faiss is left out: pip install faiss-cpu")
        return {"lr": 0.0, "tried": {}, "records": []}
    rates = (0.0,) if arm in arms.UNTUNED else rates
    best, made, tried = None, {}, {}
    for rate in rates:
        trial = arms.Trial(arm, codes, seed, rate)
        variants = FITS[arm](ctx, trial)
        if len(rates) > 1:
            first = next(iter(variants.values()))
            tried[str(rate)] = scores(first, ctx.splits["validation"])["nll"]
        if best is None or tried[str(rate)] <= min(tried.values()):
            best, made = trial, variants
    assert best is not None
    if arm == "vq_likelihood" and seed == 0 and jax.process_index() == 0:
        made[arm].head.save(workdir / "heads" / f"{arm}_{codes}")
    records = [converted_record(ctx, best, name, head) for name, head in made.items()]
    return {"lr": best.rate, "tried": tried, "records": records}


def stretch(ctx: Context, name: str, seed: int) -> Split:
    """The positions of a split that a seed reports on."""
    split, count = ctx.splits[name], ctx.config.seeds
    if not ctx.config.stretches:
        return split
    here = np.array_split(np.arange(len(split.labels)), count)[seed]
    fields = ("hidden", "labels", "nll", "top_tokens")
    return Split(*(getattr(split, field)[here[0] : here[-1] + 1] for field in fields))


def scores(converted: arms.Converted, split: Split) -> Record:
    """Held-out perplexity ratio to the old head, and agreement with its first choices."""
    run = functools.partial(converted.jitted(converted.outputs), converted.arrays)
    nll, tokens = in_blocks(run, split.hidden, split.labels)
    stretches = np.array_split(nll - split.nll, min(UNITS, len(nll)))
    teacher = split.top_tokens[:, : tokens.shape[1]]
    record = {
        "nll": float(nll.mean()),
        "log_factors": [float(part.mean()) for part in stretches],
        "ratio": float(np.exp(nll.mean() - split.nll.mean())),
        "top1": float((tokens[:, 0] == teacher[:, 0]).mean()),
        "top5": float((tokens[:, :, None] == teacher[:, None, :]).any(1).mean()),
    }
    if converted.sure is not None:
        sure = functools.partial(jax.jit(converted.sure), converted.arrays)
        record["full_reads"] = 1.0 - float(in_blocks(sure, split.hidden).mean())
    return record


def converted_record(
    ctx: Context, trial: arms.Trial, name: str, converted: arms.Converted
) -> Record:
    """All of the report's numbers about one head.

    Decoding alternates with the old head in float32, in bfloat16 and in 8 bits, so that each finds
    its weights evicted from the caches, as between two passes of a model.
    """
    record = scores(converted, stretch(ctx, "test", trial.seed))
    if "other" in ctx.splits:
        record["other"] = scores(converted, stretch(ctx, "other", trial.seed))
    logging.info("%s: perplexity x%.4f, top-1 %.4f", name, record["ratio"], record["top1"])
    hidden = jnp.asarray(np.asarray(ctx.splits["test"].hidden[:1]))
    timed = {"new": converted, **arms.references(ctx)}
    functions = {
        key: functools.partial(head.jitted(head.decode), head.arrays, hidden)
        for key, head in timed.items()
    }
    seconds = paired_seconds(functions, repeats=ctx.config.timing_repeats, warmup=2)
    new, middle = seconds.pop("new"), {}
    for key, times in seconds.items():
        middle[key] = statistics.median(times)
    fastest = min(middle, key=lambda key: middle[key])
    return record | {
        "arm": name,
        "codes": trial.codes,
        "seed": trial.seed,
        "lr": trial.rate,
        "floor": converted.floor,
        "curve": list(converted.curve),
        "moved": list(converted.moved),
        "decode_ms": 1e3 * statistics.median(new),
        "faster": {key: paired_ratio(times, new) for key, times in seconds.items()},
        "fastest": fastest,
        "decode_speedup": paired_ratio(seconds[fastest], new),
        "cost": dataclasses.asdict(converted.cost),
    }
