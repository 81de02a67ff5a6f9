import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax import data, decoding, models, storage, training
from logitjax.distillation.on_policy._options import OnPolicy
from logitjax.distillation.on_policy._reread import Rereader
from logitjax.distillation.training._student import Student

# A run of this many tokens counts as repeated if the row has contained it before.
_GRAM = 4
_SMALLEST_PROMPT = 16


def rollout_program(
    student: Student,
    on_policy: OnPolicy,
    *,
    new_tokens: int,
    stop_ids: Sequence[int],
    mesh: Mesh,
    traced: Callable[[], None] = lambda: None,
) -> Any:
    """Compile `(trained, frozen, tokens, positions, seeds)` to the student's samples.

    Arrays stay as in the train state: no weight is copied, no adapter merged. `traced` is called
    once per shape. The result has `tokens`, `valid`, `log_probs` `[rows, new]`, `stopped` `[rows]`.
    """
    shape = nnx.eval_shape(lambda: student.model(student.trained, student.frozen))

    def apply(params: Any, tokens: Any, positions: Any, cache: Any, *, last_only: bool = False):
        model, lora = student.model(*params), student.adapters(params[0])
        hidden, cache = model.hidden_states(tokens, positions=positions, cache=cache, lora=lora)
        return model.logits(hidden[:, -1:] if last_only else hidden), cache

    def write(trained: Any, frozen: Any, tokens: Any, positions: Any, seeds: Any) -> Any:
        traced()
        model = decoding.CachedModel(
            apply=apply,
            params=(trained, frozen),
            init_cache=lambda rows, length: models.Cache.init(
                shape.config, rows, length, shape.dtype, layout=shape.layout
            ),
            vocab_size=shape.config.vocab_size,
            takes_last_only=True,
        )
        options: Any = dict(new_tokens=new_tokens, sampling=on_policy.sampling, stop_ids=stop_ids)
        # As in a train step, so that the model finds the mesh to split its activations over.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            entries, stopped = decoding.rollout(
                model, tokens, positions, seeds, mesh=mesh, **options
            )
        entries = {"tokens": entries.tokens, "valid": entries.valid, "log_probs": entries.logprobs}
        return entries | {"stopped": stopped}

    return jax.jit(write, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Rollouts:
    """Write the rows of each update, as a function of the seed, the step and the weights alone.

    Samples written at once for several updates are kept in a file until no checkpoint needs them,
    because the weights that wrote them have changed by then. `programs` counts compiled programs,
    one for each prompt width.

    Args:
        packed: Rows of text; those for training provide the prompts.
        batch_size: Number of rows of a global batch.
        seed: Seed of the order of rows, and of sampling.
        directory: Folder for kept samples.

    Raises:
        ValueError: Sizes that do not fit into a row or a batch, or a teacher's tokenizer that
            cannot encode an answer alone.
    """

    def __init__(
        self,
        student: Student,
        on_policy: OnPolicy,
        packed: data.PackedSplits,
        *,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        directory: epath.Path,
    ):
        self.programs = 0
        self._options, self._layout = on_policy, training.BatchLayout(mesh)
        self._rows, self._name = packed.splits["train"], packed.names["pivot"]
        self._batch_size, self._seed, self._directory = batch_size, seed, directory
        self._chosen = on_policy.rows(batch_size)
        self._longest, new_tokens = on_policy.lengths(self._rows.seq_len)
        self._drop = on_policy.truncated in ("drop", "auto" if packed.chat else "")
        tokenizer = packed.tokenizers[self._name]
        teachers = {name: t for name, t in packed.tokenizers.items() if name != self._name}
        self._rereaders = {n: Rereader(tokenizer, t, chat=packed.chat) for n, t in teachers.items()}
        config = nnx.eval_shape(lambda: student.model(student.trained, student.frozen)).config
        end = tokenizer.eos_id
        self._program = rollout_program(
            student,
            on_policy,
            new_tokens=new_tokens,
            stop_ids=sorted({*config.eos_ids, *([] if end is None else [end])}),
            mesh=mesh,
            traced=self._count,
        )
        self._first, self._written, self._seconds = -1, {}, 0.0

    def _count(self) -> None:
        self.programs += 1

    def mix(
        self, step: int, batch: Mapping[str, Any], trained: Any, frozen: Any, *, oldest: int = 0
    ) -> tuple[dict[str, Any], np.ndarray, dict[str, tuple[float, float]]]:
        """Replace the rows of this process's batch that the student writes.

        Args:
            step: Number of the update, counted from 0.
            batch: Rows of the text.
            oldest: Step of the oldest checkpoint from which the run may continue.

        Returns:
            The batch; `log_probs` `[rows, seq_len - 1]` of labels under the distribution they were
            sampled from, nan where the student wrote none; metrics as pairs of a sum and a count.
        """
        every, count = self._options.generate_every, len(self._chosen)
        # The update for which these rows were written.
        first = step - step % every
        if self._first != first:
            self._first, self._written = first, self._fetched(first, step, trained, frozen, oldest)
        here = slice((step - first) * count, (step - first + 1) * count)
        rows = {name: array[here] for name, array in self._written.items()}
        readers = (self._name, *self._rereaders)
        columns = {n: {c: array.copy() for c, array in batch[n].items()} for n in readers}
        shape = columns[self._name]["tokens"].shape
        log_probs = np.full((shape[0], shape[1] - 1), np.nan, np.float32)
        for number, location in enumerate(self._chosen - self._layout.rows(self._batch_size).start):
            # Skip rows of other processes; a row without a prompt that fits keeps its text.
            if not 0 <= location < len(log_probs) or not rows["start"][number]:
                continue
            text = {name: rows[name][number] for name in columns[self._name]}
            tokens = text["tokens"][text["segment_ids"] > 0]
            ends: dict[str, Any] = {n: rows[n][number].item() for n in ("start", "stopped")}
            read = {
                name: reader.row(tokens, {c: a[location] for c, a in columns[name].items()}, **ends)
                for name, reader in self._rereaders.items()
            }
            for reader, row in (read | {self._name: text}).items():
                for name, array in columns[reader].items():
                    array[location] = row[name]
            # Position t has the label t + 1.
            where = rows["loss_mask"][number, 1:]
            log_probs[location, where] = rows["log_probs"][number, where]
        return {**batch, **columns}, log_probs, _metrics(rows, self._seconds / every)

    def _fetched(self, first: int, step: int, trained: Any, frozen: Any, oldest: int) -> Any:
        path, every = self._directory / f"{first}.npz", self._options.generate_every
        if step > first:
            # The run was killed between two updates that share samples.
            if not path.exists():
                raise ValueError(f"rollouts: expected {path} of the earlier run, got no file")
            self._seconds = 0.0
            return storage.weights.read_npz(path)
        begin = time.perf_counter()
        arrays = self._write(first, trained, frozen)
        self._seconds = time.perf_counter() - begin
        if every > 1 and jax.process_index() == 0:
            named: Any = arrays
            storage.write_atomic(path, lambda file: np.savez(file, **named))
            for old in self._directory.glob("*.npz"):
                if int(old.stem) + every <= oldest:
                    old.unlink()
        return arrays

    def _write(self, first: int, trained: Any, frozen: Any) -> dict[str, np.ndarray]:
        """Write the rows of all updates from `first` on that share samples."""
        prompts, seeds = [], []
        for step in range(first, first + self._options.generate_every):
            numbers = self._rows.indices(step, seed=self._seed, batch_size=self._batch_size)
            columns = self._rows.rows(numbers[self._chosen])[self._name]
            prompts += [self._prompt(columns, row) for row in range(len(self._chosen))]
            key = jax.random.fold_in(jax.random.key(self._seed), step)
            # By the row's index in the global batch, so that devices and processes do not matter.
            drawn = np.asarray(jax.random.bits(key, (self._batch_size,), jnp.uint32))
            seeds.append(drawn[self._chosen])
        longest = max(map(len, prompts))
        # Widths are powers of two, so that few programs are compiled.
        width = min(self._longest, max(_SMALLEST_PROMPT, 1 << (longest - 1).bit_length()))
        # Pad to a number of rows that the devices can share; these rows are discarded.
        total = -(-len(prompts) // self._layout.pieces) * self._layout.pieces
        tokens = np.zeros((total, width), np.int32)
        positions = np.full((total, width), -1, np.int32)
        # An empty prompt still has to have a last token.
        positions[:, -1] = 0
        for row, prompt in enumerate(prompts):
            if len(prompt):
                tokens[row, width - len(prompt) :] = prompt
                positions[row, width - len(prompt) :] = np.arange(len(prompt))
        inputs = tokens, positions, np.resize(np.concatenate(seeds), total)
        message = self._program(trained, frozen, *jax.device_put(inputs, self._layout.sharding))
        return self._as_rows(prompts, jax.tree.map(np.asarray, message))

    def _prompt(self, columns: Mapping[str, np.ndarray], row: int) -> np.ndarray:
        """Return the beginning of a row; empty if it is too long."""
        tokens = columns["tokens"][row][columns["segment_ids"][row] == 1]
        answer = int(np.argmax(columns["loss_mask"][row][: len(tokens)]))
        if answer > 1:
            return tokens[:answer] if answer <= self._longest else tokens[:0]
        return tokens[: min(self._longest, max(1, len(tokens) // 2))]

    def _as_rows(
        self, prompts: Sequence[np.ndarray], drawn: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        shape = (len(prompts), self._rows.seq_len)
        tokens = np.full(shape, self._rows.pad_ids[self._name], np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        learnt = np.zeros(shape, bool)
        log_probs = np.zeros((shape[0], shape[1] - 1), np.float32)
        starts = np.array([len(prompt) for prompt in prompts])
        lengths = np.where(starts, drawn["valid"][: len(prompts)].sum(1), 0)
        for row, (start, new) in enumerate(zip(starts, lengths, strict=True)):
            if not start:
                continue
            stop = start + new
            tokens[row, :start] = prompts[row]
            tokens[row, start:stop] = drawn["tokens"][row, :new]
            segments[row, :stop], positions[row, :stop] = 1, np.arange(stop)
            # From the first sampled token to the stop token, which has to be learned too.
            learnt[row, start:stop] = drawn["stopped"][row] or not self._drop
            log_probs[row, start - 1 : stop - 1] = drawn["log_probs"][row, :new]
        columns = dict(tokens=tokens, segment_ids=segments, positions=positions, loss_mask=learnt)
        stopped = drawn["stopped"][: len(prompts)]
        more = dict(log_probs=log_probs, start=starts, length=lengths, stopped=stopped)
        return columns | more


def _metrics(rows: Mapping[str, np.ndarray], seconds: float) -> dict[str, tuple[float, float]]:
    """Compute metrics that reveal a collapse on the student's own text, as sums and counts."""
    here = np.flatnonzero(rows["start"])
    spans = [(rows["start"][row], rows["start"][row] + rows["length"][row]) for row in here]
    written = [rows["tokens"][row, a:b].tolist() for row, (a, b) in zip(here, spans, strict=True)]
    grams = [[tuple(row[i : i + _GRAM]) for i in range(len(row) - _GRAM + 1)] for row in written]
    total, repeated = sum(map(len, written)), sum(len(row) - len(set(row)) for row in grams)
    pairs = {
        "length": (total, len(here)),
        # The mean of -log q over samples of q is an unbiased estimate of its entropy.
        "entropy": (-rows["log_probs"][here].sum(), total),
        "stopped": (rows["stopped"][here].sum(), len(here)),
        "learned": (rows["loss_mask"][here].any(1).sum(), len(here)),
        "repetition": (repeated, sum(map(len, grams))),
    } | ({"tokens_per_second": (total, seconds)} if seconds else {})
    return {f"rollout/{name}": (float(a), float(b)) for name, (a, b) in pairs.items()}
