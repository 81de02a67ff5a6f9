import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from logitjax import heads, losses, models, ops, processes
from logitjax.distillation._objective import Objective
from logitjax.storage import digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """A decoder as a function of its trained parameters.

    Frozen parameters are kept apart: they are constants of the train step, so they have no
    gradients or moments and are not in checkpoints.

    Attributes:
        graphdef: The decoder without its arrays.
        trained: Contents of a train state: `model`, arrays by path; `lora`, adapters; `mix`, the
            unknown factor of a head with known column space; `terms`, arrays of terms.
        frozen: The rest: `model`, and `basis`, the known column space of a head.
        scale: Factor of the adapters.
    """

    graphdef: Any
    trained: Mapping[str, Any]
    frozen: Mapping[str, Any]
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        model: models.Decoder,
        *,
        freeze: str | None = None,
        lora_rank: int = 0,
        head_basis: ops.Array | None = None,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> "Student":
        """Split a decoder into trained and frozen parts.

        Args:
            model: The decoder, whose arrays are not copied.
            freeze: Regular expression, such as `embedding|layers/[0-9]/`; parameters whose path
                contains a match are frozen.
            lora_rank: Train adapters of this rank instead of the model; 0 for none.
            head_basis: `[vocab, width]`, a basis of the column space of the head to imitate, as an
                audit recovers it. The head becomes its product with a trained matrix.
            objective: The objective, whose terms may have arrays to train with the student.
            seed: Seed of the adapters and of terms' arrays.

        Raises:
            ValueError: `freeze` is not a regular expression, matches nothing or everything, or is
                combined with adapters; or `head_basis` has another vocabulary.

        >>> student = Student.of(models.load_model("tiny"), freeze="embedding|layers/0/mlp")
        >>> "embedding" in student.frozen["model"], "embedding" in student.trained["model"]
        (True, False)
        >>> logits = jax.jit(lambda trained, tokens: student.finished(trained)(tokens))
        >>> logits(student.trained, jnp.ones((1, 2), int)).shape[:2]
        (1, 2)
        """
        if freeze and lora_rank:
            raise ValueError(
                "freeze: expected none with lora_rank, as adapters change no parameter"
            )
        trained: dict[str, Any] = {}
        frozen: dict[str, Any] = {}
        if head_basis is not None:
            model, frozen["basis"], trained["mix"] = _on_basis(model, head_basis)
        apply_fn, params = models.from_nnx(model)
        # By their path, `segments/0/layers/3/mlp/up/kernel`.
        paths = traverse_util.flatten_dict(params)
        flat = {"/".join(map(str, path)): leaf for path, leaf in paths.items()}
        if head_basis is not None:
            # Frozen `basis` and trained `mix` replace it.
            del flat["head/kernel"]
        names = _numbered(flat, model)
        stays = set(flat) if lora_rank else {names[n] for n in _matching(names, freeze)}
        frozen["model"] = {name: leaf for name, leaf in flat.items() if name in stays}
        trained["model"] = {name: leaf for name, leaf in flat.items() if name not in stays}
        if lora_rank:
            lora = models.Lora.init(
                model.config, lora_rank, key=jax.random.key(seed), layout=model.layout
            )
            trained["lora"] = lora.layers
        if objective is not None and (
            local := objective.init(jax.random.key(seed), model.head_of())
        ):
            trained["terms"] = local
        return cls(graphdef=apply_fn.graphdef, trained=trained, frozen=frozen)

    def model(self, trained: Any, frozen: Any = None) -> models.Decoder:
        """Return the decoder, without adapters."""
        frozen = self.frozen if frozen is None else frozen
        flat = {**frozen["model"], **trained["model"]}
        if "mix" in trained:
            # Kernel `[width, vocab]`.
            flat["head/kernel"] = (frozen["basis"] @ trained["mix"]).T
        # Members of a list are named by numbers.
        paths = {tuple(int(k) if k.isdigit() else k for k in n.split("/")): n for n in flat}
        nested = traverse_util.unflatten_dict({path: flat[name] for path, name in paths.items()})
        return nnx.merge(self.graphdef, nested)

    def adapters(self, trained: Any) -> models.Lora | None:
        """Return the adapters, if only they are trained."""
        return models.Lora(trained["lora"], self.scale) if "lora" in trained else None

    def finished(self, trained: Any) -> models.Decoder:
        """Return the finished model: adapters merged, without arrays of terms."""
        model = self.model(trained)
        lora = self.adapters(trained)
        return model if lora is None else lora.merged_into(model)

    def score(
        self, trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any
    ) -> tuple[Any, Any, dict[str, tuple[Any, Any]]]:
        """Compute held-out scores of a batch, for `training.EvalStep`: a sum, a count and metrics.

        The sum is of negative log-likelihoods. The metrics are `accuracy`; `bits_per_byte` if
        `batch["bytes"]` has the bytes of each label; and with `batch["teacher"]`, a teacher of the
        same vocabulary, `agreement` of the most likely tokens and `teacher_kl`, the divergence over
        its top logits and, if known, the mass of all others.
        """
        # Nothing is drawn.
        del rng
        model = self.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        teacher = batch.get("teacher")
        readout = losses.linear_readout(
            hidden_states(model, batch["pivot"], self.adapters(trained)),
            model.head_of(),
            labels=labels,
            ids=None if teacher is None else teacher.indices,
            top_k=1,
        )
        nll = jnp.where(where, readout.cross_entropy, 0.0).sum()
        count = where.sum()
        # The same sweep finds the most likely token, without a second pass over the head.
        best = readout.statistics.indices[..., 0]
        metrics = {"accuracy": ((where & (best == labels)).sum(), count)}
        if "bytes" in batch:
            # Per byte and not per token, so that models with different tokenizers can be compared.
            size = jnp.where(where, batch["bytes"], 0).sum()
            metrics["bits_per_byte"] = (nll / math.log(2.0), size)
        if teacher is not None:
            same = best == teacher.indices[..., 0]
            kl = losses.sparse_kl_divergence(
                readout,
                teacher.top_k,
                tail="bucket" if teacher.log_z is not None else "renormalize",
            )
            metrics["agreement"] = ((where & same).sum(), count)
            metrics["teacher_kl"] = (jnp.where(where, kl, 0.0).sum(), count)
        return nll, count, metrics

    @property
    def fingerprint(self) -> str:
        """Twelve digits that identify the weights; to be read by all processes at once.

        Only shapes count for arrays computed at creation (adapters, `mix`, arrays of terms), which
        another machine may round differently.
        """
        extras = {name: value for name, value in self.trained.items() if name != "model"}
        return digest(
            weights_digest({**self.frozen["model"], **self.trained["model"]}),
            sorted(self.frozen["model"]),
            self.frozen.get("basis"),
            [leaf.shape for leaf in jax.tree.leaves(extras)],
            self.scale,
            length=12,
        )

    @property
    def size(self) -> int:
        """Number of parameters of the finished model."""
        model = nnx.eval_shape(lambda: self.finished(self.trained))
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(model)))


