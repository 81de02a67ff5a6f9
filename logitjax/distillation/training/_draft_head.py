"""Training of a draft head on what its model writes, and its acceptance on held-out text."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax import data, decoding, losses, models, processes, storage, training
from logitjax.distillation._draft_statistic import DraftReading, DraftStatistic
from logitjax.distillation.training._distill import Course
from logitjax.distillation.training._draft_start import make_copying
from logitjax.distillation.training._student import weights_digest
from logitjax.losses import sweep

# Rows that the model writes, and reads, at once.
_WRITTEN, _READ = 64, 8


def _mixed(reading: DraftReading, inside: Any) -> jax.Array:
    share = jnp.exp(-3.0 * jax.lax.stop_gradient(reading.acceptance))
    return share * jnp.where(inside, reading.kl, 0.0) + (1 - share) * (1 - reading.acceptance)


# Of the reading, and whether the model's most likely token can be drafted: EAGLE leaves out others.
_LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    "kl": lambda reading, inside: jnp.where(inside, reading.kl, 0.0),
    "alpha": lambda reading, inside: jnp.where(
        inside, -jnp.log(jnp.maximum(reading.acceptance, 1e-6)), 0.0
    ),
    "lambda": _mixed,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftTraining:
    """What a draft head drafts, and what it learns from.

    Attributes:
        vocab: Number of tokens to draft, the most frequent ones in training; 0 for all.
        rank: Width between two factors of the head; 0 for one matrix.
        ahead: Number of drafts in a row that training unrolls.
        decay: Weight of each of these relative to the one before.
        loss: `kl`, `alpha` (-log of the acceptance), or `lambda`, which moves from the divergence
            to the acceptance as that grows.
        rows: Number of rows to train on. The model writes them.
        prompt: Share of a row that is text, before what the model writes; of every other row it
            writes the most likely tokens, of the rest it draws them.
    """

    vocab: int = 8192
    rank: int = 0
    ahead: int = 4
    decay: float = 0.8
    loss: Literal["kl", "alpha", "lambda"] = "kl"
    rows: int = 1024
    prompt: float = 0.25

    def train(
        self,
        model: models.Decoder,
        packed: data.PackedSplits,
        course: Course,
        *,
        mesh: Mesh,
        workdir: epath.Path,
        end_ids: Sequence[int] = (),
    ) -> models.DraftHead:
        """Let the model write and read rows, and train a head on them.

        If interrupted, the same call continues where it was.

        Raises:
            ValueError: There are several processes, or the folder was begun with other inputs.
        """
        if jax.process_count() > 1:
            raise ValueError(f"draft_head: expected one process, got {jax.process_count()}")
        counts = {"train": self.rows, "validation": course.eval_rows}
        texts = {
            split: self._read(model, packed, split, count, workdir / "rows" / split, tuple(end_ids))
            for split, count in counts.items()
        }
        (train, rows), (held_out, held_out_rows) = texts.values()
        tokens = None
        if self.vocab:
            tokens = _most_frequent(train, rows, self.vocab, model.config.vocab_size, end_ids)
        head = models.DraftHead.of(model, tokens=tokens, rank=self.rank, seed=course.seed)
        some = train.read(range(min(_WRITTEN, rows)))
        present = np.arange(some["tokens"].shape[1]) < some["length"][:, None]
        present[:, 0] = False
        features = some["features"][present].astype(np.float32)
        units = make_copying(head, model, features, some["tokens"][present])
        loss, size = _Loss(self, head, model, units), course.batch_size
        constants = jax.device_put(loss.constants, NamedSharding(mesh, PartitionSpec()))
        steps, rate = course.steps, course.learning_rate
        order = f"{steps}, {rate}, {size}, {course.seed}, {course.warmup}, {course.weight_decay}"
        schedule = training.Schedule(rate, warmup=int(course.warmup * steps), total_steps=steps)
        tx = schedule.optimizer(weight_decay=course.weight_decay)
        kinds: Any = dict(mesh=mesh, accumulate=course.accumulate)
        step = training.TrainStep(loss, tx, schedule=schedule, **kinds)
        scorer = training.EvalStep(loss, mesh=mesh)
        create: Any = functools.partial(
            training.TrainState.create, loss.params, tx, mesh=mesh, seed=course.seed
        )

        def score(state: training.TrainState, number: int) -> dict[str, float]:
            part = min(size, held_out_rows)
            whole = range(0, held_out_rows // part * part, part)
            batches = (held_out.read(range(i, i + part)) for i in whole)
            return scorer.means(state.params, batches, constants)

        with contextlib.ExitStack() as stack:
            folder = workdir / "train"
            checkpointer = stack.enter_context(training.Checkpointer(folder / "checkpoints"))
            writer = training.make_writer(folder, track=course.track)
            stack.enter_context(contextlib.closing(writer))
            state = training.train_loop(
                create,
                functools.partial(step, constants=constants),
                lambda number: train.read(_order(number, rows, size, course.seed)),
                total_steps=steps,
                workdir=folder,
                checkpointer=checkpointer,
                eval_fn=score if course.loop.eval_every else None,
                writer=writer,
                identity={**train.made_from, "draft": repr(self), "course": order},
                options=course.loop,
            )
        head = loss.head(processes.local_copy(state.params))
        head.fuse.kernel[...] = head.fuse.kernel[...] / units[:, None]
        return head

    def prompts(self, packed: data.PackedSplits, split: str, count: int) -> list[np.ndarray]:
        """Beginnings of rows, as `train` lets the model continue them."""
        rows = packed.splits[split]
        columns = rows.rows(range(min(count, len(rows))))[packed.names["pivot"]]
        cuts = _cuts(columns, packed.chat, self.prompt)
        return [row[:cut] for row, cut in zip(columns["tokens"], cuts, strict=True)]

    def _read(
        self,
        model: models.Decoder,
        packed: data.PackedSplits,
        split: str,
        count: int,
        folder: epath.Path,
        end_ids: tuple[int, ...],
    ) -> tuple[storage.RowCache, int]:
        """Rows that the model has written, with its features and distribution; their number."""
        rows, width = packed.splits[split], model.config.hidden_size
        count, time = min(count, len(rows)), rows.seq_len
        layers = models.DraftHead.layers_of(model.config)

        @nnx.jit
        def run(model: models.Decoder, tokens: Any) -> dict[str, jax.Array]:
            hidden, _ = model.hidden_states(tokens, entering=(entering := []))
            features = jnp.concatenate([entering[i] for i in layers], axis=-1)
            readout = losses.linear_readout(hidden, model.head_of(), top_k=1)
            best = readout.statistics.indices[..., 0]
            return dict(features=features, hidden=hidden, log_z=readout.log_z, best=best)

        def compute(numbers: np.ndarray) -> dict[str, Any]:
            columns = rows.rows(numbers)[packed.names["pivot"]]
            cuts = _cuts(columns, packed.chat, self.prompt)
            tokens, lengths = _written(model, columns["tokens"], cuts, numbers, end_ids)
            parts = [run(model, tokens[i : i + _READ]) for i in range(0, len(tokens), _READ)]
            read = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
            return {"tokens": tokens, "length": lengths, **read}

        fields = {
            "tokens": (np.int32, (time,)),
            "length": (np.int32, ()),
            # Streams may exceed the range of float16.
            "features": (ml_dtypes.bfloat16, (time, len(layers) * width)),
            "hidden": (np.float16, (time, width)),
            "log_z": (np.float32, (time,)),
            "best": (np.int32, (time,)),
        }
        weights = weights_digest(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        made_from = {"text": rows.fingerprint, "weights": weights, "prompt": self.prompt}
        made_from |= {"layers": list(layers), "ends": list(end_ids)}
        cache = storage.RowCache(folder, storage.ArrayCodec(fields), made_from=made_from)
        # The model writes many at once, since each of its steps reads all weights.
        options: Any = dict(batch_size=min(_WRITTEN, count), rows_per_shard=_WRITTEN)
        cache.fill(range(count), compute, label=f"writing {split} rows", **options)
        return cache, count


def _order(step: int, rows: int, size: int, seed: int) -> np.ndarray:
    """The rows of a training step; every epoch is in another order."""
    epoch, part = divmod(step, max(1, rows // size))
    order = np.random.default_rng((seed, epoch)).permutation(rows)
    return order.take(np.arange(part * size, (part + 1) * size), mode="wrap")


def _written(
    model: models.Decoder, text: np.ndarray, cuts: np.ndarray, numbers: np.ndarray, ends: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Continue the beginnings of rows up to the rows' length, or to a token that ends a text."""
    tokens, time = np.array(text), text.shape[1]
    if cuts.min() == time:
        return tokens, cuts
    drawn = [decoding.Sampling(temperature=float(n % 2), seed=int(n)) for n in numbers]
    prompts = [row[:cut] for row, cut in zip(tokens, cuts, strict=True)]
    out = decoding.generate(
        model, prompts, max_new_tokens=int(time - cuts.min()), sampling=drawn, stop_ids=ends
    )
    lengths = np.minimum(cuts + out.lengths, time)
    for row, cut, length, new in zip(tokens, cuts, lengths, out.tokens, strict=True):
        row[cut:length], row[length:] = new[: length - cut], 0
    return tokens, lengths


