"""Readings of a batch for methods, arranged from their declarations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.losses import Head, linear_cross_entropy
from logitjax.models import Decoder, Lora, first_layers
from logitjax.ops import Positions

SIDES = ("forget", "instead", "retain")


@dataclasses.dataclass(frozen=True)
class Need:
    """One reading that a method declares.

    Attributes:
        side: The rows: those to `'forget'`, those to `'retain'`, or `'instead'`, the questions of
            the rows to forget with the answers to give instead.
        of: `'nll'` of each token, the hidden `'states'` that predict answers, or the states of one
            `'layer'` (`Method.layer`) at all positions.
        before: Whether to read the model before unlearning instead of the trained one.
    """

    side: str
    of: str
    before: bool = False

    def __post_init__(self) -> None:
        for name, names in (("side", SIDES), ("of", ("nll", "states", "layer"))):
            if getattr(self, name) not in names:
                got = getattr(self, name)
                raise ValueError(f"Need: {name}: expected one of {', '.join(names)}, got {got!r}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """A method's readings of one batch. An undeclared reading is an error that names the method."""

    owner: str
    # Whether the answer tokens of each side fit into the reserved positions.
    fits: jax.Array
    _fixed: Any
    _values: Mapping[Need, jax.Array]
    _heads: Mapping[bool, Head]
    _positions: Mapping[str, Positions]
    _labels: Mapping[str, jax.Array]
    _where: Mapping[str, jax.Array]

    @property
    def fixed(self) -> Any:
        """The method's own constant arrays, from `Method.fixed`."""
        if self._fixed is None:
            raise ValueError(f"{self.owner}: expected arrays of `fixed`, which it reads, got None")
        return self._fixed

    def nll(self, side: str, *, before: bool = False) -> jax.Array:
        """Negative log-likelihood of each token after the first, `[rows, time - 1]`."""
        return self._value(Need(side, "nll", before))

    def answer_nll(self, side: str, *, before: bool = False) -> jax.Array:
        """Negative log-likelihood of each answer, summed over its tokens, `[rows]`."""
        return jnp.where(self.where(side), self.nll(side, before=before), 0.0).sum(-1)

    def states(self, side: str, *, before: bool = False) -> jax.Array:
        """Hidden states that predict answer tokens, `[..., hidden]`; `put` restores rows."""
        return self._value(Need(side, "states", before))

    def layer(self, side: str, *, before: bool = False) -> jax.Array:
        """The residual stream after some layers, `[rows, time - 1, hidden]`."""
        return self._value(Need(side, "layer", before))

    def head(self, *, before: bool = False) -> Head:
        return self._heads[before]

    def where(self, side: str) -> jax.Array:
        """Mask of answer tokens after the first token, bool `[rows, time - 1]`."""
        return self._of_side(self._where, side)

    def labels(self, side: str) -> jax.Array:
        """The tokens that `states` predict."""
        return self._of_side(self._labels, side)

    def put(self, side: str, values: jax.Array) -> jax.Array:
        """Values of `states` back in rows, `[rows, time - 1]`."""
        return self._of_side(self._positions, side).put(values)

    def _value(self, need: Need) -> jax.Array:
        if need not in self._values:
            raise ValueError(f"{self.owner}: expected {need} among its needs, which it reads")
        return self._values[need]

    def _of_side(self, values: Mapping[str, Any], side: str) -> Any:
        if side not in values:
            raise ValueError(f"{self.owner}: expected a need of {side!r} rows, which it reads")
        return values[side]


