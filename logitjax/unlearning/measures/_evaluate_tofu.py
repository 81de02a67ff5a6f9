"""The TOFU benchmark on a model: scores, generated answers, logs."""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from logitjax import processes
from logitjax.data import TokenizerLike
from logitjax.evaluation import NllFn, PromptTemplate, rouge, score_rows
from logitjax.storage import Manifest, digest, read_json
from logitjax.unlearning.measures._membership import exact_memorisation, extraction_strength
from logitjax.unlearning.measures._tofu import Item
from logitjax.unlearning.measures._tofu_logs import AGGREGATED, log_file, plain
from logitjax.unlearning.measures._tofu_metrics import Evaluation, metrics_from_logs
from logitjax.unlearning.measures._truth_ratio import Form, normalised_probability, truth_ratio

# (prompts, most new tokens) -> what follows each prompt, without the prompt.
GenerateFn = Callable[[list[np.ndarray], int], Sequence[Any]]

# Whoever changes what a log holds changes this, so that older ones are refused.
_VERSION = 1
_KIND = "TOFU evaluation"
_LOG_SECONDS = 30.0
# Only their losses are asked for.
_LOSS_ONLY = ("holdout",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How TOFU's questions are asked and what is made of the answers.

    Attributes:
        batch_size: rows of tokens at a time; lengths are padded to multiples of 32.
        generate_batch_size: prompts at a time, those of like lengths together; default
            ``batch_size``. The last batch is filled up, so that all are of one size.
        max_length: largest length of prompt and answer; TOFU's is 200, OpenUnlearning's 512.
        max_new_tokens: largest number of tokens of generated answers.
        eos_id: the end mark, if it is not the tokenizer's.
        limit: take only the first items of each set; TOFU's code takes 300.
        form: form of the truth ratio in the metrics. Logs hold the geometric one, as TOFU's.
        confidence: confidence of the interval of the forget quality.
        seed: seed of its resampling.
    """

    batch_size: int = 16
    generate_batch_size: int | None = None
    max_length: int = 200
    max_new_tokens: int = 200
    eos_id: int | None = None
    limit: int | None = None
    form: Form = "geometric"
    confidence: float = 0.95
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asking:
    """One model, and how its questions are asked."""

    nll_fn: NllFn
    generate_fn: GenerateFn | None
    tokenizer: TokenizerLike
    template: PromptTemplate
    options: Options

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.options.eos_id is None else self.options.eos_id

    def setting(self) -> dict[str, Any]:
        """Everything but the model and the items that decides what a log says."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "template": dataclasses.asdict(self.template),
            "max_length": self.options.max_length,
            "max_new_tokens": self.options.max_new_tokens,
            "eos_id": self.eos_id,
            "generates": self.generate_fn is not None,
        }


def evaluate(
    nll_fn: NllFn,
    generate_fn: GenerateFn | None,
    tokenizer: TokenizerLike,
    sets: Mapping[str, Sequence[Item]],
    *,
    template: PromptTemplate,
    options: Options | None = None,
    reference_logs: Any = None,
    workdir: str | os.PathLike[str] | None = None,
    model_fingerprint: str | None = None,
) -> Evaluation:
    """Runs the TOFU benchmark on a model, whatever that is.

    Of every item: losses of the answer, of its paraphrase and of the wrong answers, and the answer
    that the model gives, with its ROUGE recall. With a ``workdir`` each set's log is written once
    it is done, as TOFU's own code would (``eval_log.json``, ``eval_log_forget.json``,
    ``eval_real_author_wo_options.json``, ``eval_real_world_wo_options.json``, and all in one
    ``eval_log_aggregated.json``), and read the next time. A workdir is of one model, tokenizer and
    setting, and is refused for any other.

    Args:
        nll_fn: ``(tokens, targets)``, int32 and bool ``[batch, time]``, to the negative
            log-likelihood of every target, float32 ``[batch, time]``. With its ``with_greedy``
            extraction strength and exact memorisation are reported too, over the answers' tokens
            without the end mark.
        generate_fn: ``(prompts, max_new_tokens)``, a list of int32 arrays and a number, to what
            follows each prompt, greedily. None leaves out ROUGE and with it the model utility.
        tokenizer: tokenizer of the model.
        sets: by name. ``retain``, ``real_authors``, ``world_facts`` make the model utility,
            ``forget`` the forget quality; ``holdout`` (only its losses are taken) allows a
            membership attack. Others are reported as the first are; with names that begin in
            ``forget``, as that.
        template: what stands around the question; the one the model was trained with.
        options: `Options`; the defaults are TOFU's.
        reference_logs: logs of the model retrained without the forget set: its `Evaluation`, or
            what `metrics_from_logs` takes.
        workdir: for the logs; one model each. Only process 0 writes; all must be able to read.
        model_fingerprint: changes with the model, such as `logitjax.storage.digest` of its
            parameters or the checkpoint's name and step. Needed with ``workdir``: functions do not
            tell which model they ask.

    Raises:
        ValueError: items without wrong answers, losses that are not finite (names set and item), a
            ``workdir`` without a ``model_fingerprint``, one with the logs of another model,
            tokenizer, setting or set (names what differs), or one with files that this did not
            write.

    References:
        Maini et al., 2024 (arXiv 2401.06121), section 2.3; logs as of its code. Departures: the
        whole forget set unless ``limit`` says otherwise; prompts are encoded the same way for
        scoring and generating; ROUGE holds the generated text against the item's answer, not
        against a decoded one.
    """
    options = Options() if options is None else options
    sets = {name: tuple(items)[: options.limit] for name, items in sets.items()}
    _check_sets(sets)
    asking = _Asking(
        nll_fn=nll_fn,
        generate_fn=generate_fn,
        tokenizer=tokenizer,
        template=template,
        options=options,
    )
    root = None
    if workdir is not None:
        root = epath.Path(workdir).expanduser()
        _claim(root, sets, asking, model_fingerprint)
    logs: dict[str, dict[str, Any]] = {}
    for name, items in sets.items():
        log = None if root is None else _finished(root / log_file(name), items)
        if log is None:
            log = _log_set(name, items, asking)
            log["items"] = digest(items)
            if root is not None:
                processes.write_json(root / log_file(name), log)
        logs[name] = log
    if root is not None:
        processes.write_json(root / AGGREGATED, {log_file(name): log for name, log in logs.items()})
    return metrics_from_logs(
        logs,
        reference_logs=reference_logs,
        form=options.form,
        vocab_size=tokenizer.vocab_size,
        confidence=options.confidence,
        seed=options.seed,
    )


