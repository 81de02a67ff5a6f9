"""Compute a model's perplexity on texts and its accuracy on multiple-choice questions.

    logitjax score --data=jsonl:texts.jsonl --out=runs/score
    logitjax score --model=DIR --choices=questions.jsonl --out=runs/choices
    logitjax score --model=DIR --expert=runs/expert --base=runs/base --fusion=dynamic \\
        --data=text:book.txt --out=runs/fused

`--data` is text, or rows of `{"text"}` or `{"prompt", "response"}`, of which only responses are
scored. Scores are nats, perplexity per token, and bits per UTF-8 byte, which compares models with
different tokenizers. A text longer than `--max_length` is read in windows that overlap by half,
each with the BOS token that the model expects. A prompt that does not fit loses its beginning;
`scores.jsonl` marks these rows, and the report counts them.

A space at the end of a prompt is scored with the answer, as in lm-evaluation-harness, because most
tokens include their leading space.

`--choices` is a file of rows of `{"prompt", "choices", "answer"}`, with answers counted from 0. The
scores are the log-likelihood of each choice, and how often the right one is the most likely, in
total and per byte. `logitjax.integrations.lm_eval` runs tasks of lm-evaluation-harness.

It writes OUT/scores.jsonl (a line for each row), OUT/results.json and OUT/report.md.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, decoding, evaluation, fusion, models, processes, storage
from logitjax.commands.cli import field, nested
from logitjax.commands.line_up import LineUp
from logitjax.commands.strategies import strategy
from logitjax.commands.tables import markdown_table

# A killed run loses fewer rows than this.
_PART = 256
_NOTHING = evaluation.PromptTemplate(before="", after="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models, how they are fused, and the texts or questions."""

    line_up: LineUp = nested(LineUp(), without=["assistant", "alpha"])
    data: str | None = field(
        None, "Texts, or prompts and responses: jsonl:PATH, hf:ORG/NAME, and so on."
    )
    split: str = field("train", "Split of the data, which may be sliced: train[:100].")
    choices: str | None = field(None, "File of questions with choices, as JSON lines.")
    max_length: int = field(1024, "Maximum number of tokens to read at once.", minimum=2)
    batch_size: int = field(8, "Number of rows read at once.", minimum=1)


# Token ids `[n]` and which of them are scored.
Row = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Item:
    """One line of the result: its texts, each with its rows to read and its bytes.

    A long text has several rows, a question one text for each choice.
    """

    record: dict[str, Any]
    groups: Sequence[Sequence[Row]]
    sizes: Sequence[int]


def run(config: Config, out: epath.Path) -> None:
    """Score the rows and write the results; with several processes, only the first does."""
    if not (config.data or config.choices):
        raise ValueError("data, choices: expected at least one of them")
    processes.run_on_first("score", lambda: _run(config, out))


def _run(config: Config, out: epath.Path) -> None:
    _check_fusion(strategy(config.line_up.fusion))
    # Before any weights are read, because it reports errors in the data.
    storage.progress.mark("reading what is scored", log=True)
    sources = _sources(config)
    ensemble, tokenizer, _ = config.line_up.load()
    weights = storage.digest(jax.tree.leaves(ensemble.params), sample=64)
    nll_fn = decoding.nll_from_model(ensemble)
    lines, results = [], {}
    for name, fingerprint, items in sources:
        storage.progress.mark(f"scoring {len(items)} {name}", log=True)
        # Scores of data or models that have changed since are not part of this run.
        key = storage.digest(fingerprint, weights, tokenizer.fingerprint, length=12)
        parts = out / "parts" / f"{name}-{key}"
        records = _records(nll_fn, items, config.batch_size, parts)
        lines += records
        results[name] = _text_results(records) if name == "texts" else _choice_results(records)
    storage.write_atomic(out / "scores.jsonl", "".join(json.dumps(one) + "\n" for one in lines))
    storage.write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    table = markdown_table([{"what": name} | row for name, row in results.items()])
    shown = f"{table}{_cut(config, results)}\n"
    what = f"`{config.line_up.model}`: {config.data or ''} {config.choices or ''}"
    storage.write_atomic(out / "report.md", f"# Scores\n\n{what}\n\n{shown}")
    print(shown, end="")


