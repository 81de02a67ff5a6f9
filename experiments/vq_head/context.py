"""What all converted heads share: cached hidden states, the old head's targets, token counts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from experiments.shared.small_text import count_tokens
from logitjax import data, models, processes, training, vq

BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Split:
    """Cached positions of one split and what the old head says on them."""

    hidden: np.ndarray
    labels: np.ndarray
    targets: vq.HeadTargets

    def head(self, count: int) -> "Split":
        """The first positions only; sums over all positions are not cut."""
        top = {
            name: getattr(self.targets, name)[:count] for name in ("top_probs", "top_tokens", "nll")
        }
        return Split(
            np.asarray(self.hidden[:count]),
            self.labels[:count],
            dataclasses.replace(self.targets, **top),
        )


@dataclasses.dataclass(frozen=True)
class Context:
    """The old head, the text, and a cache of k-means fits.

    Attributes:
      rows: ``[vocab, hidden]`` of the old head.
      row_bias: its bias or None.
      tied: whether the rows are the input embedding.
      trunk_parameters: parameters of everything but the head's rows.
      unigram: ``[vocab]`` counts over the whole training text, plus a tenth.
      statistics: moments of the training hidden states.
      splits: ``train``, ``validation``, ``test``.
      packed: the rows of tokens.
      mesh: over which the positions of a step are split.
    """

    rows: jax.Array
    row_bias: jax.Array | None
    tied: bool
    trunk_parameters: int
    unigram: jax.Array
    statistics: vq.HeadStatistics
    splits: Mapping[str, Split]
    packed: Mapping[str, data.PackedDataset]
    mesh: Any

    @property
    def vocab(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def fit(self, method: str, codes: int, seed: int, iterations: int) -> vq.VQFit:
        return vq.fit_assignment(
            self.rows,
            self.unigram,
            self.statistics.mean,
            self.statistics.cov,
            codes,
            method=method,
            row_bias=self.row_bias,
            key=jax.random.key(seed),
            iterations=iterations,
        )

    def __hash__(self) -> int:
        return id(self)


def prepare(config: Any, workdir: epath.Path) -> Context:
    """Packs text, runs the model once, runs its head once; all of it is kept on disk."""
    with processes.first_before_others("hidden states"):
        return _prepare(config, workdir)


def _prepare(config: Any, workdir: epath.Path) -> Context:
    root = epath.Path(config.cache_dir or workdir / "cache")
    model, tokenizer = models.load(config.model, layout="listed")
    packed = {
        name: data.pack(
            examples, {"model": tokenizer}, seq_len=config.seq_len, directory=root / "packed" / name
        )
        for name, examples in _examples(config).items()
    }
    head = model.head_of()
    rows, row_bias = jnp.asarray(head.rows, jnp.float32), head.bias
    sizes = {
        "train": config.train_tokens,
        "validation": config.validation_tokens,
        "test": config.test_tokens,
    }
    splits = {}
    for name, size in sizes.items():
        cache = vq.cache_hidden_states(
            model,
            _batches(packed[name], config),
            root / f"hidden_{name}",
            max_tokens=size,
            source=f"{packed[name].fingerprint}, {config.batch_rows} rows a batch",
        )
        targets = vq.cached_head_targets(
            root / f"targets_{name}",
            cache,
            rows,
            row_bias,
            soft_cap=model.config.logits_softcap,
        )
        splits[name] = Split(cache.hidden, cache.labels, targets)
    total = sum(x.size for x in jax.tree.leaves(_params(model)))
    tied = model.config.tie_embeddings
    return Context(
        rows=rows,
        row_bias=None if row_bias is None else jnp.asarray(row_bias),
        tied=tied,
        trunk_parameters=total - rows.size * (1 if tied else 2),
        unigram=jnp.asarray(count_tokens(packed["train"], len(rows)) + 0.1, jnp.float32),
        statistics=vq.head_statistics(splits["train"].hidden),
        splits=splits,
        packed=packed,
        mesh=training.make_partial_mesh(config.mesh),
    )


def in_blocks(fn: Callable[..., Any], *arrays: np.ndarray) -> Any:
    """`fn` over blocks of positions, results joined on the host; the last block is padded."""
    count = len(arrays[0])
    size = min(BLOCK, count)
    parts = []
    for start in range(0, count, size):
        block = [np.asarray(x[start : start + size]) for x in arrays]
        here = len(block[0])
        block = [np.pad(x, [(0, size - here)] + [(0, 0)] * (x.ndim - 1)) for x in block]
        parts.append(jax.tree.map(lambda x, n=here: np.asarray(x)[:n], fn(*block)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def _examples(config: Any) -> Mapping[str, data.Examples]:
    if not config.data.startswith("tfds:"):
        return data.load_splits(config.data, on_error="raise")
    names = ("train", "validation", "test")
    return {
        name: data.load_examples(config.data, split=split)
        for name, split in zip(names, config.splits, strict=True)
    }


def _batches(packed: data.PackedDataset, config: Any) -> Iterator[Mapping[str, Any]]:
    step = 0
    # An epoch at most: then the split is smaller than what was asked for.
    while (step + 1) * config.batch_rows <= max(len(packed), config.batch_rows):
        yield packed.batch(step, seed=0, batch_size=config.batch_rows)["model"]
        step += 1


def _params(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
