"""The TOFU benchmark on a model: scores, generated answers, logs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.forgetting.tofu._data import Item
from experiments.forgetting.tofu._logs import plain
from experiments.forgetting.tofu._metrics import Evaluation, metrics_from_logs
from experiments.forgetting.tofu._truth_ratio import Form, normalised_probability, truth_ratio
from logitjax.data import TokenizerLike
from logitjax.evaluation import NllFn, PromptTemplate, rouge, score_rows
from logitjax.unlearning import memorisation

# (prompts, most new tokens) -> the continuation of each prompt.
GenerateFn = Callable[[list[np.ndarray], int], Sequence[Any]]

# Sets for which only losses are computed.
_LOSS_ONLY = ("holdout",)


def evaluate(
    nll_fn: NllFn,
    generate_fn: GenerateFn | None,
    tokenizer: TokenizerLike,
    sets: Mapping[str, Sequence[Item]],
    *,
    template: PromptTemplate,
    batch_size: int = 16,
    max_length: int = 200,
    max_new_tokens: int = 200,
    form: Form = "geometric",
    reference_logs: Any = None,
) -> Evaluation:
    """Run the TOFU benchmark on any model.

    For every item it computes the losses of the answer, of its paraphrase and of the wrong
    answers, and the ROUGE recall of the generated answer. `Evaluation.logs` have the format of
    TOFU's own code.

    Args:
        nll_fn: `(tokens, targets)`, int32 and bool `[batch, time]`, to the negative log-likelihood
            of every target, float32 `[batch, time]`. If it also returns a mask of the most likely
            tokens, extraction strength and exact memorisation are reported too, over answer tokens
            without the end mark.
        generate_fn: `(prompts, max_new_tokens)`, a list of int32 arrays and a number, to the greedy
            continuation of each prompt. None omits ROUGE and with it the model utility.
        sets: Sets by name. `retain`, `real_authors` and `world_facts` give the model utility,
            `forget` the forget quality; `holdout` (only its losses) allows a membership attack.
            Others are reported like the first three, or like `forget` if their name begins so.
        template: Text around the question; the template that the model was trained with.
        batch_size: Rows, and prompts, at a time; lengths are padded to multiples of 32.
        max_length: Maximum length of prompt and answer; TOFU's is 200, OpenUnlearning's 512.
        form: Form of the truth ratio in the metrics. Logs hold the geometric one, as TOFU's.
        reference_logs: Logs of the model retrained without the forget set: its `Evaluation`, or
            what `metrics_from_logs` takes.

    Raises:
        ValueError: Items without wrong answers, or losses that are not finite (names set and item).

    References:
        Maini et al., 2024 (arXiv 2401.06121), section 2.3. Departures: all items of a set (TOFU's
        code takes 300); prompts are encoded the same way for scoring and generating; ROUGE holds
        the generated text against the item's answer, not against a decoded one.
    """
    _check_sets(sets)
    logs = {}
    for name, items in sets.items():
        rows = _Rows(name, items, tokenizer, template, max_length)
        logs[name] = rows.log(nll_fn, batch_size)
        if generate_fn is not None and name not in _LOSS_ONLY:
            logs[name] |= rows.generated(generate_fn, batch_size, max_new_tokens)
    return metrics_from_logs(
        logs, reference_logs=reference_logs, form=form, vocab_size=tokenizer.vocab_size
    )


def _check_sets(sets: Mapping[str, Sequence[Item]]) -> None:
    for name, items in sets.items():
        if not items:
            raise ValueError(f"sets: {name!r} has no items")
        if len({item.index for item in items}) != len(items):
            raise ValueError(f"sets: {name!r} has items of the same index, which logs are keyed by")
        for item in items:
            if name not in _LOSS_ONLY and not item.perturbed_answers:
                raise ValueError(
                    f"sets: item {item.index} of {name!r} has no wrong answers; take the "
                    "_perturbed split"
                )


class _Rows:
    """The items of a set, and a model's results for them, with TOFU's fields."""

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        tokenizer: TokenizerLike,
        template: PromptTemplate,
        max_length: int,
    ):
        self.name, self.items = name, items
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length

    def log(self, nll_fn: NllFn, batch_size: int) -> dict[str, Any]:
        tokenizer = self.tokenizer
        pairs: list[tuple[Item, str]] = []
        # Row numbers of each item's answer, paraphrase and wrong answers.
        local, paraphrase, wrong = [], [], []
        for item in self.items:
            local.append(len(pairs))
            pairs.append((item, item.answer))
            if self.name not in _LOSS_ONLY:
                # The real-world sets have no paraphrase: the answer is not scored twice.
                again = [] if item.paraphrased_answer is None else [(item, item.truth)]
                paraphrase.append(local[-1] + len(again))
                first = local[-1] + 1 + len(again)
                wrong.append([*range(first, first + len(item.perturbed_answers))])
                pairs += [*again, *((item, answer) for answer in item.perturbed_answers)]
        options: Any = dict(max_length=self.max_length, eos_id=tokenizer.eos_id)
        rows = [
            self.template.encode_answer(tokenizer, item.question, answer, **options)
            for item, answer in pairs
        ]
        scores = score_rows(
            nll_fn,
            rows,
            batch_size=batch_size,
            pad_id=next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0),
            describe=lambda i: f"set {self.name!r}, item {pairs[i][0].index}",
        )
        total, count = scores.totals(), scores.counts()
        average = total / count
        log = {
            "avg_gt_loss": self._column(average[local]),
            "gt_loss": self._column(total[local]),
            "num_token_gt": self._column(count[local]),
        }
        if scores.greedy is not None:
            # An answer that was cut off has no end mark.
            ends = [rows[i][0][-1] == tokenizer.eos_id for i in local]
            greedy = [scores.greedy[i][: -1 if end else None] for i, end in zip(local, ends)]
            strengths, exact = zip(*map(memorisation, greedy), strict=True)
            log["extraction_strength"] = self._column(strengths)
            log["exact_memorization"] = self._column(exact)
        if self.name in _LOSS_ONLY:
            return log
        others = [average[row] for row in wrong]
        log |= {
            "average_perturb_loss": self._column(others),
            "avg_paraphrased_loss": self._column(average[paraphrase]),
            "truth_ratio": self._column(truth_ratio(average[paraphrase], others)),
            "paraphrased_loss": self._column(total[paraphrase]),
            "perturb_loss": self._column(total[row] for row in wrong),
            "num_token_paraphrased": self._column(count[paraphrase]),
            "num_token_perturb": self._column(count[row] for row in wrong),
        }
        if self.name in ("real_authors", "world_facts"):
            with np.errstate(divide="ignore"):
                likely = -np.log(normalised_probability(average[local], others))
            log["normalized_gt_loss"] = self._column(likely)
        return log

    def generated(self, generate_fn: GenerateFn, batch_size: int, new: int) -> dict[str, Any]:
        prompts = [self.template.encode(self.tokenizer, item.question) for item in self.items]
        # Longest first, so that running out of memory happens at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            # Filled up with the shortest, so that a compiled decoder sees one number of rows.
            filled = picked + picked[-1:] * (batch_size - len(picked))
            result = generate_fn([prompts[i] for i in filled], new)
            if len(result) != len(filled):
                raise ValueError(
                    f"generate_fn: expected one answer a prompt, got {len(result)} for "
                    f"{len(filled)} prompts"
                )
            for i, tokens in zip(picked, result):
                texts[i] = self._decode(np.asarray(tokens, np.int64).ravel())
        answers = [item.answer for item in self.items]
        recall = rouge(answers, texts)
        rendered = [self.template.render(item.question) for item in self.items]
        return {
            "generated_text": self._column(map(list, zip(rendered, texts, answers, strict=True))),
            "rouge1_recall": self._column(recall.rouge_1),
            "rougeL_recall": self._column(recall.rouge_l),
        }

    def _column(self, values: Any) -> dict[str, Any]:
        return {str(i.index): plain(value) for i, value in zip(self.items, values, strict=True)}

    def _decode(self, tokens: np.ndarray) -> str:
        end = self.tokenizer.eos_id
        ends = np.flatnonzero(tokens == end) if end is not None else []
        kept = tokens[: ends[0]] if len(ends) else tokens
        # Ours can leave out marks in between, as TOFU's code does; the protocol does not ask.
        skips = "skip_special" in inspect.signature(self.tokenizer.decode).parameters
        options: Any = {"skip_special": True} if skips else {}
        return self.tokenizer.decode(kept.tolist(), **options).strip()
