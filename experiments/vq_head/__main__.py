"""Replace a model's output head by a vector-quantised one, and by its competitors.

    python -m experiments.vq_head --preset=demo --workdir=runs/vq_head

reads text and computes the model's hidden states and its own head's distribution once. It then fits
and tunes one head after another on the cache: rows of 8 and 4 bits, alone and as screens for exact
rows; packed product codes as screens; pages of rows; vector-quantised heads; FlashHead, SVD-softmax
and FAISS' fast scan, rebuilt; adaptive softmax. With `--preset=heads --test_data=text:FILE` heads
are fitted on one text and reported on another too; `--model=` takes any model.

`report.md` has each head's bytes, held-out perplexity relative to the untouched head, agreement in
the first and first five tokens, and times beside the old head in float32, bfloat16 and 8 bits.

All arms (`--arm`, repeatable) are tuned to the old head's distribution but `adaptive`, to the text.
With several learning rates each arm picks its own on validation data, with the first seed at the
first size of the codebook. You may kill it at any time: finished arms are kept.
"""

import functools

import jax
from etils import epath

from experiments.shared.records import best_of, tuned_seeds
from experiments.vq_head import data, measure, report, train
from experiments.vq_head.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Fit every head on the cache, then write the report."""
    results = workdir / "results"
    ctx = data.prepare(config, workdir)
    # Its losses vary only where each seed has a stretch of its own.
    runs = tuned_seeds(
        lambda seed: results / f"full_{seed}.json",
        config.seeds if config.stretches else 1,
        (0.0,),
        functools.partial(measure.run_arm, ctx, workdir, "full", 0),
    )
    records = [record for run in runs for record in run["records"]]
    rates: dict[str, float] = {}
    for codes in config.codes:
        for arm in config.arm:
            # Arms without a codebook are the same whatever its size.
            if codes != config.codes[0] and not arm.startswith(config.code_arm or "vq"):
                continue
            # Learning rates are compared at the first codebook size only.
            tried = (rates[arm],) if arm in rates else config.learning_rate
            runs = tuned_seeds(
                lambda seed, arm=arm, codes=codes: results / f"{arm}_{codes}_{seed}.json",
                config.seeds,
                tried,
                functools.partial(measure.run_arm, ctx, workdir, arm, codes),
            )
            rates[arm] = runs[0]["lr"]
            records += [record for run in runs for record in run["records"]]
    scratch = []
    for arm in config.scratch_arm:
        trained = functools.partial(train.train, ctx, workdir / "scratch", arm)
        scratch += tuned_seeds(
            lambda seed, arm=arm: results / f"scratch_{arm}_{seed}.json",
            config.seeds,
            config.scratch_learning_rate,
            lambda seed, rates, run=trained: best_of(functools.partial(run, seed), rates),
        )
    if jax.process_index() == 0:
        print(report.write(ctx, records, scratch, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)
