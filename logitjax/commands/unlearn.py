"""Make a model forget what you name, keep what you name, and say what is left of both.

    logitjax unlearn --model=smollm2 --forget=forget.jsonl --retain=retain.jsonl \\
        --holdout=unseen.jsonl --text=tfds:wiki_summaries --out=runs/forgotten
    logitjax generate --model=smollm2 --assistant=runs/forgotten/assistant
    logitjax unlearn --model=DIR --method=npo_kl --forget=... --retain=... --out=runs/npo

A row of a file is `{"question", "answer"}` or `{"messages"}`, asked through the model's chat
template, `{"prompt", "completion"}` or `{"text"}`; it may have a `group`, such as a person, and
`paraphrases`, a list. `--holdout` has rows like those to forget that the model was never taught:
how likely it finds them is how likely forgotten answers are to become, no less and no more.

`difference` trains an assistant of the model's first layers that knows what to forget and nothing
else; its logits are taken away while the model answers. The model's weights stay as they are:
whoever leaves the assistant out has everything back. All other methods train adapters of the
weights. Every few steps the strength is sought at which the goal is met, and what is left of rows
to keep is measured there; the last word have answers that are generated. OUT/assistant or
OUT/adapter is a PEFT adapter, with `--merge` OUT/model a model with the adapter in its weights.
OUT/report.md has before and after with intervals, attacks, samples, and all that was tried. Where
nothing both forgets and keeps, nothing is written but that, and the status is 3. Kill it whenever
you like: the same command goes on. See docs/unlearning.md.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, models, storage, unlearning
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.tables import markdown_table

_NOTHING_FEASIBLE = 3
_DAMAGED = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is forgotten, how, and what has to be left."""

    model: str = field(REQUIRED, "Model that is to forget.")
    forget: str = field(REQUIRED, "JSON lines of what is to be forgotten.")
    retain: str = field(REQUIRED, "JSON lines of what is to be kept; some are held out.")
    holdout: str | None = field(
        None, "JSON lines like those to forget that the model was never taught."
    )
    text: str | None = field(
        None, "Other text whose perplexity is to stay: text:PATH, jsonl:PATH or tfds:NAME."
    )
    method: str = field(
        "difference",
        "An assistant that is taken away, or the loss that adapters are trained by.",
        choices=unlearning.METHODS,
    )
    layers: int = field(8, "Number of the model's first layers that an assistant has.", minimum=1)
    lora_rank: int = field(16, "Rank of the adapters.", minimum=1)
    steps: int = field(40, "Most optimiser steps.", minimum=1)
    check_every: int = field(10, "Number of steps between looks at what is left.", minimum=1)
    batch_size: int = field(8, "Number of rows to forget in a step, and to keep.", minimum=1)
    learning_rate: float = field(
        0.0, "Peak of the learning rate; 0 for 5e-3 of an assistant, 1e-3 of other adapters."
    )
    retain_weight: float | None = field(
        None, "Weight of the loss on rows to keep; else the method's, 1 for an assistant."
    )
    least_probability: float = field(0.98, "Least share of the probability of rows to keep.")
    least_rouge: float = field(0.98, "Least share of ROUGE-L F1 of answers generated for them.")
    least_fluency: float = field(0.98, "Least share of the word entropy of these answers.")
    most_perplexity: float = field(1.02, "Largest factor of the perplexity of other text.")
    merge: bool = field(False, "Write the model with the adapter in its weights too.")
    max_length: int = field(256, "Most tokens of a row.", minimum=8)
    new_tokens: int = field(48, "Most tokens of a generated answer.", minimum=1)
    text_windows: int = field(8, "Number of pieces of other text to score.", minimum=1)
    text_length: int = field(128, "Number of tokens in each.", minimum=8)
    eval_batch: int = field(4, "Number of rows that are scored at a time.", minimum=1)
    seed: int = field(0, "Seed of the split, of batches and of adapters.")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type.")

    def __post_init__(self) -> None:
        if self.merge and self.method == "difference":
            raise ValueError("merge: expected a method that trains weights, got difference")

    @property
    def recipe(self) -> unlearning.Recipe:
        """How the method is trained."""
        return unlearning.Recipe(
            method=self.method,
            layers=self.layers,
            rank=self.lora_rank,
            steps=self.steps,
            check_every=self.check_every,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            retain_weight=self.retain_weight,
            seed=self.seed,
        )

    @property
    def limits(self) -> unlearning.Limits:
        """What has to be left."""
        return unlearning.Limits(
            probability=self.least_probability,
            rouge=self.least_rouge,
            fluency=self.least_fluency,
            perplexity=self.most_perplexity,
        )