def _cuts(columns: Mapping[str, np.ndarray], chat: bool, share: float) -> np.ndarray:
    """The length of each row's prompt."""
    if chat:
        # Where the first answer begins.
        return np.maximum(np.asarray(columns["loss_mask"]).argmax(axis=1), 1)
    present = (np.asarray(columns["segment_ids"]) > 0).sum(axis=1)
    return np.clip(int(share * columns["tokens"].shape[1]), 1, present)


def _most_frequent(
    train: storage.RowCache, rows: int, count: int, vocab_size: int, end_ids: Sequence[int]
) -> np.ndarray:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, rows, _WRITTEN):
        read = train.read(range(start, min(start + _WRITTEN, rows)))
        present = np.arange(read["tokens"].shape[1]) < read["length"][:, None]
        counts += np.bincount(read["tokens"][present], minlength=vocab_size)
    # Rare where texts are cut, and needed at the end of each.
    counts[list(end_ids)] = counts.sum()
    return np.sort(np.argsort(-counts, kind="stable")[:count])


class _Loss:
    """The loss of a `TrainStep`: drafts of all positions, and of each several in a row."""

    def __init__(
        self, options: DraftTraining, head: models.DraftHead, model: models.Decoder, units: Any
    ):
        self._options = options
        self._graphdef, params, self._rest = nnx.split(head, nnx.Param, ...)
        self.params = nnx.to_pure_dict(params)
        full, ids = model.head_of(), head.tokens[...]
        bias = None if full.bias is None else full.bias[ids]
        kept = dataclasses.replace(full, kernel=full.rows[ids], bias=bias, vocab_axis=0)
        table = model.embedding[...]
        drafted = jnp.zeros(full.vocab_size(), bool).at[ids].set(True)
        self.constants = dict(head=kept, embedding=table, ids=ids, drafted=drafted, units=units)

    def head(self, params: Any) -> models.DraftHead:
        return nnx.merge(self._graphdef, params, self._rest)

    def __call__(self, params: Any, batch: Any, rng: Any, constants: Any) -> Any:
        options, head, ids = self._options, self.head(params), constants["ids"]
        tokens, index = batch["tokens"], jnp.arange(batch["tokens"].shape[1])
        kind = constants["embedding"].dtype
        embedded = constants["embedding"][jnp.roll(tokens, -1, axis=1)]
        features = batch["features"] / constants["units"]
        streams = head.unrolled(features.astype(kind), embedded, options.ahead)
        total, metrics = 0.0, {}
        for i, stream in enumerate(streams):
            hidden, log_z, best = (
                # The model's distribution after the token that the draft was given.
                jnp.roll(batch[name], -1 - i, axis=1)
                for name in ("hidden", "log_z", "best")
            )
            where = (index + 1 + i < batch["length"][:, None]).astype(jnp.float32)
            inside = constants["drafted"][best]
            value, reading = sweep.run(
                sweep.LossOf(DraftStatistic(), _LOSSES[options.loss]),
                head.normed(stream),
                losses.Head(params["head"]["kernel"], vocab_axis=1),
                teacher=(hidden.astype(kind), constants["head"]),
                tokens={"statistic": {"log_z": log_z}, "loss": inside},
                weights=where,
            )
            total += options.decay**i * value
            same = where * (ids[reading.best] == best)
            metrics[f"accepted/{i + 1}"] = ((where * reading.acceptance).sum(), where.sum())
            metrics[f"same/{i + 1}"] = (same.sum(), where.sum())
        return total, (index + 1 < batch["length"][:, None]).sum(), metrics
