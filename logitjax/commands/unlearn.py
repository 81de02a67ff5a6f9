"""Make a model forget what you name, keep the rest, and measure what is left of both.

    logitjax unlearn --model=smollm2 --forget=forget.jsonl --retain=retain.jsonl \\
        --holdout=unseen.jsonl --text=tfds:wiki_summaries --out=runs/forgotten
    logitjax generate --model=smollm2 --assistant=runs/forgotten/assistant
    logitjax unlearn --model=DIR --method=npo_kl --forget=... --retain=... --out=runs/npo

A row of a file is `{"question", "answer"}` or `{"messages"}`, asked through the model's chat
template, `{"prompt", "completion"}` or `{"text"}`. It may have a `group`, such as a person, and
`paraphrases`, a list. `--holdout` has rows like those to forget that the model was never taught.
How likely the model finds them is the goal for forgotten answers, no less and no more.

`--method` is a name with options, as `'npo_kl(beta=0.2)'`, or `package.module:Name`. `difference`
trains an assistant of the model's first layers that knows what to forget and nothing else. Its
logits are subtracted while the model answers. The model's weights stay as they are: whoever leaves
the assistant out has everything back. All other methods train adapters of the weights, or with
`--noadapters` all weights.

Every few steps the command finds the strength at which the goal is met, and measures there what is
left of the rows to keep. Generated answers decide in the end. OUT/assistant or OUT/adapter is then
a PEFT adapter. OUT/model is a model with the adapter in its weights (`--merge`), or with new
weights (`--noadapters`).

OUT/report.md compares before and after, with intervals, attacks, samples, and all that was tried.
If nothing both forgets and keeps, only the report is written, and the status is 3. You may kill the
run at any time: the same command continues it. See docs/unlearning.md.
"""

import dataclasses
import hashlib
import itertools
import math
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

