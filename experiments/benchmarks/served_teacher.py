"""Size and time of a teacher's answer: hidden states from a server beside top logits on disk.

    python -m experiments.benchmark served_teacher

The teacher is SmolLM2-135M-Instruct, the text packaged Wikipedia summaries, four rows of 128 tokens
a batch. ``seconds a batch`` is a training's wait: for a teacher that reads beside it, for a server
on the loopback interface that does, with its 16-bit hidden states or a low-rank code of them, or
for a cache written before (``written``: the seconds of writing). ``bytes`` are those of a learned
position, as sent or on disk; logits in 16 bits would have two for each token. ``KL lost`` is
KL(teacher || what arrives), mean over positions; top logits do not tell how the rest is
distributed, and ``rest`` is its share of the mass.
"""

import time
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.shared import suite
from experiments.shared.peers import serving
from logitjax import distillation, losses, models

_RANKS = (64, 256)


def run(options: suite.Options) -> suite.Result:
    smoke, root = options.smoke, epath.Path(options.directory)
    spec, length, batches = ("tiny:1", 32, 2) if smoke else ("smollm2", 128, 4)
    _, tokenizer = models.load(spec)
    vocab, width = (getattr(models.load_config(spec), n) for n in ("vocab_size", "hidden_size"))
    rows_of = [np.arange(4 * i, 4 * i + 4) for i in range(batches)]

    def corpus(teacher: str, name: str, **more: Any) -> distillation.Corpus:
        kinds = {"cache": distillation.terms.KL(), "live": distillation.terms.FullKL()}
        reads = more.pop("reads", "live")
        reading = distillation.Reading(
            data="text:LICENSE" if smoke else "tfds:wiki_summaries",
            teachers=(teacher,),
            teacher_reads=reads,
            seq_len=length,
            top_k=8 if smoke else 64,
            terms=(kinds[reads],),
            **more,
        )
        packed = reading.pack(tokenizer, root / options.scale / "rows")
        entries = {"train": np.concatenate(rows_of)}
        return reading.load(packed, entries, root / options.scale / name)

    def read(corpus: distillation.Corpus) -> tuple[list[Any], float]:
        split, seconds, views = corpus.packed.splits["train"], [], []
        source = corpus.sources["source0"]
        for numbers in (rows_of[0], *rows_of):
            batch = split.rows(numbers)
            begin = time.perf_counter()
            views.append(source.view("train", batch))
            seconds.append(time.perf_counter() - begin)
        return views[1:], float(np.median(seconds[1:]))

    exact = corpus(spec, "live")
    wheres = [
        exact.packed.splits["train"].rows(numbers)["pivot"]["loss_mask"][:, 1:]
        for numbers in rows_of
    ]
    head = exact.constants["teachers"]["source0"]
    here, seconds = read(exact)

    @jax.jit
    def lost(whole: Any, served: Any, head: Any) -> Any:
        return losses.linear_kl_divergence(served, head, whole, head)

    table = [
        {"teacher": "logits in 16 bits", "bytes": 2 * vocab},
        {"teacher": "reads beside it", "seconds a batch": seconds, "KL lost": 0.0},
    ]
    flags = ("--hidden_states", "--max_length=256", f"--model={spec}")
    with serving(*flags) as (address, _):
        for rank in (0, *(() if smoke else _RANKS)):
            far = corpus(f"api:{address}", "served", served_rank=rank)
            far.metrics()
            views, seconds = read(far)
            entries = {name.partition("/")[2]: a / b for name, (a, b) in far.metrics().items()}
            pairs = zip(here, views, wheres, strict=True)
            kls = [np.asarray(lost(a.hidden, b.hidden, head))[where] for a, b, where in pairs]
            table.append(
                {
                    "teacher": f"served, rank {rank}" if rank else "served, hidden states",
                    "bytes": entries["bytes_a_position"],
                    "seconds a batch": seconds,
                    "KL lost": float(np.concatenate(kls).mean()),
                    "error of the states": entries["rank_error"],
                }
            )
    for tail in (0, 8 if smoke else 64):
        begin = time.perf_counter()
        cached = corpus(spec, f"cached-{tail}", reads="cache", tail_samples=tail)
        written = (time.perf_counter() - begin) / batches
        views, seconds = read(cached)
        folder = root / options.scale / f"cached-{tail}" / "source0" / "train"
        # Positions without a label are written too.
        size = sum(file.stat().length for file in folder.iterdir() if file.suffix != ".json")
        rest = [
            1 - np.exp(v.top.values - v.top.log_z[..., None]).sum(-1)[where]
            for v, where in zip(views, wheres, strict=True)
        ]
        table.append(
            {
                "teacher": f"cache, top {views[0].top.values.shape[-1]} and {tail} draws",
                "bytes": size / sum(where.sum() for where in wheres),
                "seconds a batch": seconds,
                "written": written,
                "rest": float(np.concatenate(rest).mean()),
            }
        )
    share = table[2]["bytes"] / (2 * vocab)
    bars = [suite.at_most("hidden states / logits, bytes", share, (width + 2) / vocab)]
    return suite.Result(rows=table, bars=bars)
