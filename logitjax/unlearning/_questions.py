"""Questions for a model while it forgets: parts of a split, encoded once."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from absl import logging
from etils import epath

from logitjax import storage
from logitjax.evaluation import NllFn, rouge, score_rows
from logitjax.models import Decoder, Tokenizer
from logitjax.storage import guard
from logitjax.unlearning._rows import Row, encode_question, encode_row
from logitjax.unlearning._selection import KNOWN
from logitjax.unlearning._split import names, neighbours, twin
from logitjax.unlearning._ways import SHOTS, asked_so
from logitjax.unlearning.assistant._deployed import Deployed, answers

# ROUGE-L above which a text counts as a repetition of an answer.
_REPEATS = 0.7
# Number of scoring batches for which answers are generated at once.
_TOGETHER = 4
_PARTS = (
    *("forget", "reworded", "reworded_test", "train", "validation", "test"),
    *("holdout", "holdout_test", "stranger"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """Rows as token ids, by part.

    Attributes:
        rows: Rows by part: those of `split_rows`; `wrong`, questions to forget with each other's
            answers; and `stranger`, questions about invented people, for training only.
        encoded: Encoded rows by part, for `evaluation.score_rows`.
        cut: Indices of rows longer than `max_length`, by part; only their beginnings are used.
        texts: Windows of other text by part, `train`, `validation` and `test`; may be empty.
        max_length: Maximum number of tokens of a row.
        new_tokens: Maximum number of tokens of a generated answer.
        batch_size: Number of rows asked at once.
    """

    rows: Mapping[str, Sequence[Row]]
    tokenizer: Tokenizer
    encoded: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]
    cut: Mapping[str, frozenset[int]]
    texts: Mapping[str, np.ndarray]
    max_length: int
    new_tokens: int
    batch_size: int
    # Encoded rows by part and way, and states of a model by batch, once they were asked for.
    _ways: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    _states: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)
    # Number of rows of a part for costly attacks.
    costly: ClassVar[int] = 40

    @classmethod
    def of(
        cls,
        parts: Mapping[str, Sequence[Row]],
        tokenizer: Tokenizer,
        *,
        texts: Mapping[str, np.ndarray] | None = None,
        max_length: int = 256,
        new_tokens: int = 48,
        batch_size: int = 4,
    ) -> "Questions":
        """Encode all parts; missing parts are empty.

        Raises:
            ValueError: A part with another name, a prompt longer than `max_length`, or a text of
                one token.
        """
        if extra := sorted(set(parts) - set(_PARTS)):
            raise ValueError(f"parts: expected some of {', '.join(_PARTS)}, got {extra}")
        rows = {part: tuple(parts.get(part, ())) for part in _PARTS}
        # Plain text has no question to pair with another answer.
        questions = [row for row in rows["forget"] if row.asks]
        # The answer to the next question.
        shifted = [row.answer for row in (*questions[1:], *questions[:1])]
        wrong = [dataclasses.replace(row, answer=a) for row, a in zip(questions, shifted)]
        rows["wrong"] = tuple(wrong) if len(questions) > 1 else ()
        encoded = {
            part: [encode_row(row, tokenizer, max_length=max_length) for row in members]
            for part, members in rows.items()
        }
        cut = {part: _cut(rows[part], encoded[part], tokenizer, max_length) for part in _PARTS}
        for part, which in cut.items():
            if which:
                logging.warning(
                    "%s: %d of %d rows are longer than max_length=%d tokens; the rest is neither "
                    "trained on nor asked",
                    *(part, len(which), len(rows[part]), max_length),
                )
        return cls(
            rows=rows,
            tokenizer=tokenizer,
            encoded=encoded,
            cut=cut,
            texts=texts or {},
            max_length=max_length,
            new_tokens=new_tokens,
            batch_size=batch_size,
        )

    def with_neighbours(self, model: Decoder, file: epath.Path | None = None) -> "Questions":
        """More rows to keep: questions near those to forget, with the model's current answers.

        Three of five go into `train`, and one each into `validation` and `test`. Answers that
        repeat an answer to forget are dropped. Rows that are `far-fetched`, and answers of which
        the model is unsure, or just as sure for a stranger, are used for training only. Rows to
        keep that it did not know get the kind `unknown`, which has no limit. Answers are written to
        a file and read again next time.
        """
        forget = self.rows["forget"]
        others = [row for part in ("train", "holdout", "validation") for row in self.rows[part]]
        close_rows = neighbours(forget, others)
        # Names that occur only in answers to forget: a text with one of them reveals the answer.
        secret = {name for row in forget for name in names(Row(answer=row.answer))}
        secret -= {name for row in forget for name in names(Row(answer=row.question))}
        parts = {part: list(self.rows[part]) for part in _PARTS}

        def say() -> dict[str, str]:
            message = self._said(Deployed(model=model), close_rows)
            # A completion begins with a space; without it, its tokens would differ.
            return {row.question: text.rstrip() for row, text in zip(close_rows, message)}

        # A start that was refused may have left answers to other rows.
        key = storage.digest([row.question for row in close_rows], length=8)
        at = None if file is None else file.parent / f"{file.stem}-{key}.json"
        texts = say() if at is None else storage.kept(at, say)
        kept = [
            dataclasses.replace(row, answer=text)
            for row in close_rows
            if (text := texts[row.question]) and not secret & names(Row(answer=text))
            if max(rouge([r.answer for r in forget], [text] * len(forget)).f1) < _REPEATS
        ]
        likely = functools.partial(self._known, Deployed(model=model))
        # An invented answer is likely on average, but not at the tokens of the name.
        sure = likely(kept, every=True)
        # Or the name is likely for any subject, and follows from the form of the question.
        strangers = [row for row in kept if row.kind == "stranger"]
        twins = [twin(row, strangers) for row in kept]
        formal = iter(likely([row for row in twins if row], every=True))
        of_anyone = [row is not None and next(formal) for row in twins]
        sure = [is_sure and not anyone for is_sure, anyone in zip(sure, of_anyone)]
        for part in ("train", "validation", "test"):
            parts[part] = [
                row if is_sure else dataclasses.replace(row, kind="unknown")
                for row, is_sure in zip(parts[part], likely(parts[part]))
            ]
        for location, (row, is_sure) in enumerate(zip(kept, sure)):
            part = ("train", "validation", "train", "test", "train")[location % 5]
            if row.kind == "stranger":
                parts["stranger"].append(row)
            elif part == "train" or row.kind == "far-fetched":
                parts["train"].append(row)
            elif is_sure:
                parts[part].append(row)
        return Questions.of(
            parts,
            self.tokenizer,
            texts=self.texts,
            max_length=self.max_length,
            new_tokens=self.new_tokens,
            batch_size=self.batch_size,
        )

    def without_end(self, part: str, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Values of all tokens of a part's answers, without the end marks."""
        end = self.tokenizer.eos_id
        marked = [
            row.asks and i not in self.cut.get(part, ()) for i, row in enumerate(self.rows[part])
        ]
        return [
            row[:-1] if mark and end is not None and len(row) > 1 else row
            for row, mark in zip(values, marked)
        ]

    def scored_text(self, part: str) -> list[str]:
        """The answers of a part, up to the length that is asked."""
        rows, encoded = self.rows[part], self.encoded[part]
        return [
            self.tokenizer.decode(encoded[i][0][encoded[i][1]].tolist(), skip_special=True)
            if i in self.cut[part]
            else row.answer
            for i, row in enumerate(rows)
        ]

    def in_way(
        self, part: str, way: str, *, judging: bool = False
    ) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Encoded rows of a part, at most 40, asked in a way of `WAYS` or in several, `a + b`.

        Examples in context are rows to keep: of `train`, and for judging of `test`, neighbours
        first. The result is empty for a way that applies to no row, that the model's chat template
        rejects, or that does not fit.
        """
        key = part, way, judging
        if way == "asked":
            return self.encoded[part]
        if key not in self._ways:
            rows = [self.changed(row, way, judging=judging) for row in _evenly(self.rows[part])]
            try:
                self._ways[key] = [self.encode(row, way) for row in rows if row]
            except ValueError as error:
                logging.warning("%r is left out: %s", way, guard.one_line(error))
                self._ways[key] = []
        return self._ways[key]

    def changed(self, row: Row, way: str, *, judging: bool = False) -> Row | None:
        """A row, asked in this way."""
        others = self.rows["test" if judging else "train"]
        near = sorted(others, key=lambda other: other.kind != "near")
        return asked_so(row, way, near, judging=judging)

    @property
    def pad_id(self) -> int:
        ids = (self.tokenizer.pad_id, self.tokenizer.eos_id)
        return next((i for i in ids if i is not None), 0)

    def encode(self, row: Row, way: str = "asked") -> tuple[np.ndarray, np.ndarray]:
        """Encode any other row in the same way; a row asked in another way may be longer."""
        room = 1 if way == "asked" else 2 + SHOTS * ("in context" in way)
        return encode_row(row, self.tokenizer, max_length=room * self.max_length)

    def scores(self, model: Deployed, part: str, *, few: bool = False) -> Any:
        """`score_rows` of answers, or of at most 40, evenly spaced; a ValueError if not finite."""
        rows = self.encoded[part]
        return self.scored(model.nll, _evenly(rows) if few else rows)

    def mean_nll(
        self, model: Deployed, rows: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Nats a token of the answers of rows of `encode`."""
        scores = self.scored(model.nll, rows)
        return scores.totals() / scores.counts()

    def scored(self, nll: NllFn, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
        """Score rows, in batches no larger than the number of rows."""
        size = max(1, min(self.batch_size, len(rows)))
        return score_rows(nll, rows, batch_size=size, pad_id=self.pad_id)

    def probabilities(
        self, model: Deployed, part: str, way: str = "asked", *, judging: bool = False
    ) -> np.ndarray:
        """`exp(-mean nats)` of each answer, its end mark counted; see `in_way`."""
        rows = self.in_way(part, way, judging=judging)
        return answer_probabilities(self.scored(model.nll, rows)) if rows else np.zeros(0)

    def by_alpha(
        self, model: Deployed, rows: Sequence[tuple[np.ndarray, np.ndarray]], alphas: np.ndarray
    ) -> np.ndarray:
        """The probability of encoded answers for each weight of the assistant, `[alphas, rows]`."""
        items = []
        for start in range(0, len(rows), self.batch_size):
            batch = list(rows[start : start + self.batch_size])
            # Masked rows fill the batch.
            empty = (batch[-1][0], np.zeros_like(batch[-1][1]))
            # Few shapes are compiled.
            longest = -(-max(len(ids) for ids, _ in batch) // 32) * 32
            filled = Row.padded(
                batch + [empty] * (self.batch_size - len(batch)), longest, pad_id=self.pad_id
            )
            # The model never changes, so one pass of it is enough.
            key = id(model.model), id(rows), start
            if key not in self._states:
                self._states[key] = model.states(filled["tokens"], filled["mask"])
            existing = self._states[key]
            nll, _ = model.nll_by_alpha(filled["tokens"], filled["mask"], alphas, existing)
            where = filled["mask"][: len(batch)]
            sums = np.where(where, np.asarray(nll)[:, : len(batch)], 0.0).sum(-1)
            items.append(np.exp(-sums / where.sum(-1)))
        return np.concatenate(items, axis=1)

    def surprise(self, model: Deployed, part: str) -> list[np.ndarray]:
        """Surprise of each answer token, see `Deployed.surprise`."""
        return self.scored(model.surprise, self.encoded[part]).nll

    def sampled_recall(self, model: Deployed, part: str, samples: int) -> np.ndarray:
        """ROUGE-L recall of answers sampled at temperature 1, `[rows, samples]`."""
        rows = _evenly([row for row in self.rows[part] if row.asks])
        draws = [
            rouge([row.answer for row in rows], self._said(model, rows, seed)).rouge_l
            for seed in range(samples)
        ]
        return np.stack(draws, axis=1) if rows else np.zeros((0, samples))

    def perplexity(self, model: Deployed, part: str) -> float | None:
        """Perplexity of other text; None without any."""
        windows = self.texts.get(part)
        if windows is None or not len(windows):
            return None
        # Nothing predicts the first token.
        where = np.arange(windows.shape[1]) > 0
        rows = [(window, where) for window in windows]
        scores = self.scored(model.nll, rows)
        return float(np.exp(scores.totals().sum() / scores.counts().sum()))

    def answers(self, model: Deployed, part: str) -> list[str]:
        """Greedy answers to the questions of a part; plain texts are left out."""
        texts = self._said(model, [row for row in self.rows[part] if row.asks])
        return [text.strip() for text in texts]

    def _known(self, model: Deployed, rows: Sequence[Row], *, every: bool = False) -> list[bool]:
        """Mask of answers that the model knows, by their mean or by `every` token; not of texts."""
        scores = self.scored(model.nll, [self.encode(row) for row in rows]).nll if rows else ()
        worst = -math.log(KNOWN)
        return [
            not row.asks or bool((nats.max() if every else nats.mean()) <= worst)
            for row, nats in zip(rows, scores)
        ]

    def _said(self, model: Deployed, rows: Sequence[Row], seed: int | None = None) -> list[str]:
        """Answers to rows, with the most likely tokens, or sampled with a seed."""
        if not rows:
            return []
        prompts = [encode_question(row, self.tokenizer) for row in rows]
        # A step for few rows takes as long as one for many, because it reads all weights.
        full = -(-len(rows) // self.batch_size)
        rows_at_once = self.batch_size * min(_TOGETHER, full)
        return answers(
            model, self.tokenizer, prompts, self.new_tokens, rows=rows_at_once, seed=seed
        )

    def likeness(self, answers: Sequence[str], part: str) -> np.ndarray:
        """ROUGE-L F1 of generated answers against the rows'."""
        return rouge([row.answer for row in self.rows[part] if row.asks], answers).f1


def _evenly(rows: Sequence[Any]) -> Sequence[Any]:
    """Rows for costly or numerous attacks."""
    count = min(len(rows), Questions.costly)
    return [rows[i * len(rows) // count] for i in range(count)]


def _cut(
    rows: Sequence[Row],
    encoded: Sequence[tuple[np.ndarray, np.ndarray]],
    tokenizer: Tokenizer,
    max_length: int,
) -> frozenset[int]:
    full = [i for i, (ids, _) in enumerate(encoded) if len(ids) == max_length]
    # Distinguishes a cut row from one that just fits.
    longer = [encode_row(rows[i], tokenizer, max_length=max_length + 1)[0] for i in full]
    return frozenset(i for i, ids in zip(full, longer) if len(ids) > max_length)


def answer_probabilities(scores: Any) -> np.ndarray:
    """`exp(-mean nats)` of each row."""
    return np.asarray([np.exp(-nll.mean()) for nll in scores.nll])
