import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from logitjax.distillation._teacher import Teacher
from logitjax.distillation._term import Declared, StudentNeeds, Term
from logitjax.losses import Head

# Attributes of a teacher that are not per position.
_NOT_AT_POSITIONS = ("vocabularies", "hidden", "head")


@dataclasses.dataclass(kw_only=True, eq=False)
class Part:
    """One term and one of its teachers.

    Attributes:
        number: Index of the teacher.
        share: The teacher's weight, a number or an array, `[]` or `[rows]`.
        attributes, columns: Declared readings of the teacher and of the batch.
        mean_share: The share as a number, for metrics.
        label_mask: `[*batch]` mask of the labels that this kind of term learns from; None for all.
        scale: Factor of its values; None for 1 at every label.
    """

    name: str
    term: Term
    weight: float
    number: int
    share: Any
    teacher: Teacher | None
    attributes: dict[str, Any]
    columns: dict[str, Any]
    params: Any
    mean_share: float
    label_mask: Any = None
    scale: Any = None

    @property
    def key(self) -> str:
        return f"{self.name}/{self.number}"

    @functools.cached_property
    def views(self) -> tuple[Any, Any]:
        """The teacher and the batch, restricted to what the term has declared."""
        return self.view(self.attributes, self.columns)

    def view(self, attributes: Mapping[str, Any], columns: Mapping[str, Any]) -> tuple[Any, Any]:
        return Declared(self.term, "teacher", attributes), _Columns(self.name, columns)

    @functools.cached_property
    def needs(self) -> StudentNeeds:
        return self.term.student(self.views[0])

    @functools.cached_property
    def seen(self) -> Any:
        seen = self.term.seen(*self.views)
        where = self.columns["where"]
        if self.label_mask is not None:
            where = where & self.label_mask
            seen = where if seen is None else seen
        if seen is None or seen.shape != where.shape:
            return seen
        if type(self.term).labels_seen is not Term.labels_seen:  # chunks of rows with any label
            where = where.any(axis=-1, keepdims=True)
        return seen & where if seen.dtype == jnp.bool_ else jnp.where(where, seen, 0.0)

    def weigh(self, where: Any, counts: Mapping[str, Any]) -> None:
        """Set `scale` such that a sum divided by the number of labels is a mean over `seen`."""
        if self.seen is not None:
            ratio = counts["labels"] / jnp.maximum(counts["seen"][self.key], 1)
            seen = self.seen
            self.scale = jnp.where(seen, ratio, 0.0) if seen.dtype == jnp.bool_ else seen * ratio
        if not isinstance(self.share, float):
            scale = where.astype(jnp.float32) if self.scale is None else self.scale
            share = self.share.reshape(self.share.shape + (1,) * (scale.ndim - self.share.ndim))
            self.scale, self.share = scale * share, 1.0

    @property
    def head(self) -> Head | None:
        return None if self.params is None else self.term.own_head(self.params)

    @property
    def sweep(self) -> tuple[str, int | None, str]:
        """Key shared by parts of one sweep: head, teacher with formed logits, lone part."""
        statistic = self.needs.statistic
        local = self.name if self.head is not None else ""
        if statistic is None:
            return local, None, ""
        formed = self.term.teacher is not None and self.term.teacher.hidden
        alone = self.key if statistic.passes > 1 else ""
        return local, self.number if formed else None, alone

    @property
    def is_pointwise(self) -> bool:
        """Whether its gradient may be formed in the sweep, which has only tokens at hand."""
        return self.term.pointwise and (self.params is None or self.head is not None)

    def tokens(self) -> dict[str, Any]:
        positions = {n: a for n, a in self.attributes.items() if n not in _NOT_AT_POSITIONS}
        optional = {"ids": self.needs.ids, "beside": self.needs.beside, "scale": self.scale}
        arrays = {name: array for name, array in optional.items() if array is not None}
        return {"teacher": positions, "batch": self.columns, **arrays}

    def values(self, readout: Any, statistic: Any, tokens: Mapping[str, Any]) -> Any:
        """Return its values, scaled and multiplied by its teacher's share."""
        everywhere = {n: a for n, a in self.attributes.items() if n in _NOT_AT_POSITIONS}
        teacher, batch = self.view(everywhere | tokens["teacher"], tokens["batch"])
        read = {"statistic": statistic, "beside": tokens.get("beside")}
        if readout is not None:
            read |= readout._asdict()
            if self.needs.top_k:
                # Another term of the sweep may need more.
                read["statistics"] = readout.statistics.truncate(self.needs.top_k)
            if "ids" in tokens:
                # Has the student's normaliser over its whole vocabulary.
                read["top"] = readout
        read = Declared(self.term, "read", {n: read[n] for n in self.needs.names})
        params = None if self.head is not None else self.params
        value = self.term.value(read, teacher, batch, params)
        if "scale" in tokens:
            # Not only a product: unused values may be infinite.
            value = jnp.where(tokens["scale"] != 0, value, 0.0) * tokens["scale"]
        return self.share * value


class _Columns(dict):
    """Columns that a term has declared; reading any other is an error."""

    def __init__(self, name: str, columns: Mapping[str, Any]):
        super().__init__(columns)
        self._name = name

    def __missing__(self, column: str) -> Any:
        raise ValueError(
            f"loss {self._name!r}: reads batch[{column!r}], which it does not declare (it declares "
            f"{', '.join(sorted(self))})"
        )


def declared_attributes(
    name: str, term: Term, teacher: Teacher | None, where: Any
) -> dict[str, Any]:
    """Collect a teacher's attributes that a term declares; ValueError if one is missing."""
    needs = term.teacher
    if needs is None or teacher is None:
        return {}
    statistics, existing = teacher.statistics, teacher.vocabularies
    if (needs.top_k or needs.moments or needs.tail) and statistics is None:
        raise ValueError(
            f"loss {name!r}: expected a teacher's statistics, or its hidden states and head, got "
            "neither"
        )
    if needs.top_k and statistics.values.shape[-1] < needs.top_k:  # type: ignore[union-attr]
        kept = statistics.values.shape[-1]  # type: ignore[union-attr]
        raise ValueError(
            f"loss {name!r}: expected at least {needs.top_k} top logits of a teacher, got {kept}"
        )
    if needs.top_k and needs.rest and statistics.log_z is None:  # type: ignore[union-attr]
        raise ValueError(
            f"loss {name!r}: expected a teacher with the mass outside its top logits, got only "
            "top logits"
        )
    if needs.hidden and (teacher.hidden is None or teacher.head is None):
        raise ValueError(
            f"loss {name!r}: expected a teacher's hidden states and head, got cached statistics; "
            "use a live teacher"
        )
    if needs.projection and needs.projection not in existing.projections:
        raise ValueError(f"loss {name!r}: expected the projection {needs.projection!r}, got none")
    if needs.chunks and (teacher.chunks is None or existing.boundary is None):
        raise ValueError(f"loss {name!r}: expected chunks and boundary tokens, got none")
    seen = jnp.ones_like(where, bool) if teacher.where is None else jnp.asarray(teacher.where)
    values = {
        "where": seen,
        "single": seen if teacher.single is None else jnp.asarray(teacher.single),
        "statistics": statistics,
        "hidden": teacher.hidden,
        "head": teacher.head,
        "chunks": teacher.chunks,
        "vocabularies": existing,
    }
    if statistics is not None:
        values |= {"top": teacher.top, "tail": teacher.tail}
    return {attribute: values[attribute] for attribute in needs.names}
