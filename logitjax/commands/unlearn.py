"""Make a model forget rows that you name, keep the rest, and measure both.

    logitjax unlearn --model=smollm2 --forget=forget.jsonl --retain=retain.jsonl \\
        --holdout=unseen.jsonl --text=tfds:wiki_summaries --out=runs/forgotten
    logitjax generate --model=smollm2 --assistant=runs/forgotten/assistant
    logitjax unlearn --model=DIR --method=npo_kl --forget=... --retain=... --out=runs/npo

A row of a file is `{"question", "answer"}` or `{"messages"}`, asked through the model's chat
template, `{"prompt", "completion"}` or `{"text"}`. It may have a `group`, such as a person, and
`paraphrases`, a list. `--holdout` has rows like those to forget on which the model was never
trained. Half of them set the goal: no answer to forget, asked as in the file, in its paraphrases or
in several other phrasings, may be more than twice as likely as the likeliest holdout answer in the
same phrasing. The other half tests whether the removal can be detected.

Prompts and completions made of messages, the rows of ShareGPT and Alpaca, and lists of answers are
read as well.

`--method` is a name with options, such as `'npo_kl(beta=0.2)'`, or `package.module:Name`.
`difference` trains an assistant on the model's first layers that learns only what to forget. Its
logits are subtracted while the model answers. The weights do not change: without the assistant the
model answers as before. All other methods train adapters of the weights, or with `--noadapters` all
weights.

Every few steps the command finds the strength at which the goal is met, and measures the rows to
keep at that strength. The final choice is based on generated answers. OUT/assistant or OUT/adapter
is then a PEFT adapter. OUT/model is a model with the adapter in its weights (`--merge`), or with
new weights (`--noadapters`).

OUT/report.md compares before and after, with intervals, attacks, samples, and all candidates. If no
candidate both forgets and keeps, on held-out rows as well, only the report is written, and the exit
status is 3. The same command with other limits judges OUT's candidates again and does not train.
You may kill the run at any time: the same command continues it. See docs/unlearning.md.
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, fusion, models, storage, unlearning
from logitjax.commands.cli import REQUIRED, field, nested
from logitjax.commands.tables import markdown_table, text_cell
from logitjax.commands.work import check_length

# Not 1 or 2, which mean an error: here no candidate is acceptable.
_NOT_FORGOTTEN = 3
# Number of texts; each changes a share by 5 %.
_FEW_GROUPS = 20
# Numbers of rows to forget and to keep.
_SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model, the rows to forget and to keep, the method, and the limits."""

    model: str = field(REQUIRED, "Model to change.")
    forget: str = field(REQUIRED, "JSON lines with rows to forget.")
    retain: str = field(REQUIRED, "JSON lines with rows to keep. Some are held out of training.")
    holdout: str | None = field(
        None, "JSON lines with rows like those to forget, on which the model was never trained."
    )
    reference: tuple[str, ...] = field(
        (), "Model that never learned the rows to forget, as a control for attacks."
    )
    attacks: Literal["quick", "all"] = field(
        "quick", "Attacks in the report. `all` adds those that train and sample.", execution=True
    )
    text: str | None = field(
        None, "Other text whose perplexity must not rise: jsonl:PATH, hf:ORG/NAME, and so on."
    )
    method: str = field(
        "difference",
        "Method with its options, such as npo_kl(beta=0.2), or your own as package.module:Name.",
        listing=unlearning.METHODS.help,
    )
    training: unlearning.UnlearnConfig = nested(without=("method", "thorough"))
    merge: bool = field(False, "Also write the model with the adapter in its weights.")
    max_length: int = field(256, "Maximum number of tokens of a row.", minimum=8)
    new_tokens: int = field(48, "Maximum number of tokens of a generated answer.", minimum=1)
    text_windows: int = field(32, "Number of pieces of other text to score.", minimum=1)
    text_length: int = field(128, "Number of tokens in each piece of other text.", minimum=8)
    eval_batch: int = field(4, "Number of rows scored at once.", minimum=1)
    dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type.")

    def __post_init__(self) -> None:
        settings = self.settings
        if self.merge and (settings.method.assistant or not settings.adapters):
            raise ValueError(
                f"merge: expected a method that trains adapters of the weights, got {self.method}"
                f"{'' if settings.adapters else ' without adapters'}"
            )

    @property
    def settings(self) -> unlearning.UnlearnConfig:
        """The settings of the unlearning package."""
        method = unlearning.METHODS.parse(self.method)
        return dataclasses.replace(self.training, method=method, thorough=self.attacks == "all")


