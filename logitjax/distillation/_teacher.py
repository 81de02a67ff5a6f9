import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from logitjax.distillation.tokenizers._likelihood_matching import ChunkScores, TokenSet
from logitjax.distillation.tokenizers._matched_tokens import Matches
from logitjax.distillation.tokenizers._projection import TokenProjection
from logitjax.losses import GraphStatistics, Head, TailSample
from logitjax.ops import TopK


# Static under jit, so it is compared by identity: tables of ids have no hash.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabularies:
    """Relation of a teacher's vocabulary to the student's; equal only to itself.

    `projections` are keyed by rule; `boundary` are the student's tokens that begin a word (`ALM`).
    """

    projections: Mapping[str, TokenProjection] = dataclasses.field(default_factory=dict)
    boundary: TokenSet | None = None

    @functools.cached_property
    def matches(self) -> Matches:
        """Tokens that both have, by the projection `exact`."""
        return Matches.of(self.projections["exact"])


# A single object, so that jit compiles once.
SAME_VOCABULARY = Vocabularies()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher's known output on a batch, at the student's positions.

    A cache gives `statistics`; a live model gives `hidden` and `head`, from which an objective
    reads the statistics that its terms declare.

    Attributes:
        statistics: `losses.GraphStatistics` of the next token, `[*batch]`.
        hidden: `[*batch, width]` hidden states. They get no gradient.
        head: The `losses.Head` for `hidden`.
        where: `[*batch]` positions where both models have read the same text; None for all.
        single: The subset of `where` whose label is one token on both sides; None for all of them.
        chunks: `ChunkScores` of the text.
        vocabularies: Relation of its vocabulary to the student's; static.
        top_k: Number of top logits that are read from hidden states; static.
    """

    statistics: GraphStatistics | None = None
    hidden: Any = None
    head: Head | None = None
    where: Any = None
    single: Any = None
    chunks: ChunkScores | None = None
    vocabularies: Vocabularies = dataclasses.field(
        default=SAME_VOCABULARY, metadata={"static": True}
    )
    top_k: int = dataclasses.field(default=64, metadata={"static": True})

    @property
    def top(self) -> TopK:
        """Its top logits."""
        assert self.statistics is not None
        return self.statistics.top_k

    @property
    def tail(self) -> TailSample | None:
        """Samples from outside its top logits, if its cache has any."""
        assert self.statistics is not None
        return self.statistics.tail