# Not 1 or 2, which mean an error: here the answer is that nothing will do.
_NOTHING_FEASIBLE = 3
_FEW_GROUPS = 20
# Perplexity of other text over that of before, above which a model is called damaged.
_DAMAGED = 2.0
# Of the rows to forget, and of those to keep.
_SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model, the rows to forget and to keep, the method, and the limits."""

    model: str = field(REQUIRED, "Model that is to forget.")
    forget: str = field(REQUIRED, "JSON lines to forget.")
    retain: str = field(REQUIRED, "JSON lines to keep. Some are held out of training.")
    holdout: str | None = field(
        None, "JSON lines like those to forget, which the model was never taught."
    )
    reference: str | None = field(
        None, "Model that never knew what is forgotten, as a control for attacks."
    )
    attacks: Literal["quick", "all"] = field(
        "quick",
        "Attacks of the report. `all` adds those that train, sample and take gradients.",
        execution=True,
    )
    text: str | None = field(
        None, "Other text, whose perplexity has to stay: text:PATH, jsonl:PATH or tfds:NAME."
    )
    method: str = field(
        "difference",
        "Method with its options, as npo_kl(beta=0.2), or one of your own as package.module:Name.",
        listing=unlearning.METHODS.help,
    )
    training: unlearning.UnlearnConfig = nested(without=("method", "thorough"))
    merge: bool = field(False, "Also write the model with the adapter in its weights.")
    max_length: int = field(256, "Largest number of tokens of a row.", minimum=8)
    new_tokens: int = field(48, "Largest number of tokens of a generated answer.", minimum=1)
    text_windows: int = field(8, "Number of pieces of other text to score.", minimum=1)
    text_length: int = field(128, "Number of tokens in each piece of other text.", minimum=8)
    eval_batch: int = field(4, "Number of rows that are scored at once.", minimum=1)
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
        """The settings that the room has."""
        method = unlearning.METHODS.parse(self.method)
        return dataclasses.replace(self.training, method=method, thorough=self.attacks == "all")


def run(config: Config, out: epath.Path) -> None:
    """Splits, trains, chooses, writes, measures what was written, reports."""
    # Its search measures and decides after every few steps, in one place.
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
            "than %d the numbers say little",
            *split.groups,
            _FEW_GROUPS,
        )
    manifest = [
        # What exactly was forgotten, for whoever has to show it later.
        f"{name} {len(rows[name])}, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name, path in files.items()
    ]
    model, tokenizer = models.load(config.model, dtype=config.dtype, layout="listed")
    model = models.with_layout(model, "listed")
    questions = unlearning.Questions.of(
        split.parts,
        tokenizer,
        texts=other_text(
            config.text, tokenizer, count=config.text_windows, length=config.text_length
        ),
        max_length=config.max_length,
        new_tokens=config.new_tokens,
        batch_size=config.eval_batch,
    )
    reference = None
    if config.reference is not None:
        reference, theirs = models.load(config.reference, dtype=config.dtype, layout="listed")
        if not fusion.vocabulary_map(tokenizer, theirs).is_identity:
            raise ValueError(
                f"reference: expected a model with the tokenizer of {config.model}, got "
                f"{config.reference}"
            )
        reference = models.with_layout(reference, "listed")
    storage.progress.mark("measuring what the model knows", log=True)
    forgetting = unlearning.Unlearning(
        model, questions, settings, out, base=config.model, reference=reference
    )
    goal = forgetting.goal
    # Whoever forgets what was never known would find every method perfect.
    if forgetting.known <= goal.probability:
        raise ValueError(
            f"forget: expected answers that the model was taught, got a median probability of "
            f"{forgetting.known:.3g}, no more than the {goal.probability:.3g} of {goal.source}"
        )
    storage.progress.mark(f"unlearning by {config.method}", log=True)
    found = forgetting.run()
    if found.model is not None and config.merge:
        models.save_pretrained(found.model.model, tokenizer, out / "model")
    sizes = len(questions.rows["forget"]), len(questions.rows["holdout"])
    sections = [
        f"# `{config.model}`, unlearned",
        _verdict(config, sizes, found),
        _what(config, found),
        f"Rows: {'; '.join(manifest)}. {split.left_out} were linked to rows to forget and left out."
        f" Groups of rows to keep: {split.groups[0]} for training, {split.groups[1]} for choosing, "
        f"{split.groups[2]} for this table."
        f"{'' if 'holdout' in rows else ' No holdout: membership cannot be measured.'}"
        f"{_cut(config, questions)}",
        *(_measures(config, questions, found) if found.model is not None else ()),
        "## What was tried",
        markdown_table([_candidate_row(c, found.goal.probability) for c in found.candidates]),
        "Candidates that no other dominates:",
        markdown_table([_candidate_row(c, found.goal.probability) for c in found.front]),
    ]
    text = "\n\n".join(sections) + "\n"
    storage.write_atomic(out / "report.md", text)
    print(text)
    if found.model is None:
        sys.exit(_NOTHING_FEASIBLE)


def other_text(
    text: str | None, tokenizer: models.Tokenizer, *, count: int, length: int
) -> dict[str, np.ndarray]:
    """Windows of other text: as many for choosing as for the end, and twice that for training."""
    if text is None:
        return {}
    # Disjoint windows: what chose a strength must not judge it as well.
    windows = data.token_windows(
        data.load_examples(text),
        tokenizer.encode,
        count=4 * count,
        length=length,
        start=tokenizer.start,
    )
    parts = np.split(windows, [count, 2 * count])
    return dict(zip(("validation", "test", "train"), parts, strict=True))


def _cut(config: Config, questions: unlearning.Questions) -> str:
    """What nobody looked at, in words."""
    cut = {part: len(which) for part, which in questions.cut.items() if which}
    if not cut:
        return ""
    parts = ", ".join(f"{count} of `{part}`" for part, count in cut.items())
    return (
        f" **Cut at {config.max_length} tokens (`--max_length`), and what is beyond neither "
        f"trained on nor measured**: {parts}."
    )


def _verdict(config: Config, sizes: tuple[int, int], found: Any) -> str:
    """In words that are always the same; of so many rows to forget, and of the holdout."""
    if found.model is None:
        advice = "More steps, more rows to keep, another method or wider limits may help."
        # Only then: one candidate of many that diverged says nothing about the rate.
        if all("finite" in candidate["broken"] for candidate in found.candidates):
            advice = "Its losses were not finite: a lower `--learning_rate` may help."
        return (
            f"**Nothing was forgotten**: no candidate of `{config.method}` both forgets and stays "
            f"within the limits, so no model was written. {advice}"
        )
    before, after, most = found.before, found.after, 2 * found.goal.probability
    # What an attack gets out of a model that never knew, it did not get from this one.
    control = found.control.get("attacks", {})
    ways = [
        name
        for name, measured in after["attacks"].items()
        if name != "asked"
        and measured.get("probability", 0.0)
        > max(most, 2 * control.get(name, {}).get("probability", 0.0))
    ]
    # Of shares only a control says what is none: more than half of what was there is much.
    ways += [
        name
        for name, measured in after["attacks"].items()
        if "share" in measured and name in control and not name.startswith("member")
        if 2 * measured["share"] > before["attacks"][name]["share"] + control[name]["share"]
        if measured["share"] > control[name]["share"]
    ]
    told = _told_apart(sizes, after["attacks"], control)
    if config.settings.method.assistant:
        ways = ["leaving the assistant out", *ways]
    if before["perplexity"] and after["perplexity"] > _DAMAGED * before["perplexity"]:
        return "**Model damaged**: the perplexity of other text doubled."
    if after["attacks"]["asked"]["probability"] > most:
        return "**Not forgotten**: answers are more than twice as likely as those never taught."
    if ways:
        also = f" Given away by {', '.join(told)}." if told else ""
        return f"**Suppressed, recoverable by** {', '.join(ways)}.{also}"
    if told:
        return (
            f"**Forgotten, but given away by** {', '.join(told)}: that these rows were taught can "
            "be told."
        )
    return "**Not distinguishable from never trained in these tests.**"


def _told_apart(
    sizes: tuple[int, int],
    attacks: Mapping[str, Mapping[str, float]],
    control: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Attacks that tell rows to forget from the holdout: beyond chance, and beyond a control.

    By the standard deviation of the AUC of equal distributions, sqrt((m + n + 1) / (12 m n)), as of
    the fewest rows that any of them asks.
    """
    m, n = (min(size, unlearning.Questions.costly) for size in sizes)
    if not n:
        return []
    chance = 1.96 * math.sqrt((m + n + 1) / (12 * m * n))
    return [
        name
        for name, measured in attacks.items()
        if abs(measured.get("auc", 0.5) - 0.5)
        > max(chance, abs(control.get(name, {}).get("auc", 0.5) - 0.5))
    ]