def read_batch(
    needs: Sequence[Need],
    batch: Mapping[str, Any],
    models: tuple[Decoder, Decoder | None],
    *,
    owner: str,
    layer: int,
    states_before: Any,
    lora: Lora | None = None,
    fixed: Any = None,
    most: Mapping[str, int] | None = None,
) -> Read:
    """Read a batch: each model runs once, over all sides that are needed."""
    sides = sides_of(needs)
    check_sides(sides, batch, owner)
    tokens = {side: jnp.asarray(batch[side]["tokens"]) for side in sides}
    # Nothing predicts the first.
    where = {side: jnp.asarray(batch[side]["mask"])[:, 1:] for side in sides}
    positions = {s: Positions(where[s], None if most is None else most[s]) for s in sides}
    labels = {side: positions[side].pick(tokens[side][:, 1:]) for side in sides}
    values: dict[Need, jax.Array] = {}
    heads: dict[bool, Head] = {}
    for before, model in zip((False, True), models, strict=True):
        adapters = None if before else lora
        matching = [need for need in needs if need.before is before]
        if matching and model is None:
            raise ValueError(f"reference: expected the model before, which {owner} reads, got None")
        if not matching or model is None:
            continue
        if deep := sides_of([need for need in matching if need.of == "layer"]):
            rows, cuts = _together([tokens[side] for side in deep])
            segments = _packed(batch, deep, "segments")
            states = jnp.split(_layer_states(model, layer, rows, segments, adapters)[:, 1:], cuts)
            values |= {Need(s, "layer", before): part for s, part in zip(deep, states)}
        if not (whole_sides := sides_of([need for need in matching if need.of != "layer"])):
            continue
        heads[before] = model.head_of()
        rows, cuts = _together([tokens[side] for side in whole_sides])
        segments, stored = (_packed(batch, whole_sides, name) for name in ("segments", "states"))
        if before:
            states = states_before(model, rows, fixed, segments) if stored is None else stored
        else:
            states = model.hidden_states(rows, lora=adapters, segment_ids=segments)[0]
        # The last predicts nothing.
        hidden = jnp.split(states[:, :-1], cuts)
        picked = {s: positions[s].pick(part) for s, part in zip(whole_sides, hidden)}
        values |= {Need(s, "states", before): picked[s] for s in whole_sides}
        scored = sides_of([need for need in matching if need.of == "nll"])
        # One sweep over all sides forms the head's gradient once; the model before has none.
        for group in [[side] for side in scored] if before else [scored][: len(scored)]:
            states, cuts = _together([picked[side] for side in group])
            targets, _ = _together([labels[side] for side in group])
            nll = jnp.split(linear_cross_entropy(states, heads[before], targets), cuts)
            values |= {Need(s, "nll", before): positions[s].put(x) for s, x in zip(group, nll)}
    return Read(
        owner=owner,
        _fixed=fixed,
        fits=jnp.stack([positions[side].fits for side in sides]).all(),
        # States come with likelihoods, but a method must declare them to read them.
        _values={need: values[need] for need in needs},
        _heads=heads,
        _positions=positions,
        _labels=labels,
        _where=where,
    )


def sides_of(needs: Sequence[Need]) -> list[str]:
    """The sides that are read, in the order of a batch."""
    return [side for side in SIDES if any(need.side == side for need in needs)]


def check_sides(sides: Sequence[str], batch: Mapping[str, Any], owner: str) -> None:
    for side in sides:
        if side not in batch:
            raise ValueError(
                f"batch: expected the side {side!r}, which {owner} reads, got {sorted(batch)}"
            )


def _together(parts: Sequence[Any]) -> tuple[jax.Array, np.ndarray]:
    """Parts as one array, and where to split it again."""
    # `jnp.split` takes inner ends only.
    return jnp.concatenate(parts), np.cumsum([len(part) for part in parts])[:-1]


def _packed(batch: Mapping[str, Any], sides: Sequence[str], name: str) -> Any:
    """What only packed rows have, or rows whose states before were computed once."""
    return _together([batch[s][name] for s in sides])[0] if name in batch[sides[0]] else None


def _layer_states(
    model: Decoder, count: int, tokens: Any, segments: Any, lora: Lora | None
) -> jax.Array:
    """The residual stream after some layers, without the final norm."""
    cut: Any = first_layers(model, count)
    # The last layer kept is not the model's last.
    cut.final_norm = jax.nn.identity
    if lora is not None:
        counts = [len(segment.layers) for segment in cut.segments]
        kept = tuple(tuple(layers[:n]) for layers, n in zip(lora.layers, counts))
        lora = dataclasses.replace(lora, layers=kept)
    return cut.hidden_states(tokens, lora=lora, segment_ids=segments)[0]
