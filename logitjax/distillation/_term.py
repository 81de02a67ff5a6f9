import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from logitjax.losses import Blocks, Head
from logitjax.losses.sweep import Statistic


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StudentNeeds:
    """Parts of the student's logits that a term reads; one sweep serves all terms.

    Attributes:
        label: `read.label_logit` and `read.cross_entropy` of the labels.
        ids: `[*batch, n]` tokens whose logits are `read.gathered`, and with the normaliser
            `read.top`, the `losses.Readout` that sparse divergences take.
        top_k: Number of the student's largest logits, `read.statistics`.
        statistic: A `sweep.Statistic` of the term, whose results are `read.statistic`. It may use
            the logits of a teacher that gives hidden states and a head.
        tokens: Arrays `[*batch, ...]` that the statistic reads in addition to the `labels`.
        blocks: Sizes of the sweep's blocks, if the statistic requires some.
        beside: Arrays `[*batch, ...]` that the term has computed from its teacher and gets back as
            `read.beside`.
    """

    label: bool = False
    ids: Any = None
    top_k: int = 0
    statistic: Statistic | None = None
    tokens: Any = None
    blocks: Blocks | None = None
    beside: Any = None

    @property
    def names(self) -> set[str]:
        """The attributes that `read` will have."""
        names = {"label_logit", "cross_entropy", "log_z"} if self.label else set()
        names |= {"gathered", "top", "log_z"} if self.ids is not None else set()
        names |= {"statistics", "log_z"} if self.top_k else set()
        names |= {"statistic"} if self.statistic is not None else set()
        return names | ({"beside"} if self.beside is not None else set())


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherNeeds:
    """Parts of each teacher that a term reads.

    Attributes:
        top_k: Minimum number of its top logits, `teacher.top`; 0 for none. A term gets all of them.
        moments: Whether it needs mean and deviation of all logits too, `teacher.statistics`.
        rest: Whether it needs the mass of all other tokens. If False, `teacher.top.log_z` may be
            None.
        tail: Whether it uses samples of the other tokens, `teacher.tail`, which may be None.
        hidden: Whether it needs hidden states and the head.
        same_vocabulary: Whether the teacher must have the student's vocabulary.
        projection: Rule of the projection between the vocabularies, see `token_projection`.
        chunks: Whether it needs `teacher.chunks`, log-probabilities of spans of text, and the
            student's tokens that begin a word.
    """

    top_k: int = 0
    moments: bool = False
    rest: bool = True
    tail: bool = False
    hidden: bool = False
    same_vocabulary: bool = False
    projection: str | None = None
    chunks: bool = False

    @property
    def names(self) -> set[str]:
        """The attributes of `teacher` that will be available."""
        names = {"where", "single"}
        names |= {"top"} if self.top_k else set()
        names |= {"statistics"} if self.moments else set()
        names |= {"tail"} if self.tail else set()
        names |= {"hidden", "head"} if self.hidden else set()
        names |= {"vocabularies"} if self.projection or self.chunks else set()
        return names | ({"chunks"} if self.chunks else set())


class Term(abc.ABC):
    """A loss that a student learns from: declared needs, and a value per teacher.

    A term is a frozen, keyword-only dataclass whose fields are its options. It is hashable and
    holds no arrays; its repr belongs to the identity of a run. `Objective` passes it the declared
    readings of student and teachers only; reading anything else is an error that names the term.

    Attributes:
        name: Name in flags and metrics.
        teacher: Needed parts of each teacher; None for a term that needs only the text, which is
            evaluated once.
        batch: Names of further columns of the batch, `[*batch]` each, such as the sampled
            `log_probs` or `rewards`.
        pointwise: Whether its values are `[*batch]` and each is a function of its own position.
            If all terms are, the gradient is formed in the sweep that reads the student.
        trains: Whether its gradient is that of its value. If not, it can only be reported, with
            weight 0.

    See docs/add_a_term.md.
    """

    name: ClassVar[str] = ""
    teacher: ClassVar[TeacherNeeds | None] = None
    batch: ClassVar[tuple[str, ...]] = ()
    pointwise: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __str__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        changed = [f for f in fields if getattr(self, f.name) != f.default]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"{self.name or type(self).__name__}" + (f"({options})" if options else "")

    def init(self, key: jax.Array, head: Head) -> Any:
        """Create arrays of the term, trained with the student, or None; `head` gives the sizes."""
        return None

    def own_head(self, params: Any) -> Head | None:
        """Return the term's own head for the student's hidden states, if it has one."""
        return None

    @abc.abstractmethod
    def student(self, teacher: Any) -> StudentNeeds:
        """Return the needed readings of the student, given a `Teacher`'s attributes or None."""

    def seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        """Return the mask or weights that the values are averaged over; None for all labels.

        It is called before the student is read, because a sweep needs the weight of each position.
        """
        return None

    def labels_seen(self, teacher: Any, batch: Mapping[str, Any]) -> Any:
        """`[*batch]` mask of the labels that the term learns from; None for all."""
        return self.seen(teacher, batch)

    @abc.abstractmethod
    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        """The loss for one teacher, not reduced.

        `read` has the attributes that `student` requested, `teacher` the declared ones, and `batch`
        `labels`, `where` they count, and the columns of `Term.batch`. `params` are the arrays of
        `init`, or None in a sweep if the term has its own head.

        Returns:
            `[*batch]`, or, for a term that is not pointwise, the shape of `seen`.
        """


class Declared:
    """Attributes that a term has declared; reading any other is an error."""

    def __init__(self, term: Term, argument: str, values: Mapping[str, Any]):
        self._term, self._argument, self._values = term, argument, values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._values:
            return self._values[name]
        raise ValueError(
            f"loss {str(self._term)!r}: reads {self._argument}.{name}, which it does not declare "
            f"(it declares {', '.join(sorted(self._values)) or 'nothing'})"
        )