def _check_fusion(fuse: Any) -> None:
    """Refuse a strategy that excludes tokens: a text with such a token would be impossible."""
    for kind, name, keeps_all in (
        (fusion.DExperts, "top_p", 1),
        (fusion.ContrastiveDecoding, "plausibility", 0),
        (fusion.LogitDifference, "outside", "keep"),
    ):
        if isinstance(fuse, kind) and getattr(fuse, name) != keeps_all:
            raise ValueError(
                f"fusion: expected {name}={keeps_all}, which excludes no token of a text, got "
                f"{name}={getattr(fuse, name)}"
            )


def _sources(config: Config) -> list[tuple[str, str, list[_Item]]]:
    """The kind, fingerprint and rows of each source, no row longer than the models can read."""
    tokenizer = models.load_tokenizer(config.line_up.model)
    # Fused models read only as much as the shortest of their contexts.
    most = min(config.max_length, config.line_up.longest)
    sources: list[tuple[str, str, list[_Item]]] = []
    if config.data:
        examples = data.load_examples(config.data, split=config.split)
        items = [_text_item(tokenizer, dict(row), most) for row in examples]
        sources.append(("texts", examples.fingerprint, items))
    if config.choices:
        questions = _questions(config.choices)
        items = [_choice_item(tokenizer, row, most) for row in questions]
        sources.append(("choices", storage.digest(questions), items))
    return sources


def _cut(config: Config, results: dict[str, Any]) -> str:
    """A sentence about prompts that were cut, if any."""
    cut = {name: row["cut prompts"] for name, row in results.items() if row["cut prompts"]}
    if not cut:
        return ""
    rows = ", ".join(f"{count} of the {name}" for name, count in cut.items())
    return (
        "\n\n**Prompts whose beginning was cut to fit "
        f"`--max_length={config.max_length}` or the models' context**: {rows}."
    )


def _records(
    nll_fn: Callable[..., Any], items: Sequence[_Item], batch_size: int, parts: epath.Path
) -> list[dict[str, Any]]:
    """A record for each item; parts that an earlier run finished are read."""
    records: list[dict[str, Any]] = []
    for start in range(0, len(items), _PART):
        picked = items[start : start + _PART]
        make = functools.partial(_scored, nll_fn, picked, batch_size)
        records += storage.kept(parts / f"{start:08d}.json", make)
        logging.info("%s: %d of %d rows", parts.name, start + len(picked), len(items))
    return records


def _scored(
    nll_fn: Callable[..., Any], items: Sequence[_Item], batch_size: int
) -> list[dict[str, Any]]:
    rows = [row for item in items for group in item.groups for row in group]
    ids = [item.record["id"] for item in items for group in item.groups for _ in group]
    result = evaluation.score_rows(
        nll_fn, rows, batch_size=batch_size, describe=lambda row: str(ids[row])
    )
    nats, tokens = iter(result.totals()), iter(result.counts())

    def totals(values: Iterator[Any], item: _Item) -> list[Any]:
        return [sum(next(values).item() for _ in group) for group in item.groups]

    records = []
    for item in items:
        values: dict[str, Any] = {
            "nats": totals(nats, item),
            "tokens": totals(tokens, item),
            "bytes": list(item.sizes),
        }
        if "answer" in item.record:
            # A long choice has more tokens that lower its likelihood: per byte is fair.
            scaled = [nat / max(1, size) for nat, size in zip(values["nats"], item.sizes)]
            values["chosen"] = int(np.argmin(values["nats"]))
            values["chosen_by_byte"] = int(np.argmin(scaled))
        else:
            values = {name: value[0] for name, value in values.items()}
        records.append(item.record | values)
    return records


def _text_item(tokenizer: models.Tokenizer, row: dict[str, Any], most: int) -> _Item:
    record = {"id": row["id"]}
    if "messages" in row:
        raise ValueError(
            f"data: expected text, or prompt and response, got messages in {row['id']}"
        )
    if "prompt" in row:
        answer = _answer_row(tokenizer, row["prompt"], row["response"])
        record["cut"] = len(answer[0]) > most
        fitted = _fitted(answer, most, tokenizer.start, row["id"])
        return _Item(record, [[fitted]], [len(row["response"].encode())])
    ids = np.asarray([_first_id(tokenizer), *tokenizer.encode(row["text"])], np.int32)
    return _Item(record, [_windows(ids, most, tokenizer.start)], [len(row["text"].encode())])


def _first_id(tokenizer: models.Tokenizer) -> int:
    """The BOS token, or else the EOS token, that precedes a text without a prompt."""
    for first in (tokenizer.bos_id, tokenizer.eos_id):
        if first is not None:
            return first
    raise ValueError(
        "model: its tokenizer has no BOS or EOS token, so nothing predicts a text's first token"
    )


