"""Hidden states on disk, computed once so that all later work on a head is fast."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx
from jaxtyping import Float

from logitjax.losses import Head
from logitjax.models import with_layout
from logitjax.ops import Array
from logitjax.storage import Manifest, RowCache, digest, guard, write_atomic
from logitjax.storage.weights import read_npy, read_npz
from logitjax.vq._targets import HeadTargets, head_targets

_KIND = "hidden states"
_TARGETS = "head targets"
_FILES = ("hidden", "labels")


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """First and second moments of hidden states: ``mean [hidden]``, ``cov [hidden, hidden]``."""

    mean: jax.Array
    cov: jax.Array


def head_statistics(hidden: Float[Array, "count hidden"]) -> HeadStatistics:
    """Mean and covariance of cached hidden states, by blocks."""
    width, block_size = hidden.shape[1], 8192
    # About the first block's mean: the square of a large mean would drown the variance.
    shift = np.asarray(hidden[:block_size], np.float32).mean(0)
    sums: Any = np.zeros(width, np.float32), np.zeros((width, width), np.float32)
    for start in range(0, len(hidden), block_size):
        block = np.asarray(hidden[start : start + block_size], np.float32)
        sums = _add_moments(*sums, block, shift)
    return HeadStatistics(*_mean_and_covariance(*sums, shift, len(hidden)))


@jax.jit
def _add_moments(total: Array, square: Array, block: Array, shift: Array) -> Any:
    block = block - shift
    return total + block.sum(0), square + block.T @ block


@jax.jit
def _mean_and_covariance(total: Array, square: Array, shift: Array, count: Array | int) -> Any:
    mean = jnp.asarray(total) / count
    # E xx' - Ex Ex' about the shift.
    return mean + shift, square / count - jnp.outer(mean, mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadQuality:
    """Quality of a head at positions with a known next token.

    Attributes:
        perplexity: Exponential of the mean cross-entropy.
        accuracy: Share of positions at which the most likely token comes next.
        tokens: The most likely token of each position, `[count]`.
    """

    perplexity: float
    accuracy: float
    tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """Positions to predict from: float32 ``hidden [count, hidden]``, int32 ``labels [count]``."""

    hidden: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the labels and a sample of the hidden states."""
        return digest(self.labels, sampled_digest(self.hidden))

    @classmethod
    def of(
        cls,
        model: Any,
        batches: Iterable[Mapping[str, Any]],
        directory: str | os.PathLike[str],
        *,
        max_tokens: int,
        source: str = "",
    ) -> "HiddenCache":
        """Run a decoder over packed batches once, and store the hidden states that its head reads.

        If the directory already contains the cache of this model and ``source``, it is read
        instead. A killed run continues after its finished batches. Positions without a next token
        to predict are skipped. ValueError if the directory contains, in full or in part, the cache
        of another ``max_tokens``, model or ``source``.

        Args:
            model: a `logitjax.models.Decoder`, or anything with its ``hidden_states``.
            batches: one tokenizer's part of the batches of a `logitjax.data.PackedDataset`:
                ``tokens``, ``positions``, ``segment_ids``, ``loss_mask``, each ``[batch, time]``.
                The same batches on every call.
            directory: folder of the cache; memory-mapped if local, read in full if remote.
            max_tokens: maximum number of positions.
            source: name of the batches, e.g. a `PackedDataset`'s fingerprint; others are refused.
        """
        root = epath.Path(directory)
        graphdef, state = nnx.split(model)
        # Hidden states depend on these alone.
        weights = {name: part for name, part in nnx.to_pure_dict(state).items() if name != "head"}
        made_from = {"max_tokens": max_tokens, "model": sampled_digest(weights), "source": source}
        manifest = Manifest(root, _KIND)
        if manifest.exists():
            manifest.check(made_from)
            return cls.open(root)
        # One row per batch, until all exist.
        parts = RowCache(root / "parts", _Codec(), made_from=made_from, kind=_KIND)

        @jax.jit
        def run(state: Any, tokens: Any, positions: Any, segment_ids: Any) -> jax.Array:
            hidden, _ = nnx.merge(graphdef, state).hidden_states(
                tokens, positions=positions, segment_ids=segment_ids
            )
            return hidden.astype(np.float32)

        count, used = 0, 0
        finished = set(parts.row_numbers.tolist())
        for index, batch in enumerate(batches):
            if index not in finished:
                hidden = run(state, batch["tokens"], batch["positions"], batch["segment_ids"])
                # Position t predicts t + 1.
                keep = np.asarray(batch["loss_mask"])[:, 1:]
                labels = np.asarray(batch["tokens"])[:, 1:][keep]
                parts.add([index], HiddenCache(np.asarray(hidden)[:, :-1][keep], labels))
                count += len(labels)
            else:
                count += len(parts.read([index]))
            used = index + 1
            if index % 20 == 0:
                logging.info("hidden states: %d of %d positions", count, max_tokens)
            if count >= max_tokens:
                break
        if not used:
            raise ValueError("batches: nothing to run the model over")
        stored = parts.read(range(used))
        # Whole arrays, because tuning draws positions at random from memory-mapped ones.
        sums = {}
        for name in _FILES:
            array = getattr(stored, name)[:max_tokens]
            write_atomic(root / f"{name}.npy", functools.partial(np.save, arr=array))
            sums[name] = zlib.crc32(array.data)
        manifest.write(made_from, {"count": min(count, max_tokens), "crc32": sums})
        # Not before the whole arrays are there.
        parts.directory.rmtree()
        return cls.open(root)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "HiddenCache":
        """A finished cache, without the model that made it."""
        root = epath.Path(directory)
        sums = Manifest(root, _KIND).read().get("crc32", {})
        # Gigabytes, read where they lie.
        arrays = {name: read_npy(root / f"{name}.npy", mapped=True) for name in _FILES}
        for name, array in arrays.items():
            if sums.get(name) not in (None, zlib.crc32(array.data)):
                raise ValueError(f"{root / name}.npy: damaged; delete {root}, which is made again")
        return cls(**arrays)

    def __len__(self) -> int:
        return len(self.labels)

    def statistics(self) -> HeadStatistics:
        """First and second moments of the hidden states."""
        return head_statistics(self.hidden)

    def head_targets(
        self, directory: str | os.PathLike[str], head: Head, *, top: int = 64
    ) -> HeadTargets:
        """A full head's distribution at these positions, stored in a directory for reuse.

        For each position the `top` largest probabilities are stored. ValueError if the directory
        belongs to other positions, another head or other options; it names all differences.
        """
        root = epath.Path(directory)
        made_from = {
            "positions": self.fingerprint,
            # A few rows of it may have been edited.
            "head": digest(head.rows, head.bias),
            "top": top,
            "soft_cap": head.soft_cap,
        }
        manifest = Manifest(root, _TARGETS)
        if manifest.exists():
            manifest.check(made_from)
            path = root / "targets.npz"
            with guard.naming(path):
                arrays: dict[str, Any] = dict(read_npz(path))
                arrays["entropy"] = float(arrays["entropy"])
                return HeadTargets(**arrays)
        targets = head_targets(self.hidden, head, labels=self.labels, top=top)
        arrays = {f.name: getattr(targets, f.name) for f in dataclasses.fields(targets)}
        write_atomic(root / "targets.npz", lambda file: np.savez(file, **arrays))
        manifest.write(made_from)
        return targets

    def measure(self, model: Any) -> HeadQuality:
        """Perplexity of a decoder's head, the only part that runs, on these positions."""
        graphdef, state = nnx.split(model)

        @jax.jit
        def run(state: Any, hidden: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            # One position per row, as in decoding.
            logits = nnx.merge(graphdef, state).logits(hidden[:, None])[:, 0].astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
            return jax.nn.logsumexp(logits, axis=-1) - chosen, logits.argmax(-1)

        # Memory for this many rows of V.
        losses, tokens, block_size = [], [], 256
        for start in range(0, len(self), block_size):
            hidden = np.asarray(self.hidden[start : start + block_size], np.float32)
            labels = np.asarray(self.labels[start : start + block_size])
            here = len(labels)
            # All blocks of one length, for one program.
            hidden = np.pad(hidden, ((0, block_size - here), (0, 0)))
            loss, token = run(state, hidden, np.pad(labels, (0, block_size - here)))
            losses.append(np.asarray(loss)[:here])
            tokens.append(np.asarray(token)[:here])
        likeliest = np.concatenate(tokens)
        return HeadQuality(
            perplexity=float(np.exp(np.concatenate(losses).mean())),
            accuracy=float((likeliest == np.asarray(self.labels)).mean()),
            tokens=likeliest,
        )


def sampled_digest(arrays: Any) -> str:
    """Digest that distinguishes hidden states and heads without reading gigabytes."""
    return digest(arrays, sample=4096)


def weights_digest(model: Any) -> str:
    """Digest of a few of a decoder's weights, the same in float32 and bfloat16 and any layout."""
    leaves = jax.tree.leaves(nnx.state(with_layout(model, "listed"), nnx.Param))
    thin = [leaf.reshape(-1)[:: max(1, leaf.size // 64)].astype(jnp.bfloat16) for leaf in leaves]
    return digest(jax.device_get(thin), length=12)


class _Codec:
    """A batch's masked positions: their count and width, labels, hidden states."""

    # Differs from batch to batch.
    bytes_per_row = 0

    def encode(self, computed: HiddenCache, count: int) -> list[bytes]:
        header = np.asarray(computed.hidden.shape, "<i8")
        labels, hidden = computed.labels.astype("<i4"), computed.hidden.astype("<f4")
        return [header.tobytes() + labels.tobytes() + hidden.tobytes()]

    def decode(self, records: Sequence[bytes]) -> HiddenCache:
        parts = []
        for record in records:
            count, width = (int(n) for n in np.frombuffer(record, "<i8", 2))
            labels = np.frombuffer(record, "<i4", count, offset=16)
            hidden = np.frombuffer(record, "<f4", count * width, offset=16 + 4 * count)
            parts.append((hidden.reshape(count, width), labels))
        hidden, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return HiddenCache(hidden, labels)
