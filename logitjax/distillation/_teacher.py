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


# Static under jit, so compared by identity: tables of ids have no hash.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabularies:
    """The relation of a teacher's vocabulary to the student's; equal only to itself.

    `projections` are keyed by rule; `boundary` are the student's tokens that begin a word (`ALM`).
    """

    projections: Mapping[str, TokenProjection] = dataclasses.field(default_factory=dict)
    boundary: TokenSet | None = None

    @functools.cached_property
    def matches(self) -> Matches:
        """The common tokens, by the projection `exact`."""
        return Matches.of(self.projections["exact"])


# One object: jit compiles once.
SAME_VOCABULARY = Vocabularies()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The available output of one teacher on a batch, at the student's positions.

    A cache gives `statistics`; a model that runs alongside the student gives `hidden` and `head`,
    from which an objective computes the statistics that its terms declare.

    Attributes:
        statistics: `losses.GraphStatistics` of the next token, `[*batch]`.
        hidden: `[*batch, width]` hidden states. They get no gradient.
        head: Their `losses.Head`.
        where: `[*batch]` positions where both predict what follows the same text; None for all.
        single: The positions among them whose label is one token on both sides; None for the same.
        chunks: `ChunkScores` of the text.
        vocabularies: The relation of its vocabulary to the student's; static.
        top_k: Number of top logits computed from hidden states; static.
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