def weights_digest(arrays: Any) -> str:
    """Twelve digits that identify trained arrays; for global ones, call it in all processes."""
    return digest(jax.device_get(processes.local_copy(_thinned(arrays))), length=12)


@jax.jit
def _thinned(arrays: Any) -> Any:
    # On the devices, because a whole array of a large model may not fit one of them or be slow to
    # fetch. Training changes every array, so a few evenly spaced numbers are enough.
    def thin(leaf: Any) -> Any:
        return leaf[tuple(slice(None, None, max(1, size // 8)) for size in leaf.shape)]

    return jax.tree.map(thin, arrays)


def _numbered(names: Iterable[str], model: models.Decoder) -> dict[str, str]:
    """Names by those that count listed layers through the whole model, not in each segment."""
    sizes = [len(s.layers) if model.layout == "listed" else 0 for s in model.segments]
    first, of = [0, *itertools.accumulate(sizes)], re.compile(r"(segments/(\d+)/layers/)(\d+)")
    return {of.sub(lambda m: f"{m[1]}{first[int(m[2])] + int(m[3])}", n): n for n in names}


def _matching(names: Iterable[str], freeze: str | None) -> set[str]:
    """Names that a regular expression matches; ValueError unless it matches some but not all."""
    if not freeze:
        return set()
    try:
        search = re.compile(freeze).search
    except re.error as error:
        raise ValueError(
            f"freeze: expected a regular expression, got {freeze!r}: {error}"
        ) from error
    names = set(names)
    matching = {name for name in names if search(name)}
    if len(matching) in (0, len(names)):
        which = "every" if matching else "no"
        raise ValueError(f"freeze: expected to match some parameters, {freeze!r} matches {which}")
    return matching


def targets(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """Labels `tokens[t + 1]` of the positions t of packed columns, and where they count."""
    return columns["tokens"][:, 1:], columns["loss_mask"][:, 1:]


def hidden_states(
    model: models.Decoder, columns: Mapping[str, Any], lora: models.Lora | None = None
) -> jax.Array:
    """Compute hidden states at every position of packed columns that has a successor."""
    hidden, _ = model.hidden_states(
        columns["tokens"],
        positions=columns["positions"],
        segment_ids=columns["segment_ids"],
        lora=lora,
    )
    # The last position has no label.
    return hidden[:, :-1]


def _on_basis(model: models.Decoder, basis: Any) -> tuple[models.Decoder, jax.Array, jax.Array]:
    """Replace the head by the nearest one in the span of the basis."""
    rows = np.asarray(model.head_of().rows, np.float32)
    basis = np.asarray(basis, np.float32)
    if len(basis) != len(rows):
        raise ValueError(
            f"head_basis: expected a row for each of the student's {len(rows)} tokens, got "
            f"{len(basis)}"
        )
    # Normalise columns; recovered ones are scaled by the singular values of the answers.
    basis = basis / np.maximum(np.linalg.norm(basis, axis=0, keepdims=True), 1e-30)
    # Not by normal equations, which would square the condition number of the basis.
    mix = np.linalg.lstsq(basis, rows, rcond=None)[0].astype(np.float32)
    out = nnx.merge(*nnx.split(model))
    head = heads.LinearHead(
        model.config.hidden_size,
        model.config.vocab_size,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        rngs=nnx.Rngs(0),
    )
    head.kernel[...] = jnp.asarray((basis @ mix).T, head.kernel[...].dtype)
    out.head, out.config = head, dataclasses.replace(model.config, tie_embeddings=False)
    return out, jnp.asarray(basis), jnp.asarray(mix)
