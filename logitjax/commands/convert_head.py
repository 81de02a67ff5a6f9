"""Replace a model's output head with a vector-quantised approximation.

    logitjax convert-head --model=smollm2 --data=tfds:wiki_summaries --out=runs/head
    logitjax convert-head --model=DIR --data=text:FILE --kind=screened --out=DIR2

It reads the text once and caches the hidden states. It then fits codes to the rows of the original
head and tunes them to reproduce its distribution. OUT/head is the new head, and OUT/report.md
compares perplexity on held-out text and size before and after. `logitjax generate`, `serve` and
`score` decode with it, given `--model` and `--head=OUT`. By default several tokens share a code,
and each token has a bias. With `--kind=screened`, packed product codes scan all tokens and exact
rows rescore the best 512: fastest on a CPU, slowest to tune. You may stop the run at any time; the
same command continues it.
docs/vq_logits.md explains what to expect.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
from etils import epath

from logitjax import data, models, processes, storage, training, vq
from logitjax.commands.cli import REQUIRED, field, nested
from logitjax.commands.tables import markdown_table
from logitjax.commands.work import check_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model, the kind of head, and the text to fit it on."""

    model: str = field(REQUIRED, "Model with a linear or tied head.")
    data: str = field(REQUIRED, "Text to fit on: jsonl:PATH, hf:ORG/NAME, and so on.")
    on_error: Literal["raise", "skip"] = field(
        "raise", "Whether a malformed row is an error or is skipped."
    )
    seq_len: int = field(256, "Number of tokens in a row.", minimum=2)
    batch_rows: int = field(8, "Number of rows that the model reads at once.", minimum=1)
    held_out_tokens: int = field(10_000, "Number of held-out positions for the report.", minimum=1)
    convert: vq.ConvertConfig = nested(vq.ConvertConfig(num_codes=2048))
    dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type of the model.")
    mesh: str = field("data:-1", "Axes and sizes of the device mesh.", execution=True)


def run(config: Config, out: epath.Path) -> None:
    """Pack, convert, and measure both heads on text that neither was fitted to."""
    check_length(config.model, config.seq_len)
    model, tokenizer = models.load(config.model, dtype=config.dtype, layout="listed")
    mesh = training.make_mesh(config.mesh, partial=True)
    packed = data.pack_splits(
        config.data,
        {"model": tokenizer},
        seq_len=config.seq_len,
        on_error=config.on_error,
        directory=out / "data",
    ).splits
    conversion = config.convert.convert(
        model,
        _batches(packed["train"], config.batch_rows),
        out,
        source=_source(packed["train"], config),
        mesh=mesh,
    )
    storage.progress.mark("comparing both heads on held-out text", log=True)
    with processes.first_before_others("held-out hidden states"):
        held_out = vq.HiddenCache.of(
            model,
            _batches(packed["test"], config.batch_rows),
            out / "held_out",
            max_tokens=config.held_out_tokens,
            source=_source(packed["test"], config),
        )
    if jax.process_index() == 0:
        text = _report(config, model, conversion.model, held_out)
        storage.write_atomic(out / "report.md", text)
        print(text)


def _batches(packed: data.PackedDataset, rows: int) -> Iterator[Mapping[str, Any]]:
    """Batches of at most an epoch, in an order that depends only on the number of rows."""
    # A small text has fewer rows than a batch, which must still yield one batch.
    rows = min(rows, len(packed))
    for step in range(len(packed) // rows):
        yield packed.batch(step, seed=0, batch_size=rows)["model"]


def _source(packed: data.PackedDataset, config: Config) -> str:
    return f"{packed.fingerprint}, {config.batch_rows} rows a batch"


def _report(config: Config, old: Any, new: Any, held_out: Any) -> str:
    qualities = [held_out.measure(model) for model in (old, new)]
    table = []
    for name, model, quality in zip(("before", "after"), (old, new), qualities, strict=True):
        cost = model.head.cost(model.embedding[...])
        row = {"head": f"{name}: {type(model.head).__name__}", "perplexity": quality.perplexity}
        row |= {"top-1 accuracy": quality.accuracy, "parameters of its own": cost.parameters}
        sizes = {"MB stored": cost.stored_bytes / 1e6, "MB read per token": cost.read_bytes / 1e6}
        table.append(row | sizes)
    before, after = qualities
    # Perplexity may be equal while heads disagree, which greedy decoding reveals.
    same = float((before.tokens == after.tokens).mean())
    return (
        f"# `{config.model}`: its head replaced with a {type(new.head).__name__}\n\n"
        f"{markdown_table(table)}\n\n"
        f"On {len(held_out):,} held-out positions of `{config.data}`. Perplexity changes by a "
        f"factor of {after.perplexity / before.perplexity:.4g}; the most likely token is the same "
        f"at {same:.1%} of them.\n"
    )
