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

from experiments import (
    _cli,
    _processes,
    _vq_arms,
    _vq_context,
    _vq_report,
    _vq_rescored,
    _vq_scratch,
)
from experiments._cli import field
from experiments.benchmarks._suite import paired_ratio, paired_seconds
from logitjax import training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What one run of the experiment does."""

    model: str = field("smollm2", "A directory, a .gguf file or a known name; tiny for a toy.")
    data: str = field("tfds:wiki_summaries", "text:PATH, jsonl:PATH or tfds:NAME.")
    splits: tuple[str, ...] = field(
        ("train", "validation", "test"), "What to fit, choose and report on, of a tfds dataset"
    )
    cache_dir: str | None = field(None, "Hidden states for several runs; default WORKDIR/cache.")
    seq_len: int = field(256, "Tokens a row.")
    batch_rows: int = field(8, "Rows at a time through the model.")
    train_tokens: int = field(96_000, "Positions to fit and tune on.")
    validation_tokens: int = field(6_000, "Positions to choose learning rates on.")
    test_tokens: int = field(14_000, "Positions to report on.")
    arm: tuple[str, ...] = field(_vq_arms.ARMS, "Head to convert to")
    codes: tuple[int, ...] = field((2048,), "Sizes of the codebook.")
    seeds: int = field(1, "Runs of each arm at its best learning rate.")
    learning_rate: tuple[float, ...] = field((2e-3,), "Peak; several are tried.")
    steps: int = field(100, "Optimiser steps of each arm.")
    batch_size: int = field(1024, "Positions a step.")
    reassign_every: int = field(25, "Steps between reassignments of vq_likelihood.")
    kmeans_iterations: int = field(8, "Lloyd iterations.")
    pages: tuple[int, ...] = field((64, 128, 256), "Lengths of shortlists, in pages.")
    page_size: int = field(8, "Tokens a page.")
    shortlist_steps: int = field(0, "Steps of a shortlist's own loss after conversion.")
    shortlist_batch: int = field(256, "Positions of each.")
    product_groups: int = field(96, "Groups of product quantisation.")
    product_codes: int = field(256, "Codes a group.")
    packed_groups: int = field(192, "Groups of 16 codes, of product quantisation packed in bytes.")
    screen_rank: int = field(48, "Rank of the low-rank head that screens.")
    candidates: tuple[int, ...] = field((512,), "Tokens that exact rows re-score.")
    adaptive_div: float = field(4.0, "By how much the tails of adaptive softmax narrow.")
    scratch_arm: tuple[str, ...] = field((), "Head to train a small model from scratch with")
    scratch_vocab: int = field(8192, "Vocabulary of that model.")
    scratch_width: int = field(128, "Hidden size of that model.")
    scratch_steps: int = field(200, "Steps of it.")
    scratch_batch: int = field(8, "Rows a step of it.")
    scratch_learning_rate: tuple[float, ...] = field((3e-3,), "Its peak rate; several are tried.")
    scratch_reassign_batches: int = field(40, "Batches that a reassignment looks at.")
    timing_repeats: int = field(20, "Timed decoding steps.")
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.")

    def __post_init__(self) -> None:
        if len(self.splits) != 3:
            raise ValueError(f"--splits: expected three, got {len(self.splits)}")
        for name, known in (("arm", _vq_arms.ARMS), ("scratch_arm", _vq_scratch.ARMS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"--{name}: expected one of {', '.join(known)}, got {unknown[0]}")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        model="tiny",
        data="text:LICENSE",
        seq_len=64,
        train_tokens=600,
        validation_tokens=100,
        test_tokens=200,
        codes=(32,),
        steps=6,
        batch_size=64,
        reassign_every=3,
        kmeans_iterations=3,
        pages=(4,),
        page_size=4,
        shortlist_steps=2,
        shortlist_batch=32,
        product_groups=4,
        product_codes=16,
        packed_groups=8,
        screen_rank=4,
        candidates=(8,),
        scratch_arm=("full_bias", "vq_reassigned", "adaptive"),
        scratch_vocab=128,
        scratch_width=16,
        scratch_steps=6,
        scratch_batch=8,
        scratch_reassign_batches=2,
        timing_repeats=2,
    ),
    "demo": dict(
        train_tokens=24_000,
        validation_tokens=2_000,
        test_tokens=6_000,
        arm=("vq_paper", "vq_bias", "vq_likelihood", "packed_product"),
        codes=(1024, 2048),
        candidates=(128, 512),
        steps=60,
        reassign_every=20,
        kmeans_iterations=5,
    ),
    "report": dict(
        arm=tuple(arm for arm in _vq_arms.ARMS if arm != "full_labels"),
        codes=(2048, 512),
        seeds=3,
        learning_rate=(1e-3, 3e-3),
        steps=60,
        batch_size=512,
        reassign_every=20,
        kmeans_iterations=5,
        shortlist_steps=20,
        scratch_arm=_vq_scratch.ARMS,
        scratch_steps=150,
        scratch_learning_rate=(2e-3, 6e-3),
    ),
    "paper": dict(
        # C4: --data=tfds:c4:en --splits='train[:200000]' --splits='validation[:50%]'
        # --splits='validation[50%:]', it has no test split.
        data="tfds:wikitext103",
        train_tokens=1_000_000,
        validation_tokens=100_000,
        test_tokens=240_000,
        seq_len=1024,
        codes=(512, 2048, 4096, 8192),
        seeds=3,
        learning_rate=(1e-3, 2e-3, 4e-3, 8e-3),
        steps=2000,
        batch_size=8192,
        reassign_every=400,
        kmeans_iterations=20,
        shortlist_steps=500,
        shortlist_batch=4096,
        scratch_arm=_vq_scratch.ARMS,
        scratch_vocab=49_152,
        scratch_width=576,
        scratch_steps=20_000,
        scratch_batch=64,
        scratch_learning_rate=(3e-4, 1e-3, 3e-3),
    ),
}


def run(config: Config, workdir: epath.Path) -> None:
    """Every head from what is cached, then the report."""
    with training.lock_workdir(workdir):
        _convert_all(config, workdir)


def _convert_all(config: Config, workdir: epath.Path) -> None:
    ctx = _vq_context.prepare(config, workdir)
    results = workdir / "results"
    results.mkdir(parents=True, exist_ok=True)
    records = [_converted_record("full", 0, 0, _vq_arms.full(ctx), ctx, config, 0.0)]
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
        print(_vq_report.write(config, ctx, records, scratch, workdir))


def _arm(
    ctx: Any, arm: str, codes: int, config: Config, results: epath.Path
) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    # Learning rates are compared at the first codebook size only.
    first = results / f"{arm}_{config.codes[0]}_0.json"
    known = _processes.agreed(codes != config.codes[0] and first.exists())
    best = json.loads(first.read_text())[0]["lr"] if known else config.learning_rate[0]
    for seed in range(config.seeds):
        path = results / f"{arm}_{codes}_{seed}.json"
        if _processes.agreed(path.exists()):
            found = json.loads(path.read_text())
            best = found[0]["lr"]
            records += found
            continue
        logging.info("%s, %d codes, seed %d", arm, codes, seed)
        rates = config.learning_rate if seed == 0 and not known else (best,)
        tried = [(_vq_arms.convert(ctx, arm, codes, seed, rate, config), rate) for rate in rates]
        if len(tried) > 1:
            held = [_vq_arms.measure(one, ctx, ctx.splits["validation"])["nll"] for one, _ in tried]
            tried = [tried[int(np.argmin(held))]]
        converted, best = tried[0]
        found = [_converted_record(arm, codes, seed, converted, ctx, config, best)]
        if arm == "vq_likelihood":
            found += _shortlists(ctx, converted, codes, seed, best, config)
            if seed == 0 and jax.process_index() == 0:
                training.save_head(converted.head, results.parent / "heads" / f"{arm}_{codes}")
        if arm in _vq_arms.SCREENS:
            for count in config.candidates:
                head = _vq_rescored.screened(ctx, converted, count)
                name = f"screened_{arm}_{count}"
                found.append(_converted_record(name, codes, seed, head, ctx, config, best))
        _processes.write_json(path, found)
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
            head = _vq_rescored.shortlist(ctx, base, pages, config, groups=groups, seed=seed)
            found.append(_converted_record(f"{kind}_{pages}", codes, seed, head, ctx, config, lr))
            if config.shortlist_steps and not groups and pages == config.pages[0]:
                tuned = _vq_rescored.tune_shortlist_tail(ctx, head, seed, lr, config)
                name = f"{kind}_{pages}_tuned"
                found.append(_converted_record(name, codes, seed, tuned, ctx, config, lr))
    return found


def _converted_record(
    arm: str, codes: int, seed: int, converted: Any, ctx: Any, config: Config, lr: float
) -> dict[str, Any]:
    full = _vq_arms.full(ctx)
    hidden = jnp.asarray(np.asarray(ctx.splits["test"].hidden[:1]))
    jitted = {"full": (jax.jit(full.top_k), full.params)}
    jitted["new"] = (jax.jit(converted.decode or converted.top_k), converted.params)
    functions = {name: lambda f=f, p=p: f(p, hidden) for name, (f, p) in jitted.items()}
    seconds = paired_seconds(functions, repeats=config.timing_repeats, warmup=2)
    speedup = paired_ratio(seconds["full"], seconds["new"])
    # Times of training are taken once an arm: they do not depend on what was learnt.
    training_speedup = _training_speedup(ctx, converted, config) if seed == 0 else None
    record = _vq_arms.measure(converted, ctx, ctx.splits["test"])
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
    full, new = _vq_arms.training_step(_vq_arms.full(ctx)), _vq_arms.training_step(converted)
    if full is None or new is None:
        return None
    seconds = paired_seconds({"full": lambda: full(*batch), "new": lambda: new(*batch)}, repeats=3)
    return paired_ratio(seconds["full"], seconds["new"])


def _scratch(ctx: Any, arm: str, config: Config, results: epath.Path) -> list[dict[str, Any]]:
    records = []
    best = config.scratch_learning_rate[0]
    for seed in range(config.seeds):
        path = results / f"scratch_{arm}_{seed}.json"
        if not _processes.agreed(path.exists()):
            logging.info("from scratch: %s, seed %d", arm, seed)
            text = _vq_scratch.text_of(ctx, config)
            rates = config.scratch_learning_rate if seed == 0 else (best,)
            tried = [
                _vq_scratch.train(ctx, text, arm, seed, rate, config) | {"lr": rate}
                for rate in rates
            ]
            chosen = min(tried, key=lambda record: record["validation_nll"])
            _processes.write_json(path, chosen | {"arm": arm, "seed": seed, "scratch": True})
            _processes.wait_for_all(f"wrote {path.name}")
        record = json.loads(path.read_text())
        best = record["lr"]
        records.append(record)
    return records


if __name__ == "__main__":
    _cli.main(Config, PRESETS, run)
