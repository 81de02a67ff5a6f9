"""Published tasks with checkable answers: read, put to a model or a fused line-up, and graded.

Zero-shot, as *On giant's shoulders* scores them: GSM8K by the last number, TriviaQA by any of its
aliases, CNN/DM by ROUGE-2, MMLU and TruthfulQA by the likeliest of the given answers.
"""

import dataclasses
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from logitjax import decoding
from logitjax.models import Tokenizer

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question, and its right answer.

    Attributes:
        prompt: the question in words, as experts are tuned on it.
        response: the answer to learn from.
        right: texts that count as right; for choices, the right ones.
        choices: answers to choose among; empty if the answer is free text.
    """

    prompt: str
    response: str
    right: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Functions that read a task's rows and grade its answers.

    Attributes:
        read: turns one row of the published JSON into a question.
        grade: ``(answer, right) -> 0..1``, for answers in free text.
        max_new_tokens: length limit of free answers.
        stop_strings: strings that end a free answer.
    """

    read: Callable[[Mapping[str, Any]], Question]
    grade: Callable[[str, Sequence[str]], float] | None = None
    max_new_tokens: int = 0
    stop_strings: tuple[str, ...] = ()


def last_number(text: str) -> str | None:
    """The last number in a text without thousands separators and trailing zeros, or None."""
    result = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return f"{float(result[-1].replace(',', '')):g}" if result else None


def same_number(answer: str, right: Sequence[str]) -> float:
    number = last_number(answer)
    return float(number is not None and number in {last_number(text) for text in right})