def _claim(
    root: epath.Path,
    sets: Mapping[str, Sequence[Item]],
    asking: _Asking,
    model_fingerprint: str | None,
) -> None:
    """The workdir is this model's from now on, or was before."""
    if model_fingerprint is None:
        raise ValueError(
            "model_fingerprint: expected with a workdir, whose logs would otherwise answer for "
            "another model; got None"
        )
    made_from = {"version": _VERSION, "model": model_fingerprint, **asking.setting()}
    foreign = [root / log_file(name) for name in sets if (root / log_file(name)).exists()]
    # Process 0 may have begun since: its manifest is there before its first log.
    if Manifest(root, _KIND).exists():
        Manifest(root, _KIND).check(made_from)
    elif foreign:
        raise ValueError(
            f"{foreign[0]}: not a log of tofu.evaluate (no manifest beside it); choose another "
            "workdir"
        )
    elif jax.process_index() == 0:
        Manifest(root, _KIND).write(made_from)


def _check_sets(sets: Mapping[str, Sequence[Item]]) -> None:
    if not sets:
        raise ValueError("sets: none given")
    for name, items in sets.items():
        if not items:
            raise ValueError(f"sets: {name!r} has no items")
        keys = [item.index for item in items]
        if len(set(keys)) != len(keys):
            raise ValueError(f"sets: {name!r} has items of the same index, which logs are keyed by")
        for item in items:
            if name not in _LOSS_ONLY and not item.perturbed_answers:
                raise ValueError(
                    f"sets: item {item.index} of {name!r} has no wrong answers; take the "
                    "_perturbed split"
                )


def _finished(path: epath.Path, items: Sequence[Item]) -> dict[str, Any] | None:
    """A set's log, if it is there already."""
    if not path.exists():
        return None
    log = read_json(path)
    if not isinstance(log, dict) or log.get("items") != digest(items):
        raise ValueError(f"{path} does not fit: it is of other items; choose another workdir")
    logging.info("%s: finished before", path)
    return log


def _progress(label: str, total: int) -> tqdm:
    """A bar on a terminal of process 0; in its log a line now and then, of what takes long."""
    how: dict[str, Any] = dict(desc=label, unit="row", leave=False, disable=jax.process_index() > 0)
    if not sys.stderr.isatty():
        how |= {"mininterval": _LOG_SECONDS, "delay": _LOG_SECONDS}
    return tqdm(total=total, **how)


