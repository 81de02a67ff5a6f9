import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from logitjax import losses, ops
from logitjax.distillation._part import Part
from logitjax.losses import Head, sweep


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Group parts into as few sweeps over the vocabulary as possible."""
    groups: dict[Any, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.sweep, []).append(part)
    for head, teacher, alone in list(groups):
        # A group without a teacher's logits joins a sweep that forms some: a host, which reads the
        # same head, has a teacher and may be shared.
        hosts = [key for key in groups if key[0] == head and key[1] is not None and not key[2]]
        if teacher is None and not alone and hosts:
            groups[hosts[0]] = groups.pop((head, teacher, alone)) + groups[hosts[0]]
    return list(groups.values())


def swept(
    parts: Sequence[Part], hidden: Any, head: Head, where: Any, axis_name: Any
) -> tuple[Any, list[Any]]:
    """Evaluate parts that share a sweep: their weighted sum over positions, and each part's sum."""
    head = (parts[0].head or head).resolve(hidden.shape[-1])
    reading = _Reading.of(parts, head, axis_name)
    local = [part.tokens() for part in parts]
    formed = next((part.teacher for part in parts if part.sweep[1] is not None), None)
    options: dict[str, Any] = dict(
        teacher=None if formed is None else (formed.hidden, formed.head),
        # One sweep has one tiling: the first part that asks for a size decides.
        blocks=next((p.needs.blocks for p in parts if p.needs.blocks is not None), None),
        axis_name=axis_name,
    )
    if not all(part.is_pointwise for part in parts):
        # Every logit is formed again in the backward pass. At unused positions a nan of the student
        # or a teacher would have a nan gradient, even with weight zero.
        hidden = jnp.where(where[..., None], hidden, 0.0)
        results = sweep.run(reading.statistic, hidden, head, tokens=reading.tokens, **options)
        results = jax.tree.map(
            # Ids have no gradient to mask.
            lambda x: ops.gradient_where(x, where) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            results,
        )
        sums = [_summed(*pair, where) for pair in zip(parts, reading.values(results, local))]
        pairs = zip(parts, sums, strict=True)
        return sum((_weighed(part.weight, total) for part, total in pairs), start=0.0), sums

    def mixed(results: Any, local: Any) -> Any:
        by_name: dict[str, Any] = {}
        for part, value in zip(parts, reading.values(results, local), strict=True):
            by_name[part.name] = by_name.get(part.name, 0.0) + value
        weights = {part.name: part.weight for part in parts}
        return sum(_weighed(weights[name], value) for name, value in by_name.items())

    # The result is a scalar, so the same sweep forms the head's gradient.
    total, outputs = sweep.run(
        sweep.LossOf(reading.statistic, mixed),
        hidden,
        head,
        tokens={"statistic": reading.tokens, "loss": local},
        weights=where.astype(jnp.float32),
        **options,
    )
    results = reading.statistic.losses(outputs, reading.tokens)
    values = reading.values(results, local)
    return total, [_summed(*pair, where) for pair in zip(parts, values, strict=True)]


def _weighed(weight: float, value: Any) -> Any:
    # A term of weight 0 may be infinite.
    return weight * value if weight else jnp.zeros_like(value)


def _summed(part: Part, value: Any, where: Any) -> Any:
    return (jnp.where(where, value, 0.0) if part.scale is None else value).sum()


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """The statistic that serves some parts, and the results that belong to each.

    `slices` locates each part's ids among those gathered, `numbers` its own statistic among
    `Several`; None for none.
    """

    parts: Sequence[Part]
    statistic: sweep.Statistic
    tokens: Any
    slices: Sequence[slice | None]
    numbers: Sequence[int | None]
    has_readout: bool

    @classmethod
    def of(cls, parts: Sequence[Part], head: Head, axis_name: Any) -> "_Reading":
        labels = parts[0].columns["labels"]
        ids: list[Any] = []
        slices = [_slice(ids, part.needs.ids) for part in parts]
        top_k = max(part.needs.top_k for part in parts)
        label = any(part.needs.label for part in parts)
        statistics: list[tuple[sweep.Statistic, Any]] = []
        if has_readout := bool(ids or top_k or label):
            readout = losses.readout_statistic(
                head,
                labels=labels if label else None,
                ids=jnp.concatenate(ids, axis=-1) if ids else None,
                top_k=top_k or None,
                axis_name=axis_name,
            )
            statistics.append(readout)
        numbers: list[int | None] = []
        for part in parts:
            statistic = part.needs.statistic
            numbers.append(None if statistic is None else len(statistics))
            if statistic is not None:
                statistics.append((statistic, {"labels": labels} | (part.needs.tokens or {})))
        if len(statistics) == 1:
            statistic, tokens = statistics[0]
        else:
            statistic = sweep.Several(tuple(statistic for statistic, _ in statistics))
            tokens = {str(i): tokens for i, (_, tokens) in enumerate(statistics)}
        return cls(parts, statistic, tokens, slices, numbers, has_readout)

    def values(self, results: Any, local: Sequence[Mapping[str, Any]]) -> list[Any]:
        # A part's own statistic may be `Several` as well.
        count = self.has_readout + sum(number is not None for number in self.numbers)
        results = results if count > 1 else (results,)
        values = []
        for part, ids, number, tokens in zip(self.parts, self.slices, self.numbers, local):
            readout = results[0] if self.has_readout else None
            if readout is not None and ids is not None:
                gathered, ids = readout.gathered[..., ids], readout.ids[..., ids]
                readout = readout._replace(gathered=gathered, ids=ids)
            individual = None if number is None else results[number]
            values.append(part.values(readout, individual, tokens))
        return values


def _slice(gathered: list[Any], ids: Any) -> slice | None:
    """Locate ids among those gathered; new ones are added."""
    if ids is None:
        return None
    start = 0
    for existing in gathered:
        # By identity: under `jit` these are tracers, and terms of one teacher share its array.
        if existing is ids:
            return slice(start, start + ids.shape[-1])
        start += existing.shape[-1]
    gathered.append(ids)
    return slice(start, start + ids.shape[-1])