def plain(text: str) -> str:
    """Lower case without punctuation, articles and double spaces, as SQuAD compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same_words(answer: str, right: Sequence[str]) -> float:
    return float(plain(answer) in {plain(text) for text in right})


def rouge_2(answer: str, right: Sequence[str]) -> float:
    """F-measure of bigrams, with stemming."""
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    return max(scorer.score(text, answer)["rouge2"].fmeasure for text in right)


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _gsm8k(row: Mapping[str, Any]) -> Question:
    solution, _, number = row["answer"].partition("####")
    # Experts learn to end with the number that is graded.
    response = f" {re.sub('<<.*?>>', '', solution).strip()}\nThe answer is {number.strip()}"
    return Question(prompt=_asked(row["question"]), response=response, right=(number.strip(),))


def _trivia_qa(row: Mapping[str, Any]) -> Question:
    answer = row["answer"]
    existing = dict.fromkeys([answer["value"], *answer.get("aliases", ())])
    return Question(
        prompt=_asked(row["question"]), response=f" {answer['value']}", right=tuple(existing)
    )


def _cnn_dm(row: Mapping[str, Any]) -> Question:
    prompt = f"Article: {row['article']}\nSummary:"
    return Question(prompt=prompt, response=f" {row['highlights']}", right=(row["highlights"],))


def _truthful_qa(row: Mapping[str, Any]) -> Question:
    targets = row["mc1_targets"]
    choices = tuple(f" {text}" for text in targets["choices"])
    right = tuple(c for c, label in zip(choices, targets["labels"], strict=True) if label)
    return Question(prompt=_asked(row["question"]), response=right[0], right=right, choices=choices)


def _mmlu(row: Mapping[str, Any]) -> Question:
    letters = string.ascii_uppercase[: len(row["choices"])]
    listed = "\n".join(f"{x}. {text}" for x, text in zip(letters, row["choices"], strict=True))
    right = f" {letters[row['answer']]}"
    return Question(
        prompt=f"{row['question'].strip()}\n{listed}\nAnswer:",
        response=right,
        right=(right,),
        choices=tuple(f" {x}" for x in letters),
    )


KINDS: dict[str, Kind] = {
    "gsm8k": Kind(
        read=_gsm8k, grade=same_number, max_new_tokens=320, stop_strings=("\n\n", "Question:")
    ),
    "trivia_qa": Kind(read=_trivia_qa, grade=same_words, max_new_tokens=32, stop_strings=("\n",)),
    "cnn_dm": Kind(read=_cnn_dm, grade=rouge_2, max_new_tokens=160, stop_strings=("\n\n",)),
    "truthful_qa": Kind(read=_truthful_qa),
    "mmlu": Kind(read=_mmlu),
}


@dataclasses.dataclass(frozen=True)
class Graded:
    """The questions of each split of one task."""

    name: str
    splits: Mapping[str, tuple[Question, ...]]

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def is_graded(spec: str) -> bool:
    return spec.partition(":")[0] in KINDS


def load_graded(spec: str) -> Graded:
    """``gsm8k:DIR``, ``trivia_qa:``, ``cnn_dm:``, ``truthful_qa:``, ``mmlu:``.

    ``DIR`` has ``train.jsonl`` and ``test.jsonl`` with rows as their authors publish them, and
    optionally ``validation.jsonl``; without it, the last tenth of the training rows is held out.

    Raises:
        ValueError: an unknown task, or a row that lacks a field, with file and line.
        FileNotFoundError: no such file.
    """
    name, _, location = spec.partition(":")
    if name not in KINDS or not location:
        raise ValueError(f"expected one of {', '.join(KINDS)} as NAME:DIRECTORY, got {spec!r}")
    root = epath.Path(location).expanduser()
    entries = {}
    for split in SPLITS:
        path = root / f"{split}.jsonl"
        if path.exists():
            entries[split] = _read(path, KINDS[name])
        elif split != "validation":
            raise FileNotFoundError(f"{path}: {name} needs train.jsonl and test.jsonl")
    if "validation" not in entries:
        stored = max(1, len(entries["train"]) // 10)
        entries["validation"] = entries["train"][-stored:]
        entries["train"] = entries["train"][:-stored]
    empty = [split for split in SPLITS if not entries[split]]
    if empty:
        raise ValueError(f"{root}: no questions to be the {empty[0]} split of {name}")
    return Graded(name, {split: entries[split] for split in SPLITS})


def _read(path: epath.Path, kind: Kind) -> tuple[Question, ...]:
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(kind.read(json.loads(line)))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    return tuple(questions)


def write_for_tuning(task: Graded, directory: epath.Path) -> str:
    """The questions as JSON lines of prompt and response, for :func:`load_examples`."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, questions in task.splits.items():
        rows = [json.dumps({"prompt": q.prompt, "response": q.response}) for q in questions]
        (directory / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return f"jsonl:{directory}"


def grade(
    model: Any,
    kind: Kind,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_prompt: int,
) -> list[float]:
    """The grade of every question, 0 to 1.

    Args:
        model: anything that decodes: a model or a `decoding.Ensemble`.
        questions: asked without examples.
        batch_size: questions in a batch; each choice counts as one.
        max_prompt: tokens of a prompt; longer ones lose their beginning.
    """
    if kind.grade is None:
        return _grade_choices(model, questions, tokenizer, batch_size, max_prompt)
    grades: list[float] = []
    for start in range(0, len(questions), batch_size):
        part = questions[start : start + batch_size]
        out = decoding.generate(
            model,
            [_prompt(tokenizer, q.prompt, max_prompt) for q in part],
            max_new_tokens=kind.max_new_tokens,
            stop_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            text=decoding.TextOptions(tokenizer=tokenizer, stop_strings=kind.stop_strings),
        )
        assert out.texts is not None
        grades += [kind.grade(text, q.right) for text, q in zip(out.texts, part, strict=True)]
    return grades


def _prompt(tokenizer: Tokenizer, text: str, most: int) -> list[int]:
    start = tokenizer.start
    return [*start, *tokenizer.encode(text)[len(start) - most :]]


def _grade_choices(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    batch_size: int,
    max_prompt: int,
) -> list[float]:
    rows = [(i, choice) for i, q in enumerate(questions) for choice in q.choices]
    totals = np.zeros(len(rows))
    prompts = [_prompt(tokenizer, q.prompt, max_prompt) for q in questions]
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        scores = decoding.score(
            model, [prompts[i] for i, _ in part], [tokenizer.encode(c) for _, c in part]
        )
        totals[start : start + len(part)] = scores.logprobs.sum(1)
    grades, start = [], 0
    for q in questions:
        best = int(totals[start : start + len(q.choices)].argmax())
        grades.append(float(q.choices[best] in q.right))
        start += len(q.choices)
    return grades
