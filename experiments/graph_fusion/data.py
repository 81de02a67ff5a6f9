"""Rows of text that graph fusion trains on, and what the sources say about them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from experiments.graph_fusion.config import Config
from logitjax import data, models, training
from logitjax.distillation import objectives, sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Packed rows of every split beside the sources' statistics.

    Attributes:
        packed: The rows, under every model's tokenizer.
        sources: What each source says, by its name.
    """

    packed: data.PackedSplits
    sources: Mapping[str, sources.Source]

    def batch(self, split: str, rows: Mapping[str, Any], *, distil: bool) -> dict[str, Any]:
        """The pivot's columns of some rows, with the sources' statistics if they are wanted."""
        batch: dict[str, Any] = {"pivot": dict(self.packed.columns(rows, "pivot"))}
        if distil:
            batch["sources"] = {
                name: source.statistics(split, rows) for name, source in self.sources.items()
            }
        return batch

    def scored(self, split: str, config: Config, mesh: Mesh) -> Iterator[dict[str, Any]]:
        """This process's held-out batches, with the first source's choices where they compare."""
        index, count = training.process_slice(mesh)
        first = next(iter(self.sources.values()))
        rows = self.packed.splits[split].iterate_once(
            batch_size=config.batch_size,
            process_index=index,
            process_count=count,
            max_rows=config.eval_rows,
        )
        for row in rows:
            batch = self.batch(split, row, distil=False)
            if first.columns == self.packed.names["pivot"]:
                batch["agreement"] = first.statistics(split, row)[0].indices[..., 0]
            yield batch


def source_names(config: Config) -> tuple[str, ...]:
    """The names of the sources in batches and folders, in the order of the flags."""
    return tuple(f"source{i}" for i in range(len(config.source)))


def load_corpus(config: Config, tokenizer: models.Tokenizer, workdir: epath.Path) -> Corpus:
    """Packs the text and lets each source read the rows that some run visits.

    Raises:
        ValueError: An arm needs one vocabulary and a source has another, or `config.teacher` names
            no cache.
    """
    specs = dict(zip(source_names(config), config.source, strict=True))
    tokenizers = {"pivot": tokenizer}
    tokenizers |= {name: models.load_tokenizer(spec) for name, spec in specs.items()}
    packed = data.pack_splits(
        config.data,
        tokenizers,
        seq_len=config.seq_len,
        on_error=config.on_error,
        directory=workdir / "data",
    )
    foreign = [name for name in specs if packed.names[name] != packed.names["pivot"]]
    same = next((loss for loss in ("kl", objectives.DUAL) if loss in config.loss), None)
    if same and foreign:
        raise ValueError(
            f"loss {same!r} needs one vocabulary, but source {specs[foreign[0]]!r} has another "
            "tokenizer than the pivot; use uld, gld or uld+gld"
        )
    distils = any(loss != "sft" for loss in config.loss)
    needed = sources.visited_rows(
        packed,
        steps=config.steps,
        batch_size=config.batch_size,
        seeds=config.seeds if distils else 0,
        eval_rows=config.eval_rows,
    )
    # Each process lets the sources read its own share, on its own devices.
    here = training.make_mesh("fsdp:-1", devices=jax.local_devices())
    options = dict(dtype=config.dtype, layout=config.layout, remat=config.remat)
    found = {}
    for i, (name, spec) in enumerate(specs.items()):
        columns = packed.names[name]
        if i < len(config.teacher):
            kind, _, place = config.teacher[i].partition(":")
            if kind != "cache" or not place:
                raise ValueError(f"teacher: expected cache:DIR, got {config.teacher[i]!r}")
            caches = sources.open_teacher_caches(
                epath.Path(place), packed, tokenizers[name].fingerprint, needed
            )
        else:
            caches = sources.cache_teacher(
                spec,
                functools.partial(models.load, spec, mesh=here, **options),
                columns=columns,
                packed=packed,
                rows=needed,
                k=config.cache_top_k,
                batch_size=config.batch_size,
                directory=workdir / "sources" / name,
            )
        found[name] = sources.Source(columns, packed, caches)
    return Corpus(packed=packed, sources=found)
