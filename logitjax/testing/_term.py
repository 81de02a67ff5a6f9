"""Checks of a term of an objective: a loss that any trainer, mesh and batch can split."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax import losses
from logitjax.distillation import (
    ChunkScores,
    Objective,
    Teacher,
    Term,
    TokenProjection,
    TokenSet,
    Vocabularies,
)
from logitjax.testing import _properties as props
from logitjax.testing._loss import check_loss

# All sizes differ, so that a mixed-up axis cannot fit.
_ROWS, _LENGTH, _WIDTH, _TEACHER_WIDTH, _VOCAB = 4, 3, 5, 6, 11
_SHARED = ("head", "bias", "teacher_head", "teacher_bias")
_OWN = ("value", "needs", "parts", "shards")
# Properties of losses that terms share; the sum over a batch has no rows.
_OF_LOSSES = ("jit", "bfloat16", "padding", "vmap", "where", "cotangent", "differences")
_ON_MESHES = ("mesh", "explicit")


def check_term(
    term: Term, *, batch: Mapping[str, Any] | None = None, skip: Sequence[str] = (), seed: int = 0
) -> None:
    """Check the properties of a term of `distillation.Objective`, alone or with a live teacher.

    The properties, by the names that `skip` takes:

    - `value`: The term is a frozen dataclass, hashable, equal to its copy, and flags can parse its
      repr.
    - `needs`: If a declared need is not met, the error names the term; other reads are errors too.
    - `jit`, `bfloat16`, `padding`, `vmap`, `where`, `cotangent`, `differences`, `mesh`, `explicit`:
      As in `check_loss`, for the objective's sum as a function of hidden states, head, bias and the
      term's own arrays. Teachers get no gradient.
    - `parts`: Sums over halves of a batch add up to the sum over the batch.
    - `shards`: So do sums of devices, inside `shard_map`.

    Args:
        term: The term.
        batch: Arrays `[4, 3]` of the columns that `Term.batch` names.
        skip: Properties that the term is not required to have.
        seed: Seed of the numbers.

    Raises:
        AssertionError: The first property that does not hold.
        ValueError: A column that the term declares is missing from `batch`, or `skip` is unknown.

    >>> from logitjax.distillation.terms import SFT
    >>> check_term(SFT(), skip=("jit", "mesh", "explicit", "shards"))
    """
    properties = props.selected((*_OWN, *_OF_LOSSES, *_ON_MESHES), skip)
    setting = _Setting.of(term, dict(batch or {}), seed)
    for name in _OWN[:2]:
        if name in properties:
            getattr(setting, f"check_{name}")()
    everywhere = ("shape", "nan", "infinity", "labels", "rows", "shard_map")
    check_loss(
        setting.total,
        setting.arrays,
        logits=[name for name in ("bias", "teacher_bias") if name in setting.arrays],
        labels={"labels": _VOCAB},
        where="where",
        shared=setting.shared,
        constant=[
            n for n, x in setting.arrays.items() if n not in setting.learns and props.is_float(x)
        ],
        skip=(*everywhere, *(set(_OF_LOSSES + _ON_MESHES) - set(properties))),
        seed=seed,
    )
    for name in _OWN[2:]:
        if name in properties:
            getattr(setting, f"check_{name}")()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Setting:
    """An objective of one term, and a batch for it."""

    term: Term
    arrays: dict[str, np.ndarray]
    columns: tuple[str, ...]
    params: Any

    @classmethod
    def of(cls, term: Term, batch: Mapping[str, Any], seed: int) -> "_Setting":
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        missing = [column for column in term.batch if column not in batch]
        if missing:
            raise ValueError(f"batch: expected {missing[0]}, which {term} declares, got none")
        where = np.ones((_ROWS, _LENGTH), bool)
        # Inside rows and at the beginning of one; the last, alone in its half, counts entirely, and
        # the halves' counts differ.
        where[0, 1] = where[1, 1] = where[2, 0] = False
        arrays = {
            "hidden": normal(_ROWS, _LENGTH, _WIDTH),
            "head": normal(_WIDTH, _VOCAB),
            "bias": normal(_VOCAB),
            "labels": rng.integers(0, _VOCAB, where.shape).astype(np.int32),
            "where": where,
            **{column: np.asarray(batch[column]) for column in term.batch},
        }
        if term.teacher is not None:
            arrays |= {
                "teacher_hidden": normal(_ROWS, _LENGTH, _TEACHER_WIDTH),
                "teacher_head": normal(_TEACHER_WIDTH, _VOCAB),
                "teacher_bias": normal(_VOCAB),
            }
            if term.teacher.chunks:
                # Two tokens, then one; the third entry is unused. The axis in between distinguishes
                # arrays by chunk from those by position, which a mask hides.
                chunks = {"ids": [0, 0, 1], "ends": [-1, 1, 2], "scores": [-1.5, -0.5, 0.0]}
                for name, row in (chunks | {"where": [True, True, False]}).items():
                    arrays[f"chunk_{name}"] = np.tile(np.array(row), (_ROWS, 1, 1))
                # No chunk at positions that do not count.
                arrays["chunk_ids"][~where[:, None]] = -1
        params = term.init(jax.random.key(seed), _head(arrays["head"], arrays["bias"]))
        leaves, _ = jax.tree.flatten(params)
        arrays |= {f"params{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        return cls(term=term, arrays=arrays, columns=term.batch, params=params)

    @functools.cached_property
    def objective(self) -> Objective:
        return Objective(terms=((self.term, 1.0),))

    @property
    def parameter_names(self) -> list[str]:
        return [name for name in self.arrays if name.startswith("params")]

    @property
    def shared(self) -> list[str]:
        return [name for name in self.arrays if name in (*_SHARED, *self.parameter_names)]

    @property
    def learns(self) -> list[str]:
        """Return arrays that get a gradient; a term's own head replaces the student's."""
        own_head = self.params is not None and self.term.own_head(self.params) is not None
        return ["hidden", *self.parameter_names, *(() if own_head else ("head", "bias"))]

    @functools.cached_property
    def vocabularies(self) -> Callable[[int], Vocabularies]:
        """Identical vocabularies under any rule; tokens beyond the tokenizer have no match."""

        @functools.cache
        def make(size: int) -> Vocabularies:
            present = np.arange(size) < _VOCAB
            rule = None if self.term.teacher is None else self.term.teacher.projection
            projection = TokenProjection(
                ids=np.where(present, np.arange(size), -1).astype(np.int32)[:, None],
                weights=present.astype(np.float32)[:, None],
                size=size,
                rule=rule or "exact",
            )
            # Every third token begins a word.
            boundary = TokenSet(present & (np.arange(size) % 3 == 0))
            projections = {rule: projection} if rule else {}
            return Vocabularies(projections=projections, boundary=boundary)

        return make

    def teachers(self, arrays: Mapping[str, Any]) -> list[Teacher]:
        if self.term.teacher is None:
            return []
        chunks = {n[6:]: x[:, 0] for n, x in arrays.items() if n.startswith("chunk_")}
        teacher = Teacher(
            hidden=arrays["teacher_hidden"],
            head=_head(arrays["teacher_head"], arrays["teacher_bias"]),
            chunks=ChunkScores(**chunks) if chunks else None,
            vocabularies=self.vocabularies(arrays["bias"].shape[0]),
            # Smaller than the vocabulary.
            top_k=4,
        )
        return [teacher]

    def batch(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: arrays[name] for name in ("labels", *self.columns)}

    def counts(self, arrays: Mapping[str, Any]) -> Any:
        teachers = self.teachers(arrays)
        return self.objective.counts(self.batch(arrays), teachers, where=arrays["where"])

    def total(self, counts: Any = None, **arrays: Any) -> jax.Array:
        leaves = [arrays[name] for name in self.parameter_names]
        params = jax.tree.unflatten(jax.tree.structure(self.params), leaves)
        name = self.objective.names[0]
        return self.objective.value(
            arrays["hidden"],
            _head(arrays["head"], arrays["bias"]),
            self.batch(arrays),
            self.teachers(arrays),
            None if self.params is None else {name: params},
            where=arrays["where"],
            counts=counts,
        )[0]

    def check_value(self) -> None:
        props.frozen_value("value", self.term, Term)

    def check_needs(self) -> None:
        def without(**changes: Any) -> None:
            batch = {n: x for n, x in self.batch(self.arrays).items() if n not in changes}
            teachers = [] if "teacher" in changes else self.teachers(self.arrays)
            if "everything" in changes:
                teachers = [Teacher(where=self.arrays["where"])]
            hidden, head = self.arrays["hidden"], self.arrays["head"]
            where = self.arrays["where"]
            lost = next(iter(changes))
            try:
                jax.eval_shape(
                    lambda: self.objective.value(hidden, head, batch, teachers, where=where)
                )
            except ValueError as error:
                if self.objective.names[0] in str(error):
                    return
                props.fail("needs", lost, f"expected an error that names the term, got {error}")
            props.fail("needs", lost, f"expected an error where there is no {lost}, got none")

        for column in self.columns:
            without(**{column: None})
        if self.term.teacher is not None:
            without(teacher=None)
            if self.term.teacher.names - {"where", "single"}:
                without(everything=None)

    @functools.cached_property
    def whole(self) -> Any:
        return jax.device_get(jax.jit(self.value_and_gradients(self.total))(self.arrays))

    def value_and_gradients(self, total: Callable[..., Any]) -> Callable[[Any], Any]:
        def run(arrays: Any) -> Any:
            rest = {n: x for n, x in arrays.items() if n not in self.learns}
            moved = {n: arrays[n] for n in self.learns}
            return jax.value_and_grad(lambda moved: total(**moved, **rest))(moved)

        return run

    def compare(self, name: str, total: Callable[..., Any]) -> None:
        run = jax.jit(self.value_and_gradients(total))
        value, gradients = jax.device_get(props.attempt(name, run, self.arrays))
        props.equal(name, "sum", value, self.whole[0])
        for array, gradient in gradients.items():
            props.equal(name, f"gradient of {array}", gradient, self.whole[1][array], atol=1e-4)

    def check_parts(self) -> None:
        def total(**arrays: Any) -> Any:
            counts, half = self.counts(arrays), _ROWS // 2
            parts = [
                {n: x if n in self.shared else x[rows] for n, x in arrays.items()}
                for rows in (slice(half), slice(half, None))
            ]
            return sum(self.total(counts, **part) for part in parts)

        self.compare("parts", total)

    def check_shards(self) -> None:
        mesh = props.batch_mesh(_ROWS, AxisType.Auto)
        specs = {n: P() if n in self.shared else P("data") for n in self.arrays}

        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=P())
        def total(arrays: Any) -> Any:
            # Counts over all devices, by which each device divides its part.
            counts = jax.tree.map(lambda x: jax.lax.psum(x, "data"), self.counts(arrays))
            return jax.lax.psum(self.total(counts, **arrays), "data")

        self.compare("shards", lambda **arrays: total(arrays))


def _head(kernel: Any, bias: Any) -> losses.Head:
    """Make a head, padding the kernel to the size of the bias."""
    more = bias.shape[0] - kernel.shape[1]
    kernel = jnp.pad(jnp.asarray(kernel), ((0, 0), (0, more)))
    return losses.Head(kernel, bias, vocab_axis=1)
