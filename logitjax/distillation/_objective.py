"""What a student minimises: a weighted mix of losses, by name."""

import dataclasses
import math
from collections.abc import Sequence

from logitjax.distillation._graph_fusion import GraphFusionConfig
from logitjax.distillation._graph_on_logits import GraphConfig
from logitjax.distillation.tokenizers._token_pieces import Rule

# Those that compare token by token need one vocabulary.
_SAME_VOCABULARY = ("kl", "rkl", "jsd", "dual")
# Those that see another vocabulary through a projection, and its rule.
PROJECTIONS: dict[str, Rule] = {
    "first_piece": "first_piece",
    "pkl": "spread",
    "mined": "edit_distance",
    "hybrid": "exact",
    "hkl": "exact",
}
TERMS: tuple[str, ...] = ("sft", *_SAME_VOCABULARY, "uld", "gld", *PROJECTIONS, "alm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A weighted sum of losses. A loss with several teachers is the mean over them.

    ::

        sft   cross-entropy of the text               rkl   KL(student || teacher)
        kl    KL(teacher || student)                  jsd   generalised Jensen-Shannon divergence
        uld   universal logit distance                gld   graph-on-logits distillation
        dual  the KL norm of dual-head distillation, on a second head

    Teachers of other tokenizers::

        first_piece  KL over the teacher's vocabulary, where each token of the student is the first
                     piece that the teacher cuts it into
        pkl          the same, where it is spread over its pieces (X-Token)
        hybrid       JSD of common tokens and the sorted distance of others (GOLD)
        hkl          KL of common tokens and the sorted distance of others (X-Token)
        alm          approximate likelihood matching of chunks of text
        mined        KL by the nearest spelling, cross-entropy where tokens do not meet (MinED)

    Each of these, `uld` and `gld` is a mean over the places it can use: positions where both models
    have read the same text (`first_piece`, `pkl`), positions whose label is one token on both sides
    (`hybrid`, `hkl`), or chunks (`alm`). `seen/NAME` in the metrics is their share of the text.

    `kl`, `rkl` and `jsd` use the teacher's top logits and the mass of all others as one bucket. If
    the cache has draws from the others, they use these, and `kl` is unbiased. At a temperature
    other than 1 that mass is not known, and they compare the top logits alone.

    Attributes:
        terms: Names and weights.
        teachers: Weights of the teachers, divided by their sum.
        student_temperature: Divides the student's logits in `kl`, `rkl` and `jsd`.
        teacher_temperature: Divides the teachers'.
        beta: Share of the teacher in the mixture of `jsd` and `hybrid`.
        alm_temperature: Divides log-probabilities of chunks in `alm`, whose divergence is
            multiplied by it.
        graph: Graph of `gld`; `uld` compares as many ranks.

    >>> objective = Objective(terms=parse_terms(["sft:0.5", "kl:0.5"]), teachers=(1.0, 3.0))
    >>> objective.shares, objective.same_vocabulary
    ((0.25, 0.75), 'kl')
    """

    terms: tuple[tuple[str, float], ...]
    teachers: tuple[float, ...] = ()
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    beta: float = 0.5
    alm_temperature: float = 100.0
    graph: GraphConfig = GraphConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        names = [name for name, _ in self.terms]
        for name in names:
            if name not in TERMS:
                raise ValueError(f"loss: expected one of {', '.join(TERMS)}, got {name!r}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"loss: expected each loss once, got {', '.join(names) or 'none'}")
        if any(weight <= 0 or not math.isfinite(weight) for _, weight in self.terms):
            raise ValueError(f"loss: expected positive weights, got {dict(self.terms)}")
        if self.taught and not self.teachers:
            raise ValueError(f"teacher: expected one for the loss {self.taught!r}, got none")
        if any(weight <= 0 for weight in self.teachers):
            raise ValueError(f"teacher_weight: expected positive ones, got {self.teachers}")
        for name in ("student_temperature", "teacher_temperature", "alm_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    @property
    def weights(self) -> dict[str, float]:
        """Weights by name."""
        return dict(self.terms)

    @property
    def shares(self) -> tuple[float, ...]:
        """The teachers' weights, summing to one."""
        return tuple(weight / sum(self.teachers) for weight in self.teachers)

    @property
    def taught(self) -> str | None:
        """The first loss that needs a teacher."""
        return next((name for name, _ in self.terms if name != "sft"), None)

    @property
    def same_vocabulary(self) -> str | None:
        """The first loss that needs teachers of the student's vocabulary."""
        return next((name for name, _ in self.terms if name in _SAME_VOCABULARY), None)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules of the projections that the losses need."""
        return tuple(dict.fromkeys(PROJECTIONS[n] for n in self.weights if n in PROJECTIONS))

    @property
    def fusion(self) -> GraphFusionConfig:
        """The configuration of `uld` and `gld`."""
        weights = self.weights
        return GraphFusionConfig(
            mix=1.0,
            uld_weight=weights.get("uld", 0.0),
            gld_weight=weights.get("gld", 0.0),
            graph=self.graph,
        )


def parse_terms(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Losses as flags name them, `NAME` or `NAME:WEIGHT`; the weight is 1 where none is given.

    >>> parse_terms(["sft", "gld:0.002"])
    (('sft', 1.0), ('gld', 0.002))
    """
    terms = []
    for text in texts:
        name, _, weight = text.partition(":")
        try:
            terms.append((name, float(weight or 1.0)))
        except ValueError:
            raise ValueError(f"loss: expected NAME or NAME:WEIGHT, got {text!r}") from None
    return tuple(terms)


def parse_gld(text: str, *, k: int) -> tuple[GraphConfig, float]:
    """`NODE/FEATURE/VALUE:WEIGHT`, such as `rank/row_sum/closed_form:0.002`.

    >>> parse_gld("token/row_rms/closed_form:0.5", k=10)[1]
    0.5
    """
    kind, _, weight = text.partition(":")
    names = kind.split("/")
    try:
        if len(names) != 3:
            raise ValueError("expected NODE/FEATURE/VALUE:WEIGHT")
        node, feature, value = names
        graph = GraphConfig(k=k, node=node, feature=feature, value=value)  # type: ignore
        return graph, float(weight)
    except ValueError as error:
        raise ValueError(f"gld {text!r}: {error}") from None