def _windows(ids: np.ndarray, most: int, mark: Sequence[int] = ()) -> list[Row]:
    """Rows of at most `most` tokens, overlapping by half; all but the first token scored once.

    `mark` is the token that a model expects at the start; the first row already has it.
    """
    rows: list[Row] = []
    scored = 1
    while scored < len(ids):
        before = np.asarray(mark if rows else (), np.int32)
        room = most - len(before)
        # Half of a later window is context that was scored before, so every token has a context.
        start = scored - room // 2 if rows else 0
        window = np.concatenate([before, ids[start : start + room]])
        rows.append((window, np.arange(len(window)) >= len(before) + scored - start))
        scored = start + len(window) - len(before)
    return rows


def _answer_row(tokenizer: models.Tokenizer, prompt: str, answer: str) -> Row:
    """A prompt and its answer, of which the answer is scored."""
    # Tokenized separately, "is " and "Paris" would be tokens that no text contains.
    begins = prompt.rstrip(" ")
    prompt, answer = begins, prompt[len(begins) :] + answer
    if not prompt:
        ids = np.asarray([_first_id(tokenizer), *tokenizer.encode(answer)], np.int32)
        return ids, np.arange(len(ids)) > 0
    return _NOTHING.encode_answer(tokenizer, prompt, answer, max_length=1 << 30, end=False)


def _fitted(row: Row, most: int, mark: Sequence[int], name: str) -> Row:
    """A row whose prompt loses its beginning if it is too long; the mark at the start is kept."""
    ids, where = row
    # At least one token must precede the answer.
    if where.sum() >= most:
        raise ValueError(f"{name}: {where.sum()} tokens of an answer, max_length is {most}")
    if len(ids) <= most:
        return row
    # The mark stays: models that expect one read text badly without it.
    kept = len(mark) if ids[: len(mark)].tolist() == list(mark) else 0
    picked = np.r_[:kept, len(ids) - most + kept : len(ids)]
    return ids[picked], where[picked]


def _questions(path: str) -> list[dict[str, Any]]:
    rows = []
    # Not `splitlines`: JSON may contain U+2028 and other line ends unescaped.
    for number, line in enumerate(epath.Path(path).read_text().split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}:{number}: not JSON") from None
        choices = row.get("choices") if isinstance(row, dict) else None
        if (
            not isinstance(choices, list)
            or not all(isinstance(one, str) and one for one in choices)
            or not isinstance(row.get("prompt"), str)
            or not isinstance(row.get("answer"), int)
            or not 0 <= row["answer"] < len(choices)
        ):
            raise ValueError(
                f"{path}:{number}: expected a prompt, a list of choices and the right one's number"
            )
        rows.append({"id": f"{epath.Path(path).name}:{number}"} | row)
    if not rows:
        raise ValueError(f"{path}: expected at least one question, got none")
    return rows


def _choice_item(tokenizer: models.Tokenizer, row: dict[str, Any], most: int) -> _Item:
    rows = [_answer_row(tokenizer, row["prompt"], choice) for choice in row["choices"]]
    groups = [[_fitted(one, most, tokenizer.start, row["id"])] for one in rows]
    cut = any(len(ids) > most for ids, _ in rows)
    record = {"id": row["id"], "answer": row["answer"], "cut": cut}
    return _Item(record, groups, [len(choice.encode()) for choice in row["choices"]])


def _count_cut(records: Sequence[dict[str, Any]]) -> int:
    return sum(one.get("cut", False) for one in records)


def _text_results(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    nats, tokens, size = (sum(one[name] for one in records) for name in ("nats", "tokens", "bytes"))
    return {
        "rows": len(records),
        "cut prompts": _count_cut(records),
        "tokens": tokens,
        "bytes": size,
        "nats a token": nats / max(1, tokens),
        "perplexity": math.exp(nats / max(1, tokens)),
        "bits a byte": nats / math.log(2) / max(1, size),
    }


def _choice_results(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def share(name: str) -> float:
        return sum(one[name] == one["answer"] for one in records) / len(records)

    return {
        "rows": len(records),
        "cut prompts": _count_cut(records),
        "right": share("chosen"),
        "right by the byte": share("chosen_by_byte"),
        "chance": sum(1 / len(one["nats"]) for one in records) / len(records),
    }
