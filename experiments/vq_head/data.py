"""Data that converted heads share: cached hidden states, the old head's targets, token counts."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.shared.small_text import Text, count_tokens, pack_splits, small_text
from experiments.vq_head.config import Config
from logitjax import data, losses, models, ops, processes, training, vq

BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Split:
    """Cached positions of one split, and the old head's losses and best tokens there.

    The whole of the old head's distribution is known for training positions only.
    """

    hidden: np.ndarray
    labels: np.ndarray
    nll: np.ndarray
    top_tokens: np.ndarray
    targets: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """The old head, the text, and a cache of k-means fits.

    Attributes:
        rows: `[vocab, hidden]` of the old head.
        row_bias: Its bias or None.
        tied: Whether the rows are the input embedding.
        unigram: `[vocab]` counts over the whole training text, plus a tenth.
        statistics: Moments of the training hidden states.
        splits: `train`, `validation`, `test`, and `other`, of other text, if there is one.
        mesh: Mesh over which the positions of a step are split.
    """

    config: Config
    rows: jax.Array
    row_bias: jax.Array | None
    tied: bool
    unigram: jax.Array
    statistics: Any
    splits: Mapping[str, Split]
    packed: Mapping[str, data.PackedDataset]
    mesh: jax.sharding.Mesh

    @property
    def vocab(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @functools.cached_property
    def text(self) -> Text:
        """Text over the small vocabulary of models that are trained from scratch."""
        return small_text(self.packed, np.asarray(self.unigram), self.config.scratch_vocab)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def fit(self, method: Any, codes: int, seed: int) -> Any:
        return vq.fit_assignment(
            self.rows,
            self.unigram,
            self.statistics.mean,
            self.statistics.cov,
            codes,
            method=method,
            row_bias=self.row_bias,
            key=jax.random.key(seed),
            iterations=self.config.kmeans_iterations,
        )


def prepare(config: Config, workdir: epath.Path) -> Context:
    """Packs text, runs the model once, runs its head once; everything is kept on disk."""
    with processes.first_before_others("hidden states"):
        return _prepare(config, workdir)


def _prepare(config: Config, workdir: epath.Path) -> Context:
    root = epath.Path(config.cache_dir or workdir / "cache")
    model, tokenizer = models.load(config.model, layout="listed")
    packed = pack_splits(
        config.data, config.splits, tokenizer, seq_len=config.seq_len, directory=root / "packed"
    )
    head = model.head_of()
    rows, row_bias = jnp.asarray(head.rows, jnp.float32), head.bias
    sizes = {
        "train": config.train_tokens,
        "validation": config.validation_tokens,
        "test": config.test_tokens,
    }
    if config.test_data:
        names = ("train", "validation", "test")
        options: Any = dict(seq_len=config.seq_len, directory=root / "packed_other")
        packed["other"] = pack_splits(config.test_data, names, tokenizer, **options)["test"]
        sizes["other"] = config.test_tokens
    splits = {}
    for name, size in sizes.items():
        cache = vq.HiddenCache.of(
            model,
            _batches(packed[name], config.batch_rows),
            root / f"hidden_{name}",
            max_tokens=size,
            source=f"{packed[name].fingerprint}, {config.batch_rows} rows a batch",
        )
        targets = None
        if name == "train":
            targets = cache.head_targets(root / f"targets_{name}", head)
            nll, tokens = targets.nll, targets.top_tokens
        else:
            make = functools.partial(_outputs, cache, head)
            record = processes.kept(root / f"outputs_{name}.json", make)
            nll, tokens = map(np.asarray, (record["nll"], record["top_tokens"]))
        splits[name] = Split(cache.hidden, cache.labels, nll, tokens, targets)
    return Context(
        config=config,
        rows=rows,
        row_bias=None if row_bias is None else jnp.asarray(row_bias),
        tied=model.config.tie_embeddings,
        unigram=jnp.asarray(count_tokens(packed["train"], len(rows)) + 0.1, jnp.float32),
        statistics=vq.HiddenCache(splits["train"].hidden, splits["train"].labels).statistics(),
        splits=splits,
        packed=packed,
        mesh=training.make_mesh(config.mesh, partial=True),
    )


def _outputs(cache: vq.HiddenCache, head: losses.Head) -> dict[str, list]:
    """The old head's losses and its five best tokens."""

    @jax.jit
    def run(head: losses.Head, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = head.logits(hidden)
        return losses.cross_entropy(logits, labels), ops.top_k(logits, 5)[1]

    nll, tokens = in_blocks(functools.partial(run, head), cache.hidden, cache.labels)
    return {"nll": nll.tolist(), "top_tokens": tokens.tolist()}


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


def _batches(packed: data.PackedDataset, size: int) -> Iterator[Mapping[str, Any]]:
    # At most one epoch: the split may be smaller than requested.
    for step in range(max(1, len(packed) // size)):
        yield packed.batch(step, seed=0, batch_size=size)["model"]
