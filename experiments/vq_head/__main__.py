"""Replace a model's output head by a vector-quantised one, beside its baselines.

    python -m experiments.vq_head --preset=demo --workdir=runs/vq_head

reads text, computes the model's hidden states once, lets its own head speak once, and then fits and
tunes one head after another on what is cached: codes with and without biases, with the mapping of
the paper and with better ones, shortlists re-scored with exact and with product-quantised rows,
low-rank, product-quantised and adaptive heads, all but the last also as screens for exact rows, and
as a control the full head tuned on that text.
``report.md`` gets what is left of the head's bytes, held-out perplexity against the untouched head
and against the tuned one with biases, agreement in the first and first five tokens, and times.

Arms (``--arm``, repeatable) are tuned to the old head's distribution, those that end in ``_labels``
and ``adaptive`` to the text. With several learning rates each arm picks its own on validation data
with the first seed at the first size of the codebook. Kill it whenever you like: finished arms are
kept.
"""

import dataclasses
import json
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from experiments.shared.timing import paired_ratio, paired_seconds
from experiments.vq_head import arms, context, report, rescored
from experiments.vq_head import scratch as vq_head_scratch
from experiments.vq_head.config import PRESETS, Config
from logitjax import processes, training, vq
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Every head from what is cached, then the report."""
    with training.lock_workdir(workdir):
        _convert_all(config, workdir)


def _convert_all(config: Config, workdir: epath.Path) -> None:
    ctx = context.prepare(config, workdir)
    results = workdir / "results"
    results.mkdir(parents=True, exist_ok=True)
    records = [_converted_record("full", 0, 0, arms.full(ctx), ctx, config, 0.0)]
    for codes in config.codes:
        for arm in config.arm:
            # Arms without a codebook are the same whatever its size, but for the low rank.
            if codes == config.codes[0] or arm.startswith("vq") or arm == "low_rank":
                records += _arm(ctx, arm, codes, config, results)
    scratch = [
        record for arm in config.scratch_arm for record in _scratch(ctx, arm, config, results)
    ]
    if jax.process_index() == 0:
        with (workdir / "metrics.jsonl").open("w") as file:
            for record in [*records, *scratch]:
                file.write(json.dumps(record) + "\n")
        print(report.write(config, ctx, records, scratch, workdir))


def _arm(
    ctx: Any, arm: str, codes: int, config: Config, results: epath.Path
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    # Learning rates are compared at the first codebook size only.
    first = results / f"{arm}_{config.codes[0]}_0.json"
    known = processes.broadcast_from_first(lambda: codes != config.codes[0] and first.exists())
    best = json.loads(first.read_text())[0]["lr"] if known else config.learning_rate[0]
    for seed in range(config.seeds):
        path = results / f"{arm}_{codes}_{seed}.json"
        if processes.broadcast_from_first(path.exists):
            found = json.loads(path.read_text())
            best = found[0]["lr"]
            records += found
            continue
        logging.info("%s, %d codes, seed %d", arm, codes, seed)
        rates = config.learning_rate if seed == 0 and not known else (best,)
        tried = [(arms.convert(ctx, arm, codes, seed, rate, config), rate) for rate in rates]
        if len(tried) > 1:
            held = [arms.measure(one, ctx, ctx.splits["validation"])["nll"] for one, _ in tried]
            tried = [tried[int(np.argmin(held))]]
        converted, best = tried[0]
        found = [_converted_record(arm, codes, seed, converted, ctx, config, best)]
        if arm == "vq_likelihood":
            found += _shortlists(ctx, converted, codes, seed, best, config)
            if seed == 0 and jax.process_index() == 0:
                vq.save_head(converted.head, results.parent / "heads" / f"{arm}_{codes}")
        if arm in arms.SCREENS:
            for count in config.candidates:
                head = rescored.screened(ctx, converted, count)
                name = f"screened_{arm}_{count}"
                found.append(_converted_record(name, codes, seed, head, ctx, config, best))
        processes.write_json(path, found)
        records += found
    return records


def _shortlists(
    ctx: Any, base: Any, codes: int, seed: int, lr: float, config: Config
) -> list[dict[str, Any]]:
    found = []
    for pages in config.pages:
        for groups in (0, config.product_groups):
            kind = "shortlist_product" if groups else "shortlist"
            if groups and pages != config.pages[-1]:
                continue
            head = rescored.shortlist(ctx, base, pages, config, groups=groups, seed=seed)
            found.append(_converted_record(f"{kind}_{pages}", codes, seed, head, ctx, config, lr))
            if config.shortlist_steps and not groups and pages == config.pages[0]:
                tuned = rescored.tune_shortlist_tail(ctx, head, seed, lr, config)
                name = f"{kind}_{pages}_tuned"
                found.append(_converted_record(name, codes, seed, tuned, ctx, config, lr))
    return found


def _converted_record(
    arm: str, codes: int, seed: int, converted: Any, ctx: Any, config: Config, lr: float
) -> dict[str, Any]:
    full = arms.full(ctx)
    hidden = jnp.asarray(np.asarray(ctx.splits["test"].hidden[:1]))
    jitted = {"full": (jax.jit(full.top_k), full.params)}
    jitted["new"] = (jax.jit(converted.decode or converted.top_k), converted.params)
    functions = {name: lambda f=f, p=p: f(p, hidden) for name, (f, p) in jitted.items()}
    seconds = paired_seconds(functions, repeats=config.timing_repeats, warmup=2)
    speedup = paired_ratio(seconds["full"], seconds["new"])
    # Times of training are taken once an arm: they do not depend on what was learnt.
    training_speedup = _training_speedup(ctx, converted, config) if seed == 0 else None
    record = arms.measure(converted, ctx, ctx.splits["test"])
    logging.info(
        "%s, %d codes: perplexity x%.4f, top-1 %.4f", arm, codes, record["ratio"], record["top1"]
    )
    return record | {
        "arm": arm,
        "codes": codes,
        "seed": seed,
        "lr": lr,
        "floor": converted.floor,
        "curve": list(converted.curve),
        "moved": list(converted.moved),
        "decode_ms": 1e3 * statistics.median(seconds["new"]),
        "decode_speedup": speedup,
        "training_speedup": training_speedup,
        "cost": dataclasses.asdict(converted.cost),
    }


def _training_speedup(ctx: Any, converted: Any, config: Config) -> float | None:
    """Loss and gradients of the full head, blocked as all linear losses, over those of this one."""
    train, count = ctx.splits["train"], config.shortlist_batch
    batch = (jnp.asarray(np.asarray(train.hidden[:count])), jnp.asarray(train.labels[:count]))
    full, new = arms.training_step(arms.full(ctx)), arms.training_step(converted)
    if full is None or new is None:
        return None
    seconds = paired_seconds({"full": lambda: full(*batch), "new": lambda: new(*batch)}, repeats=3)
    return paired_ratio(seconds["full"], seconds["new"])


def _scratch(ctx: Any, arm: str, config: Config, results: epath.Path) -> list[dict[str, Any]]:
    records = []
    best = config.scratch_learning_rate[0]
    for seed in range(config.seeds):
        path = results / f"scratch_{arm}_{seed}.json"
        if not processes.broadcast_from_first(path.exists):
            logging.info("from scratch: %s, seed %d", arm, seed)
            text = vq_head_scratch.text_of(ctx, config)
            rates = config.scratch_learning_rate if seed == 0 else (best,)
            tried = [
                vq_head_scratch.train(ctx, text, arm, seed, rate, config) | {"lr": rate}
                for rate in rates
            ]
            chosen = min(tried, key=lambda record: record["validation_nll"])
            processes.write_json(path, chosen | {"arm": arm, "seed": seed, "scratch": True})
            processes.barrier(f"wrote {path.name}")
        record = json.loads(path.read_text())
        best = record["lr"]
        records.append(record)
    return records


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)