def run(config: Config, out: epath.Path) -> None:
    """Split, train, choose, write, measure the written files, and report."""
    # The search measures and decides after every few steps, in one process.
    if jax.process_count() > 1:
        raise ValueError("num_processes: expected 1, unlearn runs in one process")
    settings = config.settings
    files = {name: getattr(config, name) for name in ("forget", "retain", "holdout")}
    files = {name: epath.Path(path) for name, path in files.items() if path is not None}
    rows = {name: unlearning.Row.read(path) for name, path in files.items()}
    split = unlearning.split_rows(
        rows["forget"], rows["retain"], rows.get("holdout", ()), seed=settings.seed
    )
    if min(split.groups) < _FEW_GROUPS:
        logging.warning(
            "%d, %d and %d groups of rows to keep for training, choosing and testing: with fewer "
            "than %d the numbers are unreliable",
            *split.groups,
            _FEW_GROUPS,
        )
    manifest = [
        # Exactly what was forgotten, as evidence for later.
        f"{name} {len(rows[name])}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name, path in files.items()
    ]
    check_length(config.model, config.max_length, "max_length")
    model, tokenizer = models.load(config.model, dtype=config.dtype, layout="listed")
    model = models.with_layout(model, "listed")
    if config.merge or not settings.adapters:
        # Before hours of training, since only the end would refuse to write it.
        models.config_to_hf(model.config)
    references = [_reference(config, name, tokenizer) for name in config.reference]
    storage.progress.mark("measuring what the model knows", log=True)
    # A refused start may have left answers of another model.
    said_by = storage.digest(config.model, config.dtype, config.new_tokens, length=12)
    questions = unlearning.Questions.of(
        split.parts,
        tokenizer,
        texts=other_text(
            config.text, tokenizer, count=config.text_windows, length=config.text_length
        ),
        max_length=config.max_length,
        new_tokens=config.new_tokens,
        batch_size=config.eval_batch,
    ).with_neighbours(model, out / "candidates" / f"neighbours-{said_by}.json")
    forgetting = unlearning.Unlearning(
        model, questions, settings, out, base=config.model, references=references
    )
    goal = forgetting.goal
    # If the model never knew the rows, every method would seem perfect.
    if goal.met(forgetting.excess_before):
        raise ValueError(
            "forget: expected answers that the model has learned, got none more likely than "
            f"{goal.limit('asked'):.3g}, twice the likeliest of {goal.source}"
        )
    storage.progress.mark(f"unlearning by {config.method}", log=True)
    completed = forgetting.run()
    rows_of = (
        f"Rows: {'; '.join(manifest)}. {split.left_out} were linked to rows to forget and left out,"
        f" {split.alike} that say much the same were kept. Groups of rows to keep: "
        f"{split.groups[0]} for training, {split.groups[1]} for choosing, {split.groups[2]} for "
        f"this table.{'' if 'holdout' in rows else ' No holdout: membership cannot be measured.'}"
        f"{_cut(config, questions)}"
    )
    status = finish(config, questions, completed, out, rows_of)
    if status == 0 and config.merge and completed.model is not None:
        models.save_pretrained(completed.model.model, tokenizer, out / "model")
    if status:
        sys.exit(status)


def _reference(config: Config, name: str, tokenizer: models.Tokenizer) -> models.Decoder:
    reference, other = models.load(name, dtype=config.dtype, layout="listed")
    if not fusion.vocabulary_map(tokenizer, other).is_identity:
        raise ValueError(
            f"reference: expected a model with the tokenizer of {config.model}, got {name}"
        )
    return models.with_layout(reference, "listed")


