"""Measurements of a converted head, and the heads that are made for each arm."""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any

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
#: Learning rates that an arm tries at most.
MOST_RATES = 7
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
    waiting = [0.0] if arm in arms.UNTUNED else sorted(rates)
    many, tried, best, made = len(waiting) > 1, {}, 0.0, {}
    while waiting:
        rate = waiting.pop(0)
        variants = FITS[arm](ctx, arms.Trial(arm, codes, seed, rate))
        name = next(iter(variants))
        validation = {name: variants[name]}
        tried[rate] = scores(validation, ctx.splits["validation"])[name]["nll"] if many else 0.0
        if tried[rate] <= min(tried.values()):
            best, made = rate, variants
        low, high = min(tried), max(tried)
        if many and not waiting and best in (low, high) and len(tried) < MOST_RATES:
            # The best at an edge says that a better one may lie beyond.
            waiting = [best * 3.0 if best == high else best / 3.0]
    trial = arms.Trial(arm, codes, seed, best)
    if arm == "vq_bias" and seed == 0 and jax.process_index() == 0:
        made[arm].head.save(workdir / "heads" / f"{arm}_{codes}")
    tried = {str(rate): nll for rate, nll in tried.items()} if many else {}
    return {"lr": best, "tried": tried, "records": records_of(ctx, trial, made)}


def stretch(ctx: Context, name: str, seed: int) -> Split:
    """The positions of a split that a seed reports on."""
    split, count = ctx.splits[name], ctx.config.seeds
    if not ctx.config.stretches:
        return split
    here = np.array_split(np.arange(len(split.labels)), count)[seed]
    fields = ("hidden", "labels", "nll", "top_tokens")
    return Split(*(getattr(split, field)[here[0] : here[-1] + 1] for field in fields))


def scores(variants: arms.Variants, split: Split) -> dict[str, Record]:
    """Held-out perplexity ratios to the old head, and agreement with its first choices.

    Heads of one arm share a program, and so the scores of their screen.
    """
    leaves, places = jax.tree.flatten({name: head.arrays for name, head in variants.items()})
    # What several of them hold is one argument.
    kept = {id(leaf): leaf for leaf in leaves}
    order = [list(kept).index(id(leaf)) for leaf in leaves]

    def run(kept: Any, hidden: Any, labels: Any) -> Any:
        arrays = jax.tree.unflatten(places, [kept[i] for i in order])
        out = {}
        for name, head in variants.items():
            out[name] = [*head.outputs(arrays[name], hidden, labels)]
            out[name] += [head.sure(arrays[name], hidden)] if head.sure else []
        return out

    compiled = all(head.compiled for head in variants.values())
    run = functools.partial(jax.jit(run) if compiled else run, list(kept.values()))
    outputs = in_blocks(run, split.hidden, split.labels)
    return {name: _scored(split, *parts) for name, parts in outputs.items()}


def _scored(split: Split, nll: Any, tokens: Any, sure: Any = None) -> Record:
    stretches = np.array_split(nll - split.nll, min(UNITS, len(nll)))
    teacher = split.top_tokens[:, : tokens.shape[1]]
    return {
        "nll": float(nll.mean()),
        "log_factors": [float(part.mean()) for part in stretches],
        "ratio": float(np.exp(nll.mean() - split.nll.mean())),
        "top1": float((tokens[:, 0] == teacher[:, 0]).mean()),
        "top5": float((tokens[:, :, None] == teacher[:, None, :]).any(1).mean()),
        "full_reads": None if sure is None else 1.0 - float(sure.mean()),
    }


def records_of(ctx: Context, trial: arms.Trial, variants: arms.Variants) -> list[Record]:
    """All of the report's numbers about the heads of an arm."""
    scored = scores(variants, stretch(ctx, "test", trial.seed))
    other = {}
    if "other" in ctx.splits:
        other = scores(variants, stretch(ctx, "other", trial.seed))
    records = []
    for name in variants:
        record = scored[name]
        logging.info("%s: perplexity x%.4f, top-1 %.4f", name, record["ratio"], record["top1"])
        record |= {"other": other[name]} if other else {}
        records.append(record | _described(ctx, trial, name, variants[name]))
    return records


def _described(ctx: Context, trial: arms.Trial, name: str, converted: arms.Converted) -> Record:
    """Settings, cost and times of a head.

    Decoding alternates with the old head in float32, in bfloat16 and in 8 bits, so that each finds
    its weights evicted from the caches, as between two passes of a model.
    """
    hidden = jnp.asarray(np.asarray(ctx.splits["test"].hidden[:1]))
    timed = {"new": converted, **arms.references(ctx)}
    functions = {
        key: functools.partial(
            jax.jit(head.decode) if head.compiled else head.decode, head.arrays, hidden
        )
        for key, head in timed.items()
    }
    seconds = paired_seconds(functions, repeats=ctx.config.timing_repeats, warmup=2)
    new = seconds.pop("new")
    fastest = min(seconds, key=lambda key: statistics.median(seconds[key]))
    return {
        "arm": name,
        "codes": trial.codes,
        "seed": trial.seed,
        "lr": trial.rate,
        "floor": converted.floor,
        "curve": list(converted.curve),
        "decode_ms": 1e3 * statistics.median(new),
        "faster": {key: paired_ratio(times, new) for key, times in seconds.items()},
        "fastest": fastest,
        "decode_speedup": paired_ratio(seconds[fastest], new),
        "cost": dataclasses.asdict(converted.cost),
    }