def run(config: Config, out: epath.Path) -> None:
    """Splits, trains, chooses, writes, measures what was written, reports."""
    if jax.process_count() > 1:
        raise ValueError("num_processes: expected 1, unlearn runs in one process")
    recipe, limits = config.recipe, config.limits
    files = {name: getattr(config, name) for name in ("forget", "retain", "holdout")}
    rows = {name: unlearning.read_rows(p) if p else () for name, p in files.items()}
    split = unlearning.split_rows(rows["forget"], rows["retain"], rows["holdout"], seed=config.seed)
    if min(split.groups) < 20:
        logging.warning(
            "%d, %d and %d groups of rows to keep for training, choosing and testing: under 20 the "
            "numbers say little",
            *split.groups,
        )
    manifest = {
        name: {"sha256": hashlib.sha256(epath.Path(p).read_bytes()).hexdigest(), "rows": len(r)}
        for (name, p), r in zip(files.items(), rows.values())
        if p
    }
    storage.write_atomic(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    model, tokenizer = models.load(config.model, dtype=config.dtype, layout="listed")
    model = models.with_layout(model, "listed")
    questions = unlearning.Questions.of(
        split,
        tokenizer,
        texts=_texts(config, tokenizer),
        max_length=config.max_length,
        new_tokens=config.new_tokens,
        batch_size=config.eval_batch,
    )
    found = unlearning.Unlearning(model, questions, recipe, limits, out)
    result = found.run()
    front = markdown_table([_candidate_row(c, result.goal) for c in result.front])
    if result.chosen is None:
        every = markdown_table([_candidate_row(c, result.goal) for c in result.candidates])
        text = _nothing(config, front, every, result.goal)
        storage.write_atomic(out / "report.md", text)
        print(text)
        sys.exit(_NOTHING_FEASIBLE)
    written = _write(config, model, tokenizer, found, result, out)
    scores = {
        "before": _kept(out, "before_test", lambda: _measured(model, questions)),
        "after": _kept(out, "after_test", lambda: _measured(written, questions)),
    }
    text = _report(config, split, result, scores, manifest, front)
    storage.write_atomic(out / "report.md", text)
    print(text)


def _texts(config: Config, tokenizer: models.Tokenizer) -> dict[str, np.ndarray]:
    """Windows of other text: a third each for training, choosing and the end."""
    if config.text is None:
        return {}
    windows = data.token_windows(
        data.load_examples(config.text),
        tokenizer.encode,
        count=4 * config.text_windows,
        length=config.text_length,
    )
    n = config.text_windows
    return {"validation": windows[:n], "test": windows[n : 2 * n], "train": windows[2 * n :]}


def _kept(out: epath.Path, name: str, make: Callable[[], Any]) -> Any:
    path = out / f"{name}.json"
    if not path.exists():
        storage.write_atomic(path, json.dumps(make(), indent=1) + "\n")
    return json.loads(path.read_text())


def _write(
    config: Config,
    model: models.Decoder,
    tokenizer: models.Tokenizer,
    found: unlearning.Unlearning,
    result: unlearning.Unlearned,
    out: epath.Path,
) -> unlearning.Deployed:
    """What can be used, and that as it is read again."""
    assert result.lora is not None
    assert result.chosen is not None
    strength = result.chosen["strength"]
    if found.recipe.filters:
        small = models.first_layers(model, config.layers).config
        folder = out / "assistant"
        unlearning.save_assistant(folder, result.lora, small, alpha=strength, base=config.model)
        return unlearning.load_assistant(folder, model)
    folder = out / "adapter"
    models.save_peft(
        unlearning.scaled(result.lora, strength), model.config, folder, base=config.model
    )
    merged = models.load_peft(folder, model.config).merged_into(model)
    if config.merge:
        models.save_pretrained(merged, tokenizer, out / "model")
    return unlearning.Deployed(model=merged)


def _measured(
    model: models.Decoder | unlearning.Deployed, questions: unlearning.Questions
) -> dict[str, Any]:
    """What a model says to the rows that nothing was chosen by, and under attack."""
    asked = model if isinstance(model, unlearning.Deployed) else unlearning.Deployed(model=model)
    parts = ("forget", "reworded_test", "holdout", "test")
    said = {part: questions.answers(asked, part) for part in ("forget", "test")}
    attacks = questions.attacks(asked)
    for bits in (8, 4):
        rounded = dataclasses.replace(asked, model=unlearning.round_weights(asked.model, bits))
        p = questions.probabilities(rounded, "forget")
        attacks[f"weights rounded to {bits} bits"] = float(np.median(p))
    return {
        "probabilities": {
            part: questions.probabilities(asked, part).tolist()
            for part in parts
            if len(questions.encoded[part])
        },
        "rouge": {part: questions.likeness(said[part], part).tolist() for part in said},
        "fluency": unlearning.fluency(said["test"]),
        "perplexity": questions.perplexity(asked, "test"),
        "answers": said,
        "attacks": attacks,
    }


def _candidate_row(candidate: Mapping[str, Any], goal: unlearning.Goal) -> dict[str, Any]:
    def percent(name: str) -> float | None:
        return None if candidate.get(name) is None else 100 * candidate[name]

    return {
        "step": candidate["step"],
        "strength": candidate.get("strength"),
        "forget probability": candidate["forget"],
        "of the goal": candidate["forget"] / goal.probability,
        "probability kept %": percent("probability"),
        "ROUGE-L kept %": percent("rouge"),
        "fluency kept %": percent("fluency"),
        "perplexity %": percent("perplexity"),
        "broken": ", ".join(candidate["broken"]) or "none",
    }


def _goal(goal: unlearning.Goal) -> str:
    return (
        f"The goal is {goal.probability:.4g}, the median probability of {goal.source}; their 5 % "
        f"point is {goal.floor:.4g}."
    )


def _nothing(config: Config, front: str, every: str, goal: unlearning.Goal) -> str:
    return (
        f"# Nothing was forgotten: `{config.model}`\n\n"
        f"No candidate of `{config.method}` both forgets and keeps what it has to; nothing was "
        f"written. {_goal(goal)} What no other candidate dominates:\n\n{front}\n\n"
        f"All candidates:\n\n{every}\n\n"
        "More steps, more rows to keep, another method or wider limits may help.\n"
    )


def _report(
    config: Config,
    split: unlearning.Split,
    result: unlearning.Unlearned,
    scores: Mapping[str, Any],
    manifest: Mapping[str, Any],
    front: str,
) -> str:
    before, after = scores["before"], scores["after"]
    filters = config.method == "difference"
    samples = [
        {"question": row.question, "before": old, "after": new}
        for part, rows in (("forget", split.forget), ("test", split.test))
        for row, old, new in zip(
            [r for r in rows if r.asks], before["answers"][part], after["answers"][part]
        )
    ][:16]
    attacks = [
        {"attack": name, "before": before["attacks"][name], "after": value}
        for name, value in after["attacks"].items()
    ]
    if filters:
        asked = before["attacks"]["asked"]
        attacks.append({"attack": "assistant left out", "before": asked, "after": asked})
    chosen = dict(result.chosen or {})
    kind = (
        "a filter: an assistant whose logits are taken away; the weights are as they were"
        if filters
        else "an adapter that changes the weights"
    )
    files = "; ".join(f"{n} {m['rows']} rows, sha256 {m['sha256']}" for n, m in manifest.items())
    strength = "alpha" if filters else "the adapter's factor"
    return (
        f"# `{config.model}`, unlearned\n\n"
        f"{_verdict(config, result, before, after)}\n\n"
        f"`{config.method}`, {kind}. Step {chosen['step']}, {strength} {chosen['strength']:.4g}. "
        f"{_goal(result.goal)}\n\n"
        f"Rows: {files}. {split.left_out} were linked to rows to forget and left out. Groups to "
        f"keep: {split.groups[0]} for training, {split.groups[1]} for choosing, {split.groups[2]} "
        f"for this table.{'' if split.holdout else ' No holdout: membership cannot be measured.'}"
        f"\n\n{markdown_table(_summary(before, after))}\n\n"
        "On rows that nothing was trained on or chosen by, and on what was written, read again. "
        "Kept: the ratio, with the 95 % interval of rows drawn again.\n\n"
        "## Attacks\n\n"
        f"{markdown_table(attacks)}\n\n"
        "Median probability of forgotten answers, or what the attack measures; AUC 0.5 is no "
        "better than a guess. Not run: relearning, sampling, other languages.\n\n"
        "## What it says\n\n"
        f"{markdown_table([{k: _cell(v) for k, v in row.items()} for row in samples])}\n\n"
        "## What was tried\n\n"
        f"{markdown_table([_candidate_row(c, result.goal) for c in result.candidates])}\n\n"
        f"Not dominated:\n\n{front}\n"
    )


def _summary(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = {
        "forget": "probability, to forget",
        "reworded_test": "probability, to forget, in other words",
        "holdout": "probability, never taught",
        "test": "probability, to keep",
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, old: Any, new: Any) -> None:
        if not len(old):
            return
        share, low, high = unlearning.share_interval(new, old)
        rows.append(
            {
                "": name,
                "before": float(np.mean(old)),
                "after": float(np.mean(new)),
                "kept %": f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                "rows": len(old),
            }
        )

    for part, name in names.items():
        if part in before["probabilities"]:
            add(name, before["probabilities"][part], after["probabilities"][part])
    for part, name in (("forget", "to forget"), ("test", "to keep")):
        add(f"ROUGE-L F1, {name}", before["rouge"][part], after["rouge"][part])
    for name in ("fluency", "perplexity"):
        if before[name]:
            share = f"{100 * after[name] / before[name]:.1f}"
            label = "fluency, to keep, bits" if name == "fluency" else "perplexity of other text"
            rows.append({"": label, "before": before[name], "after": after[name], "kept %": share})
    return rows


def _verdict(
    config: Config,
    result: unlearning.Unlearned,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
) -> str:
    """In words that are always the same."""
    ways = {
        name: value
        for name, value in after["attacks"].items()
        if value is not None and "AUC" not in name and "stren" not in name and "exact" not in name
    }
    open_to = [
        name for name, value in ways.items()
        if name != "asked" and value > 2 * result.goal.probability
    ]  # fmt: skip
    if config.method == "difference":
        open_to = ["leaving the assistant out", *open_to]
    if before["perplexity"] and after["perplexity"] > _DAMAGED * before["perplexity"]:
        return "**Model damaged**: the perplexity of other text doubled."
    if ways["asked"] > 2 * result.goal.probability:
        return "**Not forgotten**: answers are more likely than twice those never taught."
    if open_to:
        return f"**Suppressed, recoverable by** {', '.join(open_to)}."
    return "**Not distinguishable from never trained in these tests.**"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