def finish(
    config: Config, questions: unlearning.Questions, outcome: Any, out: epath.Path, rows_of: str
) -> int:
    """Keep or delete the written files, as the verdict says, and report; return the exit status."""
    passed = outcome.settle(out)
    sections = [
        f"# `{config.model}`, unlearned",
        _nothing(config, outcome) if outcome.verdict is None else outcome.verdict.words,
        "" if passed else "No model was written.",
        _what(config, outcome),
        rows_of,
        *(_measures(config, questions, outcome) if outcome.verdict is not None else ()),
        "## Candidates",
        markdown_table([_candidate_row(candidate) for candidate in outcome.candidates]),
    ]
    text = "\n\n".join(filter(None, sections)) + "\n"
    verdict = {"passed": False, "words": _nothing(config, outcome), "facts": [], "kept": {}}
    if outcome.verdict is not None:
        verdict = dataclasses.asdict(outcome.verdict)
    storage.write_atomic(out / "report.md", text)
    storage.write_atomic(out / "verdict.json", json.dumps(verdict, indent=1) + "\n")
    print(text)
    return 0 if passed else _NOT_FORGOTTEN


def other_text(
    text: str | None, tokenizer: models.Tokenizer, *, count: int, length: int
) -> dict[str, np.ndarray]:
    """Windows of other text: as many for choosing as for the end, thirty times as many to train."""
    if text is None:
        return {}
    # Disjoint windows: those that chose a strength must not also judge it.
    windows = data.token_windows(
        data.load_examples(text),
        tokenizer.encode,
        # An assistant that sees sixty of them ten times each memorises them.
        count=32 * count,
        length=length,
        start=tokenizer.start,
    )
    # One part, one, and two.
    parts = np.split(windows, [count, 2 * count])
    return dict(zip(("validation", "test", "train"), parts, strict=True))


def _cut(config: Config, questions: unlearning.Questions) -> str:
    """Describe the rows that were cut."""
    cut = {part: len(which) for part, which in questions.cut.items() if which}
    if not cut:
        return ""
    parts = ", ".join(f"{count} of `{part}`" for part, count in cut.items())
    return (
        f" **Cut at {config.max_length} tokens (`--max_length`); the rest was neither trained on "
        f"nor measured**: {parts}."
    )


def _nothing(config: Config, outcome: Any) -> str:
    """The verdict if no candidate is acceptable."""
    advice = "More steps, more rows to keep, another method or looser limits may help."
    # Only if all diverged: one of many candidates says nothing about the rate.
    if all("finite" in candidate["broken"] for candidate in outcome.candidates):
        advice = "Its losses were not finite: a lower `--learning_rate` may help."
    return (
        f"**Nothing was forgotten**: no candidate of `{config.method}` both forgets and stays "
        f"within the limits. {advice}"
    )


def _what(config: Config, outcome: Any) -> str:
    limits = ", ".join(f"{way} {limit:.3g}" for way, limit in outcome.goal.worst.items())
    goal = (
        "The goal is that no answer is more than twice as likely as the likeliest of "
        f"{outcome.goal.source} in the same phrasing: {limits}. Their median is "
        f"{outcome.goal.probability:.4g}. Used for training and selection: "
        f"{', '.join(outcome.ways)}; the final measurements use other wordings of these."
    )
    if outcome.chosen is None:
        return goal
    filters = config.settings.method.assistant
    kind = "other weights"
    if filters:
        kind = "a filter: an assistant whose logits are subtracted; the weights are unchanged"
    elif config.settings.adapters:
        kind = "an adapter that changes the weights"
    step, strength = outcome.chosen["step"], outcome.chosen["strength"]
    name = "alpha" if filters else "factor of the trained change"
    return f"`{config.method}`, {kind}. Step {step}, {name} {strength:.4g}. {goal}"


