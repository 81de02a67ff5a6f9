"""Cache teachers' logits on disk, to train without the teachers in memory.

    logitjax cache-logits --teacher=hf:org/teacher --student=smollm2 \\
        --data=text:FILE --out=runs/cache

It packs the text and writes, for each teacher and split, the top logits of every position with the
log-sum-exp, mean and standard deviation of all to OUT/source0, OUT/source1, ... Then

    logitjax distill --student=smollm2 --teacher=cache:runs/cache/source0 --data=text:FILE ...

trains from the cache without loading the teacher. Both commands must pack the same rows, so give
them the same --student, teachers, --data and --seq_len; otherwise an error names the difference.
`--teacher=api:URL` queries a server on this machine instead.

The size on disk is logged before reading begins. You may stop the run at any time; the same command
continues it. Several processes share the work, each with its own devices.
"""

import dataclasses

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, distillation, models
from logitjax.commands.cli import field, nested
from logitjax.commands.tables import markdown_table
from logitjax.data import SPLITS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The teachers, the text, and the values to keep."""

    student: str = field("smollm2", "Model that will be trained; its tokenizer packs the rows.")
    reading: distillation.Reading = nested(
        distillation.Reading(data="tfds:wiki_summaries", teachers=("smollm2",)),
        without=["terms", "teacher_reads"],
        rename={"teachers": "teacher", "top_k": "cache_top_k"},
    )
    rows: str = field(
        "all", "Rows to read from each split: all, or a number of rows from the start."
    )
    splits: tuple[str, ...] = field(SPLITS, "Split to read.")
    likelihoods: bool = field(
        False, "Also cache likelihoods of labels and of word beginnings, for alm."
    )


def _wanted(config: Config, dataset: data.PackedDataset) -> np.ndarray:
    if config.rows == "all":
        return np.arange(len(dataset))
    if not config.rows.isdigit() or int(config.rows) < 1:
        raise ValueError(f"rows: expected all or a positive number, got {config.rows!r}")
    return np.arange(min(int(config.rows), len(dataset)))


def run(config: Config, out: epath.Path) -> None:
    """Pack, estimate, read."""
    unknown = sorted(set(config.splits) - set(SPLITS))
    if unknown:
        raise ValueError(f"splits: expected some of {', '.join(SPLITS)}, got {unknown[0]!r}")
    reading = config.reading
    if config.likelihoods:
        # Needs are derived from terms; this term requires likelihoods.
        reading = dataclasses.replace(reading, terms=(distillation.terms.ALM(),))
    tokenizer = models.load_tokenizer(config.student)
    packed = reading.pack(tokenizer, out / "data")
    rows = {split: _wanted(config, packed.splits[split]) for split in config.splits}
    _announce(reading, packed, rows)
    corpus = reading.load(packed, rows, out)
    table = []
    for name, spec in zip(reading.names, reading.teachers, strict=True):
        for split, cache in corpus.sources[name].caches.items():
            files = cache.directory.glob("*.array_record")
            size = sum(path.stat().length for path in files)
            row = {"cache": f"{name}/{split}", "model": spec, "rows": len(cache)}
            table.append(row | {"k": cache.identity.k, "MB": size / 1e6})
    if jax.process_index() == 0:
        text = markdown_table(table)
        uses = " ".join(f"--teacher=cache:{out / name}" for name in reading.names)
        text += (
            f"\n\nTrain from it: logitjax distill --student={config.student} {uses} "
            f"--data={reading.data} --seq_len={reading.seq_len} ...\n"
        )
        (out / "report.md").write_text(text)
        print(text)


def _announce(
    reading: distillation.Reading, packed: data.PackedSplits, rows: dict[str, np.ndarray]
) -> None:
    """Log the maximum size of the cache, before a model is loaded."""
    for name, spec in zip(reading.names, reading.teachers, strict=True):
        tokenizer = packed.tokenizers[packed.names[name]]
        identity = distillation.TeacherIdentity(
            model=spec,
            tokenizer=tokenizer.fingerprint,
            # This identity is never read: only the width of its rows is used.
            data="",
            vocab_size=tokenizer.vocab_size,
            # The last token predicts nothing.
            positions=reading.seq_len - 1,
            k=reading.top_k,
            tail_samples=reading.tail_samples,
            likelihoods=reading.likelihoods,
        )
        count = sum(map(len, rows.values()))
        logging.info(
            "%s: %d rows of %d positions, top %d: %.1f MB on disk",
            spec,
            count,
            identity.positions,
            identity.k,
            count * identity.bytes_per_row / 1e6,
        )
