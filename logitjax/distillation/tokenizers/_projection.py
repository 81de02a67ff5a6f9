import dataclasses
import functools
import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax
from jaxtyping import Int

from logitjax.ops import Array, TopK
from logitjax.ops import mesh as on_mesh
from logitjax.storage import guard, write_atomic
from logitjax.storage.weights import read_npz


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """Student tokens that map to some of k teacher tokens, `[*batch, m]` each.

    The slot of a token is the index among the k; unused entries have slot k.
    """

    ids: Any
    slots: Any
    weights: Any


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenProjection:
    """Sparse matrix W from the student's tokens (ours) to a teacher's (theirs).

    Attributes:
        ids: int32 `[ours, r]`, their tokens; -1 for none.
        weights: float32 `[ours, r]`; 0 for none.
        size: Entries of their vocabulary.
        rule: The rule of `token_projection` that made it.
        merges: int32 `[size]`, the token that each of theirs counts as (-1: none); None for itself.
    """

    ids: np.ndarray
    weights: np.ndarray
    size: int
    rule: str = "first_piece"
    merges: np.ndarray | None = None

    @functools.cached_property
    def _by_teacher_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Starts `[size + 1]` of each teacher token in the lists of student tokens and weights."""
        # `[entries]`, in order of our tokens.
        tokens, rank = np.nonzero(self.ids >= 0)
        other = self.ids[tokens, rank]
        order = np.argsort(other, kind="stable")
        # Offsets, as in a CSR matrix.
        starts = np.zeros(self.size + 1, np.int32)
        np.cumsum(np.bincount(other, minlength=self.size), out=starts[1:])
        return starts, tokens[order].astype(np.int32), self.weights[tokens, rank][order]

    @property
    def sizes(self) -> np.ndarray:
        """Number of our tokens that map to each teacher token, `[size]`."""
        return np.diff(self._by_teacher_token[0])

    def capacity(self, k: int) -> int:
        """Maximum number of our tokens that map to any k different teacher tokens."""
        return max(int(np.sort(self.sizes)[::-1][:k].sum()), 1)

    def members(self, ids: Int[Array, "*batch k"]) -> Members:
        """Look up our tokens for the teacher's top k at each position, `m = capacity(k)` of them.

        `ids`, `[*batch, k]`, are distinct at each position, as from `merged`; ids from `size` on
        belong to no token.

        >>> projection = TokenProjection(
        ...     ids=np.array([[0], [2], [2], [-1]], np.int32), weights=np.ones((4, 1)), size=3)
        >>> found = jax.jit(projection.members)(jnp.array([2, 1]))
        >>> found.ids.tolist(), found.slots.tolist()
        ([1, 2, 0], [0, 0, 2])
        """
        ids = jnp.asarray(ids)
        result = on_mesh.over_batch(self._members, (ids.ndim,) * 3, ids)
        return Members(**dict(zip(("ids", "slots", "weights"), result)))

    def _members(self, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        starts, tokens, weights = self._by_teacher_token
        # Ids from `size` on get the slot without members.
        ids = jnp.minimum(ids, self.size)
        k, size = ids.shape[-1], self.capacity(ids.shape[-1])
        # `[*batch, k]`: where the members of each begin in `tokens`, and how many there are.
        first = jnp.asarray(starts)[ids]
        counts = jnp.asarray(starts)[jnp.minimum(ids + 1, self.size)] - first
        ends = jnp.cumsum(counts, axis=-1)
        # Slot of each entry: the number of slots that end before it.
        places = jnp.arange(size, dtype=jnp.int32)
        slots = jax.vmap(lambda row: jnp.searchsorted(row, places, side="right"))(
            ends.reshape(-1, k)
        ).reshape(*ids.shape[:-1], size)
        stored = jnp.minimum(slots, k - 1)
        # Start of a slot's members in `tokens`, less their start in the row.
        offset = jnp.take_along_axis(first - ends + counts, stored, axis=-1)
        present = slots < k
        at = jnp.where(present, offset + places, 0)
        # A gather from an empty table is an error.
        empty = not len(tokens)
        return (
            jnp.where(present, 0 if empty else jnp.asarray(tokens)[at], 0),
            jnp.where(present, slots, k).astype(jnp.int32),
            jnp.where(present, 0.0 if empty else jnp.asarray(weights)[at], 0.0),
        )

    def merged(self, teacher: TopK) -> TopK:
        """Add up the mass of a teacher's top tokens that count as the same token.

        Argument and result are `TopK` `[*batch, k]`. The resulting tokens are distinct; unused
        entries have `-inf` and index `size`. Mass of tokens that count as none joins the rest.
        """
        if self.merges is None:
            return teacher
        ndim = teacher.values.ndim
        values, ids = on_mesh.over_batch(
            self._merged, (ndim, ndim), teacher.values, teacher.indices
        )
        return TopK(values, ids, teacher.log_z)

    def _merged(self, values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert self.merges is not None
        existing = np.append(np.where(self.merges < 0, self.size, self.merges), self.size)
        ids = jnp.asarray(existing, jnp.int32)[jnp.minimum(indices, self.size)]
        values = jnp.where(ids < self.size, values, -jnp.inf)
        # Sorting makes equal ids adjacent, and a running count gives each group its slot.
        ids, values = lax.sort((ids, values), dimension=-1, num_keys=1)
        new = jnp.concatenate(
            [jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], axis=-1
        )
        peak = values.max(-1, keepdims=True)
        # Relative to the peak, so that exp neither overflows nor vanishes; empty rows have no peak.
        mass = jnp.exp(values - jnp.where(peak == -jnp.inf, 0.0, peak))
        rows = (lax.broadcasted_iota(jnp.int32, ids.shape, a) for a in range(ids.ndim - 1))
        at = (*rows, jnp.cumsum(new, axis=-1) - 1)
        return (
            jnp.log(jnp.zeros_like(mass).at[at].add(mass)) + peak,
            jnp.full_like(ids, self.size).at[at].set(ids),
        )

    @property
    def only(self) -> np.ndarray:
        """Their token with the largest weight, int32 `[ours]`; -1 for none."""
        best = np.argmax(self.weights, axis=-1)[:, None]
        return np.take_along_axis(self.ids, best, axis=-1)[:, 0]

    def summary(self) -> dict[str, Any]:
        """Summarise, as a row of a table, how much of either vocabulary the projection covers."""
        sizes = self.sizes
        mapped = (self.ids >= 0).any(-1)
        local = np.arange(self.size)
        counts_as = local if self.merges is None else self.merges
        reached = (counts_as >= 0) & (sizes[counts_as] > 0)
        return {
            "rule": self.rule,
            "ours": len(self.ids),
            "theirs": self.size,
            "ours that map": int(mapped.sum()),
            "ours lost": int((~mapped).sum()),
            "theirs reached": int(reached.sum()),
            "theirs lost": int((~reached).sum()),
            "theirs told apart": int((sizes > 0).sum()),
            "largest bucket": int(sizes.max(initial=0)),
            "members of 64 at most": self.capacity(64),
        }

    def save(self, path: epath.Path, fingerprint: str) -> None:
        """Write the matrix and the fingerprint of its inputs."""
        about = {"fingerprint": fingerprint, "size": self.size, "rule": self.rule}
        file = io.BytesIO()
        # Uncompressed, since a reader would take compressed padding for a zip bomb.
        merges: dict[str, Any] = {} if self.merges is None else {"merges": self.merges}
        np.savez(file, ids=self.ids, weights=self.weights, about=json.dumps(about), **merges)
        write_atomic(path, file.getvalue())

    @classmethod
    def load(cls, path: epath.Path, fingerprint: str) -> "TokenProjection | None":
        """Read a saved projection; None if made from other inputs, an error if damaged."""
        if not path.exists():
            return None
        npz = read_npz(path)
        with guard.naming(path, "a projection"):
            about = guard.parse_json(str(npz["about"]).encode())
            if about["fingerprint"] != fingerprint:
                return None
            ids, weights, merges = npz["ids"], npz["weights"], npz.get("merges")
            size, rule = about["size"], about["rule"]
            return cls(ids=ids, weights=weights, size=size, rule=rule, merges=merges)
