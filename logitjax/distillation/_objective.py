import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax import losses, ops
from logitjax.distillation._part import Part, declared_attributes
from logitjax.distillation._sweep import grouped, swept
from logitjax.distillation._teacher import Teacher
from logitjax.distillation._term import Term
from logitjax.distillation.terms import TERMS
from logitjax.losses import Head

# A term, matched lazily, then a number after the last colon, since `package:Name` has colons too.
_WEIGHTED = re.compile(r"(.*?)(?::([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?))?", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of terms. A term with several teachers is averaged over them.

    ::

        L = sum_t weight_t  sum_i share_i  (sum seen_ti value_ti) / (sum seen_ti)

    Each term is averaged over the labels that it uses: all of them, positions where both models
    have read the same text, or chunks. Metric `seen/NAME` is the share of labels that it learns
    from.

    Attributes:
        terms: Terms and their weights. A term of weight 0 is only reported.
        teachers: Weights of the teachers, divided by their sum; equal if empty.

    Raises:
        ValueError: No terms, a repeated term, a negative weight, no weight above 0, or a weight
            above 0 for a term that cannot be trained on.

    >>> from logitjax.distillation.terms import KL, SFT
    >>> objective = Objective(terms=((SFT(), 0.5), (KL(temperature=2.0), 0.5)), teachers=(1.0, 3.0))
    >>> objective.shares, objective.names
    ((0.25, 0.75), ('sft', 'kl'))

    References:
        docs/distil.md lists the terms.
    """

    terms: tuple[tuple[Term, float], ...]
    teachers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for term, _ in self.terms:
            if not isinstance(term, Term):
                raise TypeError(f"loss: expected a Term, got {term!r}")
            # Terms are static arguments of the sweep.
            hash(term)
        values = [term for term, _ in self.terms]
        if not values or len(set(values)) < len(values):
            listed = ", ".join(map(str, values)) or "none"
            raise ValueError(f"loss: expected each loss once, got {listed}")
        for term, weight in self.terms:
            if not 0 <= weight < math.inf:
                raise ValueError(f"loss: expected no negative weights, got {term}:{weight}")
            if weight and not term.trains:
                raise ValueError(
                    f"loss {str(term)!r}: expected weight 0, which reports it, got {weight}: its "
                    "gradient is not that of its value"
                )
        if not any(weight for _, weight in self.terms):
            raise ValueError("loss: expected a weight above 0, got none")
        if any(weight <= 0 for weight in self.teachers):
            raise ValueError(f"teacher_weight: expected positive numbers, got {self.teachers}")

    @property
    def shares(self) -> tuple[float, ...]:
        """The teachers' weights, normalised to sum to one."""
        return tuple(weight / sum(self.teachers) for weight in self.teachers)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the terms in metrics, with their options where two share a name."""
        plain = [term.name or type(term).__name__ for term, _ in self.terms]
        return tuple(
            name if plain.count(name) == 1 else str(term)
            for name, (term, _) in zip(plain, self.terms, strict=True)
        )

    @property
    def taught(self) -> Term | None:
        """The first term that needs a teacher."""
        return next((term for term, _ in self.terms if term.teacher is not None), None)

    def init(self, key: jax.Array, head: Head) -> dict[str, Any]:
        """Create the arrays of terms that have their own, by the terms' names."""
        arrays = {
            name: term.init(jax.random.fold_in(key, number), head)
            for number, (name, (term, _)) in enumerate(zip(self.names, self.terms, strict=True))
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def counts(
        self, batch: Mapping[str, Any], teachers: Sequence[Teacher] = (), *, where: Any
    ) -> dict[str, Any]:
        """Count the positions that the terms use in a batch, for `value` on parts of the batch.

        Arguments are those of `value`. Counts add up over micro-batches and shards.
        """
        teachers = [_with_statistics(self, teacher, None) for teacher in teachers]
        parts = self._parts(batch, teachers, {}, where)
        seen = {part.key: part.seen.sum() for part in parts if part.seen is not None}
        return {"labels": where.sum(), "seen": seen}

    def value(
        self,
        hidden: Float[ops.Array, "*batch hidden"],
        head: Head | Float[ops.Array, "rows columns"],
        batch: Mapping[str, Any],
        teachers: Sequence[Teacher] = (),
        params: Mapping[str, Any] | None = None,
        *,
        where: Any,
        teacher_weights: Any = None,
        counts: Mapping[str, Any] | None = None,
        axis_name: ops.AxisName | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """The loss summed over the labels, their number, and metrics; pure.

        `sum / count` is the loss. Over micro-batches or shards, sums and counts add up to those of
        the whole batch if `counts` are those of the whole batch.

        Args:
            hidden: `[*batch, hidden]`, hidden states of the student where it predicts `labels`.
            head: Its `losses.Head`, or a kernel alone. Padded entries have bias `-inf`.
            batch: `labels`, `[*batch]`, and what terms declare in `Term.batch`. Terms without a
                teacher learn nothing from labels that have `log_probs`, which the student wrote.
            teachers: The teachers, if a term needs them.
            params: The result of `init`.
            where: `[*batch]` boolean: positions whose labels count; the others may even hold NaN.
            teacher_weights: `[teachers]`, or `[rows, teachers]` to send each row to its teacher;
                `teachers` of the objective by default.
            counts: The result of `counts` for the whole batch, if this is a part of one.
            axis_name: Mesh axis that splits the head's vocabulary, inside `jax.shard_map`.

        Returns:
            The sum, float32; the number of labels; and metrics: for each term the pair of its sum
            and that number, and `seen/NAME` for a term that uses a part of the text.

        Raises:
            ValueError: A term needs what is missing, or reads what it has not declared.
        """
        hidden, where = jnp.asarray(hidden), jnp.asarray(where)
        # The width tells which axis of a bare kernel is the vocabulary.
        head = Head.of(head).resolve(hidden.shape[-1])
        teachers = [_with_statistics(self, teacher, axis_name) for teacher in teachers]
        parts = self._parts(batch, teachers, params or {}, where, teacher_weights)
        existing = self.counts(batch, teachers, where=where) if counts is None else counts
        for part in parts:
            part.weigh(where, existing)
        count, value = where.sum(), jnp.float32(0.0)
        sums: dict[str, Any] = {}
        for members in grouped(parts):
            total, values = swept(members, hidden, head, where, axis_name)
            value = value + total
            for part, part_value in zip(members, values, strict=True):
                sums[part.name] = sums.get(part.name, 0.0) + part_value
        # A loop may by mistake differentiate through metrics.
        metrics = {name: (jax.lax.stop_gradient(sums[name]), count) for name in self.names}
        return value, count, metrics | _shares_seen(parts, where)

    def _parts(
        self,
        batch: Mapping[str, Any],
        teachers: Sequence[Teacher],
        params: Mapping[str, Any],
        where: Any,
        teacher_weights: Any = None,
    ) -> list[Part]:
        """Pair each term with each of its teachers, and check declared needs."""
        if self.teachers and teachers and len(self.teachers) != len(teachers):
            raise ValueError(f"teachers: expected {len(self.teachers)}, got {len(teachers)}")
        default = self.shares or (1.0 / max(len(teachers), 1),) * len(teachers)
        shares = _shares(default, teacher_weights)
        parts = []
        for name, (term, weight) in zip(self.names, self.terms, strict=True):
            columns = {"labels": batch["labels"], "where": where}
            for column in term.batch:
                if column not in batch:
                    raise ValueError(
                        f"loss {name!r}: expected batch[{column!r}], got {', '.join(batch)}"
                    )
                columns[column] = batch[column]
            if term.teacher is not None and not teachers:
                raise ValueError(f"loss {name!r}: expected a teacher, got none")
            of_text = term.teacher is None
            local = None
            if of_text and "log_probs" in batch and "log_probs" not in term.batch:
                # Maximum likelihood on its own text would only sharpen the student.
                local = jnp.isnan(batch["log_probs"])
            for number, teacher in enumerate([None] if of_text else teachers):
                parts.append(
                    Part(
                        name=name,
                        term=term,
                        weight=weight,
                        number=number,
                        share=1.0 if of_text else shares[number],
                        teacher=teacher,
                        attributes=declared_attributes(name, term, teacher, where),
                        columns=columns,
                        params=params.get(name),
                        mean_share=1.0 if of_text else default[number],
                        label_mask=local,
                    )
                )
        return parts


def parse_terms(texts: Sequence[str]) -> tuple[tuple[Term, float], ...]:
    """Parse terms as in flags: `NAME`, `NAME(option=value)` or `package:Name`, and a weight.

    The weight follows a colon, and is 1 by default. Unknown terms or options are ValueErrors.

    >>> [(str(term), weight) for term, weight in parse_terms(["sft", "kl(temperature=2):0.3"])]
    [('sft', 1.0), ('kl(temperature=2.0)', 0.3)]
    """
    terms = []
    for text in texts:
        match = _WEIGHTED.fullmatch(text)
        assert match is not None
        terms.append((TERMS.parse(match[1]), float(match[2] or 1.0)))
    return tuple(terms)


def _with_statistics(objective: Objective, teacher: Teacher, axis_name: Any) -> Teacher:
    """Return a teacher with the declared statistics, read from its hidden states if necessary."""
    # A live teacher shares no parameters with the student, but may share its arrays: a loop that
    # trains both must not move the teacher.
    teacher = jax.lax.stop_gradient(teacher)
    needs = [term.teacher for term, _ in objective.terms if term.teacher is not None]
    top_k = max((n.top_k for n in needs), default=0)
    if teacher.statistics is not None or teacher.head is None or not top_k:
        return teacher
    head = Head.of(teacher.head).resolve(teacher.hidden.shape[-1])
    # As many as a cache keeps, so that a live teacher and a cached one give equal values.
    top_k = min(max(top_k, teacher.top_k), head.vocab_size(axis_name))
    readout = losses.linear_readout(teacher.hidden, head, top_k=top_k, axis_name=axis_name)
    statistics = jax.lax.stop_gradient(readout.statistics)
    return dataclasses.replace(teacher, statistics=statistics)


def _shares(default: Sequence[float], weights: Any) -> Sequence[Any]:
    if weights is None:
        return default
    weights = jnp.asarray(weights, jnp.float32)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(default):
        raise ValueError(
            f"teacher_weights: expected [{len(default)}] or [rows, {len(default)}], got "
            f"{weights.shape}"
        )
    total = weights.sum(-1, keepdims=True)
    # A row without a teacher learns from none; avoid a division by zero.
    weights = weights / jnp.where(total > 0, total, 1.0)
    return [weights[..., number] for number in range(len(default))]


def _shares_seen(parts: Sequence[Part], where: Any) -> dict[str, tuple[Any, Any]]:
    """Number of labels that each term learns from, for terms that use a part of the text."""
    # A loss may be small merely because it uses little of the text.
    totals: dict[str, Any] = {}
    for part in parts:
        labels = part.term.labels_seen(*part.views)
        if labels is not None:
            share = part.mean_share
            totals[part.name] = totals.get(part.name, 0.0) + share * (labels & where).sum()
    return {f"seen/{name}": (total, where.sum()) for name, total in totals.items()}
