"""MUSE: its rows and its measures."""

import os
from collections.abc import Mapping, Sequence

from logitjax.evaluation import rouge, score_rows
from logitjax.models import Tokenizer
from logitjax.unlearning._rows import Row, encode_question, encode_row
from logitjax.unlearning.assistant._deployed import Deployed, answers
from logitjax.unlearning.measures._membership import membership_auc, min_k, privleak
from logitjax.unlearning.measures._records import read_records, text_of

# Where an answer to a question ends: the model goes on with the next one.
_STOPS = ("\n\n", "\nQuestion", "Question:")
_TOKENS = {"verbmem": 128, "knowmem": 32}  # as in the release


def load(source: str | os.PathLike[str], subset: str, split: str) -> tuple[Row, ...]:
    """Rows of a split.

    Args:
        source: A directory that has the folders of subsets, or `hf:muse-bench/MUSE-News` or
            `.../MUSE-Books`.
        subset: `verbmem`, a text and how it goes on; `knowmem`, questions and answers; or plain
            text: `privleak`, `raw`, `train`, `scal`, `sust`.
        split: Such as `forget`, `holdout`, `retain1`, `forget_qa`, `retain_qa` or `forget_qa_icl`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A record lacks something.
    """
    # The first release calls what is to be kept and asked about `retain2`.
    stems = [f"{subset}/{split}", f"{subset}/{split.replace('retain_', 'retain2_')}"]
    where = f"{subset}/{split}"
    rows = []
    for record in read_records(source, stems):
        if subset == "verbmem":
            prompt, answer = (text_of(record, key, where) for key in ("prompt", "gt"))
            rows.append(Row(prompt=prompt, answer=answer))
        elif subset == "knowmem":
            question, answer = (text_of(record, key, where) for key in ("question", "answer"))
            rows.append(Row(prompt=f"Question: {question}\nAnswer: ", answer=answer))
        else:
            rows.append(Row(answer=text_of(record, "text", where)))
    return tuple(rows)


def evaluate(
    model: Deployed,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[Row]],
    *,
    examples: Sequence[Row] = (),
    reference_auc: float = 0.5,
    batch_size: int = 4,
    max_length: int = 2048,
) -> dict[str, float]:
    """What a model still says of what it has read.

    Args:
        model: As it answers.
        tokenizer: Tokenizer of the model.
        sets: By name. Of `..._verbmem` and `..._knowmem` the mean ROUGE-L F1 of what is generated,
            128 and 32 tokens at most, the likeliest ones; of `forget` and `holdout`, plain text,
            the AUC of min-k with k = 0.4, and PrivLeak.
        examples: Of the kind of `knowmem`; they come before each of its questions.
        reference_auc: AUC of the retrained model.
        batch_size: Rows at a time.
        max_length: Most tokens of a text; of prompts, those at their end.

    Returns:
        Numbers by name: those of the sets, `auc` and `privleak`.

    Raises:
        ValueError: A set of another name.

    References:
        Shi et al., MUSE, 2024 (arXiv 2407.06460). ROUGE is of stems, as in OpenUnlearning; the
        release of the paper has none. Texts keep their last token, which OpenUnlearning takes for
        an end mark.
    """
    found = {}
    shots = "".join(f"{row.prompt}{row.answer}\n\n" for row in examples)
    for name, rows in sets.items():
        kind = name.rpartition("_")[2]
        if kind in _TOKENS:
            before = shots if kind == "knowmem" else ""
            asked = [row.asked(before + row.question) for row in rows]
            prompts = [encode_question(row, tokenizer)[-max_length:] for row in asked]
            said = answers(model, tokenizer, prompts, _TOKENS[kind], rows=batch_size)
            if kind == "knowmem":
                said = [_first_answer(text) for text in said]
            found[name] = float(rouge([row.answer for row in rows], said).f1.mean())
        elif name not in ("forget", "holdout"):
            raise ValueError(
                f"sets: expected names that end in _verbmem or _knowmem, forget and holdout, got "
                f"{name!r}"
            )
    if "forget" in sets and "holdout" in sets:
        scores = []
        for side in ("forget", "holdout"):
            rows = [encode_row(row, tokenizer, max_length=max_length) for row in sets[side]]
            nll = score_rows(model.nll, rows, batch_size=batch_size).nll
            scores.append([min_k(row) for row in nll])
        found["auc"] = membership_auc(*scores)
        found["privleak"] = privleak(found["auc"], reference_auc)
    return found


def _first_answer(text: str) -> str:
    for stop in _STOPS:
        text = text.partition(stop)[0]
    return text.strip()