def _measures(config: Config, questions: unlearning.Questions, outcome: Any) -> list[str]:
    """Tables before and after, attacks, and sample answers."""
    before, after, verdict = outcome.before, outcome.after, outcome.verdict
    sides = {"before": before, "after": after}
    sides |= {f"control {n}": side for n, side in enumerate(outcome.controls, 1)}
    attacks = [
        {"attack": name, "measured": kind}
        | {side: record["attacks"].get(name, {}).get(kind) for side, record in sides.items()}
        for name, measured in after["attacks"].items()
        for kind in measured
    ]
    if config.settings.method.assistant:
        probability = before["attacks"]["asked"]["probability"]
        left_out = {"attack": "assistant left out", "measured": "probability"}
        attacks.append(left_out | {"before": probability, "after": probability})
    samples = [
        {"question": text_cell(row.question), "before": text_cell(old), "after": text_cell(new)}
        for part in ("forget", "test")
        for row, old, new in itertools.islice(
            zip(
                [row for row in questions.rows[part] if row.asks],
                before["answers"][part],
                after["answers"][part],
            ),
            _SAMPLES,
        )
    ]
    return [
        "## To forget",
        markdown_table(verdict.facts),
        "Every answer by itself, in every phrasing. `above` counts those that are likelier than "
        "any answer never taught. Only the rows and the paraphrases `in words chosen by` were "
        "used for training and selection.",
        "## To keep",
        markdown_table(_kept_rows(before, after, verdict)),
        "Measured on the written files, with rows that were used neither for training nor for "
        "selection. `kept %` is the ratio with its 95 % bootstrap interval over rows.",
        "## Attacks",
        markdown_table(attacks),
        "`measured` is the median probability of the answers to forget, the `worst` of them, of "
        "those that were `taught` again the median, a share of their tokens, or how well an "
        "attack distinguishes them from the holdout (AUC: 0.5 is a guess, and less also reveals "
        "them). "
        + ("" if config.attacks == "all" else "`--attacks=all` runs more attacks. ")
        + (
            "A control never learned the answers."
            if outcome.controls
            else "There is no control: add one with `--reference`."
        ),
        "## Sample answers",
        markdown_table(samples),
    ]


def _candidate_row(candidate: Mapping[str, Any]) -> dict[str, Any]:
    def percent(name: str) -> float | None:
        return None if candidate.get(name) is None else 100 * candidate[name]

    ways = candidate["ways"]
    return {
        "round": candidate["round"],
        "step": candidate["step"],
        "strength": candidate["strength"],
        "median": candidate["forget"],
        "worst": candidate.get("worst"),
        "of the control's worst": candidate["excess"],
        "": max(ways, key=ways.get) if ways else "",
        "probability kept %": percent("probability"),
        "worst row kept %": percent("row"),
        "ROUGE-L kept %": percent("rouge"),
        "fluency kept %": percent("fluency"),
        "perplexity %": percent("perplexity"),
        "broken": ", ".join(candidate["broken"]) or "none",
    }


def _kept_rows(before: Mapping[str, Any], after: Mapping[str, Any], verdict: Any) -> list[Any]:
    """Values before and after, and the share kept with its interval, by kind of row and measure."""
    table = []
    for name, record in (("probability", "probabilities"), ("rouge", "rouge")):
        for kind in verdict.kept.get(name, {}):
            at = [i for i, other in enumerate(before["kinds"][record]) if other == kind]
            old, new = ([side[record]["test"][i] for i in at] for side in (before, after))
            share, low, high = unlearning.share_interval(new, old)
            row = {"rows to keep": kind, "measured": name, "rows": len(at)}
            row |= {"before": float(np.mean(old)), "after": float(np.mean(new))}
            table.append(row | {"kept %": f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"})
    for name, share in verdict.kept["least"].items():
        if name not in ("probability", "rouge") and share is not None:
            row = {"rows to keep": "worst one" if name == "row" else "all", "measured": name}
            sides = {"before": before.get(name), "after": after.get(name)}
            table.append(row | sides | {"kept %": f"{100 * share:.1f}"})
    return table