def _log_set(name: str, items: Sequence[Item], asking: _Asking) -> dict[str, Any]:
    """One set's log, with TOFU's fields in TOFU's order."""
    keys = [str(item.index) for item in items]
    log: dict[str, Any] = {}

    def put(field: str, values: Any) -> None:
        log[field] = {key: plain(value) for key, value in zip(keys, values, strict=True)}

    scored = _score_answers(name, items, asking)
    own, paraphrase, wrong = scored.own, scored.paraphrase, scored.wrong
    total, count = scored.total, scored.count
    average = total / count
    put("avg_gt_loss", average[own])
    put("gt_loss", total[own])
    put("num_token_gt", count[own])
    if scored.greedy is not None:
        put("extraction_strength", [extraction_strength(row) for row in scored.greedy])
        put("exact_memorization", [exact_memorisation(row) for row in scored.greedy])
    if name in _LOSS_ONLY:
        return log
    if asking.generate_fn is not None:
        said = _generate(name, items, asking)
        answers = [item.answer for item in items]
        prompts = [asking.template.render(item.question) for item in items]
        put("generated_text", [list(row) for row in zip(prompts, said, answers, strict=True)])
        recall = rouge(answers, said)
        put("rouge1_recall", recall.rouge_1)
        put("rougeL_recall", recall.rouge_l)
    put("average_perturb_loss", [average[row] for row in wrong])
    put("avg_paraphrased_loss", average[paraphrase])
    put("truth_ratio", truth_ratio(average[paraphrase], [average[row] for row in wrong]))
    put("paraphrased_loss", total[paraphrase])
    put("perturb_loss", [total[row] for row in wrong])
    put("num_token_paraphrased", count[paraphrase])
    put("num_token_perturb", [count[row] for row in wrong])
    if name in ("real_authors", "world_facts"):
        likely = normalised_probability(average[own], [average[row] for row in wrong])
        with np.errstate(divide="ignore"):
            put("normalized_gt_loss", -np.log(likely))
    return log


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """Nats and tokens of all answers, and which of these are whose.

    ``greedy`` holds for each item's own answer, without the end mark, which of its tokens are the
    most likely ones.
    """

    total: np.ndarray
    count: np.ndarray
    greedy: list[np.ndarray] | None
    own: list[int]
    paraphrase: list[int]
    wrong: list[list[int]]


def _score_answers(name: str, items: Sequence[Item], asking: _Asking) -> _Scored:
    tokenizer, eos_id = asking.tokenizer, asking.eos_id
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    owners: list[Item] = []

    def add(item: Item, answer: str) -> int:
        length = asking.options.max_length
        row = asking.template.encode_answer(
            tokenizer, item.question, answer, max_length=length, eos_id=eos_id
        )
        rows.append(row)
        owners.append(item)
        return len(rows) - 1

    own, paraphrase, wrong = [], [], []
    for item in items:
        own.append(add(item, item.answer))
        if name not in _LOSS_ONLY:
            # The real-world sets have no paraphrase: the answer is not scored twice.
            plain = item.paraphrased_answer is None
            paraphrase.append(own[-1] if plain else add(item, item.truth))
            wrong.append([add(item, answer) for answer in item.perturbed_answers])
    pad = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    with _progress(f"{name}: losses", len(rows)) as bar:
        scores = score_rows(
            asking.nll_fn,
            rows,
            batch_size=asking.options.batch_size,
            pad_id=pad,
            progress=bar.update,
            describe=lambda i: f"set {name!r}, item {owners[i].index}",
        )
    greedy = None
    if scores.greedy is not None:
        # An answer that was cut off has no end mark.
        ends = [rows[i][0][-1] == eos_id for i in own]
        greedy = [scores.greedy[i][: -1 if end else None] for i, end in zip(own, ends)]
    return _Scored(
        total=scores.totals(),
        count=scores.counts(),
        greedy=greedy,
        own=own,
        paraphrase=paraphrase,
        wrong=wrong,
    )


def _generate(name: str, items: Sequence[Item], asking: _Asking) -> list[str]:
    """What the model answers, in the order of the items."""
    options, generate_fn = asking.options, asking.generate_fn
    assert generate_fn is not None
    batch_size = options.generate_batch_size or options.batch_size
    prompts = [asking.template.encode(asking.tokenizer, item.question) for item in items]
    # Longest first: memory fails at once or never.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    said = [""] * len(prompts)
    with _progress(f"{name}: answers", len(prompts)) as bar:
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            # Filled up with the shortest, so that a compiled decoder sees one number of rows.
            filled = picked + picked[-1:] * (batch_size - len(picked))
            found = generate_fn([prompts[i] for i in filled], options.max_new_tokens)
            if len(found) != len(filled):
                raise ValueError(
                    f"generate_fn: expected one answer a prompt, got {len(found)} for "
                    f"{len(filled)} prompts"
                )
            for i, tokens in zip(picked, found):
                ids = np.asarray(tokens, np.int64).ravel()
                said[i] = _decode(asking.tokenizer, ids, asking.eos_id)
            bar.update(len(picked))
    return said


def _decode(tokenizer: TokenizerLike, tokens: np.ndarray, eos_id: int | None) -> str:
    ends = np.flatnonzero(tokens == eos_id) if eos_id is not None else []
    kept = tokens[: ends[0]] if len(ends) else tokens
    # Ours can leave out marks in between, as TOFU's code does; the protocol does not ask for it.
    skips = "skip_special" in inspect.signature(tokenizer.decode).parameters
    return tokenizer.decode(kept.tolist(), **({"skip_special": True} if skips else {})).strip()