def _what(config: Config, found: Any) -> str:
    goal = (
        f"The goal is {found.goal.probability:.4g}, the median probability of {found.goal.source}; "
        f"their 5 % point is {found.goal.floor:.4g}."
    )
    if found.chosen is None:
        return goal
    filters = config.settings.method.assistant
    kind = "other weights"
    if filters:
        kind = "a filter: an assistant whose logits are subtracted; the weights are as they were"
    elif config.settings.adapters:
        kind = "an adapter that changes the weights"
    step, strength = found.chosen["step"], found.chosen["strength"]
    name = "alpha" if filters else "factor of what was trained"
    return f"`{config.method}`, {kind}. Step {step}, {name} {strength:.4g}. {goal}"


def _measures(config: Config, questions: unlearning.Questions, found: Any) -> list[str]:
    """Before and after, attacks, and what the model says."""
    before, after = found.before, found.after
    sides = {"before": before, "after": after}
    if found.control:
        sides["control"] = found.control
    attacks = [
        {"attack": name, "measured": kind}
        | {side: record["attacks"].get(name, {}).get(kind) for side, record in sides.items()}
        for name, measured in after["attacks"].items()
        for kind in measured
    ]
    if config.settings.method.assistant:
        asked = before["attacks"]["asked"]["probability"]
        left_out = {"attack": "assistant left out", "measured": "probability"}
        attacks.append(left_out | {"before": asked, "after": asked})
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
        markdown_table(_summary(before, after)),
        "Measured on the written result, read again. Nothing was trained on or chosen by these "
        "rows, except that the rows to forget were trained on. `kept %` is the ratio with its 95 % "
        "bootstrap interval over rows.",
        "## Attacks",
        markdown_table(attacks),
        "`measured` is the median probability of the answers to forget, a share of their tokens, "
        "or how well an attack tells them from the holdout (AUC: 0.5 is a guess, and less also "
        "gives them away). "
        + ("" if config.attacks == "all" else "`--attacks=all` runs more attacks. ")
        + (
            "The control never knew the answers."
            if found.control
            else "There is no control: name one by `--reference`."
        ),
        "## What it says",
        markdown_table(samples),
    ]


def _candidate_row(candidate: Mapping[str, Any], goal: float) -> dict[str, Any]:
    def percent(name: str) -> float | None:
        return None if candidate.get(name) is None else 100 * candidate[name]

    return {
        "step": candidate["step"],
        "strength": candidate["strength"],
        "forget probability": candidate["forget"],
        "of the goal": candidate["forget"] / goal,
        "probability kept %": percent("probability"),
        "ROUGE-L kept %": percent("rouge"),
        "fluency kept %": percent("fluency"),
        "perplexity %": percent("perplexity"),
        "broken": ", ".join(candidate["broken"]) or "none",
    }


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
        # Of nothing no share is left, and an interval of it would divide by zero.
        if not np.mean(old):
            rows.append({"": name, "before": 0.0, "after": float(np.mean(new)), "rows": len(old)})
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
            label = "fluency, to keep, bits" if name == "fluency" else "perplexity of other text"
            row = {"": label, "before": before[name], "after": after[name]}
            # No answer may be left that is long enough to have any.
            if after[name] is not None:
                row["kept %"] = f"{100 * after[name] / before[name]:.1f}"
            rows.append(row)
    return rows
