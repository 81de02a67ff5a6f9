"""The benchmark from tokens to table, on models small enough to know what they must say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.forgetting import tofu
from logitjax.evaluation import PromptTemplate, score_rows
from tests._nll import nll_from_apply
from tests.data._tokenizers import ByteTokenizer
from tests.experiments.test_tofu_data import FILES

TEMPLATE = PromptTemplate(before="Q: ", after="\nA: ")
VOCAB = ByteTokenizer.vocab_size
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
# Letters that questions have are likely, or a random model would be worse than a guess.
TABLE[:, ord("a") : ord("z")] += 2.0

SETS = {
    "retain": tofu.load(FILES, "retain_perturbed"),
    "real_authors": tofu.load(FILES, "real_authors_perturbed"),
    "world_facts": tofu.load(FILES, "world_facts_perturbed"),
    "forget": tofu.load(FILES, "forget01_perturbed"),
    "holdout": tofu.load(FILES, "real_authors"),
}
ALL = [item for items in SETS.values() for item in items]


def bigram(table=TABLE):
    """In numpy, which compiles nothing for the many lengths of bytes."""
    nll = np.log(np.exp(table).sum(-1, keepdims=True)) - table

    def nll_fn(tokens, targets):
        assert tokens.dtype == np.int32
        assert targets.dtype == bool
        before, now = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1], tokens
        hits = table.argmax(-1)[before] == now
        return np.where(targets, nll[before, now], 0), hits & targets

    return nll_fn


def bigram_in_jax():
    return nll_from_apply(jax.jit(lambda tokens: jnp.asarray(TABLE)[tokens]), with_greedy=True)


def knows(prompts, max_new_tokens):
    """Answers every question right and then goes on behind the end mark."""
    answers = {TEMPLATE.render(item.question): item.answer for item in ALL}
    tokenizer = ByteTokenizer()
    return [
        np.array([*tokenizer.encode(answers[tokenizer.decode(p)]), tokenizer.eos_id, 65])
        for p in prompts
    ]


def evaluate(nll_fn=None, generate_fn=knows, sets=SETS, **options):
    options = {"template": TEMPLATE, "max_length": 2000} | options
    return tofu.evaluate(nll_fn or bigram(), generate_fn, ByteTokenizer(), sets, **options)


def by_hand(question, answer, table=TABLE):
    """Nats of each token of an answer and its end mark, in float64."""
    tokens = [*TEMPLATE.render(question).encode(), *answer.encode(), 256]
    logits = table.astype(np.float64)[tokens[:-1]]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]
    hits = logits.argmax(-1) == tokens[1:]
    size = len(answer.encode()) + 1
    return nll[-size:], hits[-size:-1]


def test_logs_hold_what_the_model_says():
    metrics = evaluate(batch_size=4)
    for name, items in SETS.items():
        log = metrics.logs[name]
        assert list(log["avg_gt_loss"]) == [str(item.index) for item in items]
        for item in items:
            key = str(item.index)
            nll, hits = by_hand(item.question, item.answer)
            assert log["gt_loss"][key] == pytest.approx(nll.sum(), rel=1e-5)
            assert log["num_token_gt"][key] == len(nll)
            assert log["avg_gt_loss"][key] == pytest.approx(nll.mean(), rel=1e-5)
            assert log["exact_memorization"][key] == pytest.approx(hits.mean())
            if name == "holdout":
                continue
            truth, _ = by_hand(item.question, item.truth)
            wrong = [by_hand(item.question, answer)[0] for answer in item.perturbed_answers]
            assert log["avg_paraphrased_loss"][key] == pytest.approx(truth.mean(), rel=1e-5)
            assert log["average_perturb_loss"][key] == pytest.approx(
                [w.mean() for w in wrong], rel=1e-5
            )
            assert log["num_token_perturb"][key] == [len(w) for w in wrong]
            ratio = np.exp(truth.mean() - np.mean([w.mean() for w in wrong]))
            assert log["truth_ratio"][key] == pytest.approx(ratio, rel=1e-4)
            prompt, generated, answer = log["generated_text"][key]
            assert (prompt, generated, answer) == (
                TEMPLATE.render(item.question),
                item.answer,
                item.answer,
            )
            assert log["rougeL_recall"][key] == 1.0
    assert "normalized_gt_loss" in metrics.logs["world_facts"]
    assert "normalized_gt_loss" not in metrics.logs["retain"]


def test_files_are_tofus_and_say_the_same_again(tmp_path):
    metrics = evaluate()
    aggregated = tmp_path / "eval_log_aggregated.json"
    aggregated.write_text(json.dumps(metrics.logs))
    for source in (tmp_path, str(aggregated), json.loads(aggregated.read_text()), metrics):
        again = tofu.metrics_from_logs(source)
        assert again.model_utility == metrics.model_utility
        assert (again.scores, again.membership) == (metrics.scores, metrics.membership)
    assert metrics.model_utility is not None
    nine = [
        getattr(metrics.scores[name], part)
        for name in ("retain", "real_authors", "world_facts")
        for part in ("probability", "rouge_l", "truth_ratio")
    ]
    assert metrics.model_utility == pytest.approx(9 / sum(1 / x for x in nine))


def test_a_model_like_the_retrained_one_and_one_that_is_not():
    # Paraphrases of the first letters are unlikely to it, unlike those of the rest.
    other = TABLE.copy()
    other[:, ord("e")] += 2.0
    retrained = evaluate(generate_fn=None)
    same = evaluate(generate_fn=None, reference_logs=retrained)
    assert same.forget_quality is not None
    assert same.forget_quality.p_value == 1
    assert same.forget_quality.items == (4, 4)
    assert same.membership is not None
    assert same.membership.privleak == 0
    assert same.model_utility is None
    metrics = evaluate(bigram(other), generate_fn=None, reference_logs=retrained)
    assert metrics.forget_quality is not None
    assert metrics.forget_quality.statistic > 0
    table = metrics.table()
    assert "| forget | 4 |" in table
    assert "forget quality: D" in table
    assert "membership attack: AUC" in table
    assert "model utility" not in table
    gone = evaluate(bigram(-5 * other), generate_fn=None, reference_logs=retrained)
    assert gone.forget_quality is None
    assert str(gone.damage).startswith("over-forgotten")


def counted(nll_fn):
    calls = []

    def count(tokens, targets):
        calls.append(tokens.shape)
        return nll_fn(tokens, targets)

    return count, calls


def test_shapes_are_few_and_batches_full():
    nll_fn, calls = counted(bigram())
    prompts_at_once = set()

    def generate(prompts, max_new_tokens):
        prompts_at_once.add(len(prompts))
        assert max_new_tokens == 7
        return knows(prompts, max_new_tokens)

    evaluate(nll_fn, generate, batch_size=8, max_new_tokens=7)
    assert all(rows == 8 and time % 32 == 0 for rows, time in calls)
    assert prompts_at_once == {8}


def test_errors_name_set_and_item():
    with pytest.raises(ValueError, match="item 0 of 'forget' has no wrong answers"):
        evaluate(sets={"forget": [tofu.Item(question="q", answer="a")]})
    with pytest.raises(ValueError, match="'retain' has no items"):
        evaluate(sets={"retain": []})
    with pytest.raises(ValueError, match="items of the same index"):
        evaluate(sets={"retain": [SETS["retain"][0]] * 2})
    broken = TABLE.copy()
    broken[:, 256] = np.nan
    with pytest.raises(ValueError, match=r"set 'retain', item \d: \d+ of \d+ losses are not"):
        evaluate(bigram(broken))
    with pytest.raises(ValueError, match="generate_fn: expected one answer a prompt, got 0 for 16"):
        evaluate(generate_fn=lambda prompts, _: [])
    with pytest.raises(ValueError, match="nll_fn: expected"):
        evaluate(lambda tokens, targets: np.zeros(3))
    with pytest.raises(ValueError, match="no token of the answer fits"):
        evaluate(max_length=20)


def test_logs_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        tofu.metrics_from_logs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no logs in it"):
        tofu.metrics_from_logs(tmp_path)
    with pytest.raises(TypeError, match="path or a mapping, got int"):
        tofu.metrics_from_logs(3)
    (tmp_path / "eval_log.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval_log\.json: not valid JSON"):
        tofu.metrics_from_logs(tmp_path)
    (tmp_path / "eval_log.json").write_text("{}")
    with pytest.raises(ValueError, match="'avg_gt_loss' is missing"):
        tofu.metrics_from_logs(tmp_path)
    log = {"avg_gt_loss": {"0": 1.0, "1": 1.0}, "rougeL_recall": {"0": 1.0}}
    with pytest.raises(ValueError, match="retain: 'rougeL_recall' lacks 1 items, first '1'"):
        tofu.metrics_from_logs({"retain": log})
    with pytest.raises(ValueError, match="reference_logs: no forget set"):
        tofu.metrics_from_logs(
            {"forget": {"avg_gt_loss": {"0": 1.0}}},
            reference_logs={"retain": {"avg_gt_loss": {"0": 1.0}}},
        )


def test_items_are_paired_by_their_key_and_forms_differ():
    def log(order, shift):
        return {
            "avg_gt_loss": dict.fromkeys(order, 1.0),
            "avg_paraphrased_loss": {k: 1.0 + shift * int(k) for k in order},
            "average_perturb_loss": {k: [1.0, 2.0 + int(k)] for k in order},
        }

    mine, reference = {"forget": log("0123", 0.1)}, {"forget": log("3120", 0.1)}
    metrics = tofu.metrics_from_logs(mine, reference_logs=reference)
    assert metrics.forget_quality is not None
    # Items drawn together stay together: no resample tells the two apart.
    assert metrics.forget_quality.interval == (0.0, 0.0)
    fewer = tofu.metrics_from_logs(mine, reference_logs={"forget": log("012", 0.1)})
    assert fewer.forget_quality is not None
    assert fewer.forget_quality.items == (4, 3)
    other = tofu.metrics_from_logs(mine, reference_logs=reference, form="arithmetic")
    assert other.scores["forget"].truth_ratio != metrics.scores["forget"].truth_ratio


def test_rows_begin_with_the_prompt_that_is_continued():
    tokenizer = ByteTokenizer()
    ids, where = TEMPLATE.encode_answer(tokenizer, "q?", "a.")
    prompt = TEMPLATE.encode(tokenizer, "q?")
    assert ids.tolist() == [*b"Q: q?\nA: a.", 256]
    assert ids[~where].tolist() == prompt.tolist() == list(b"Q: q?\nA: ")
    cut, where = TEMPLATE.encode_answer(tokenizer, "q?", "a.", max_length=10)
    assert cut.tolist() == list(b"Q: q?\nA: a")
    assert where.sum() == 1

    class Merges(ByteTokenizer):
        """Has one token for the blank before a word and the word."""

        def encode(self, text, add_bos=False):
            return [300] * add_bos + list(text.replace(": a", ":A").encode())

    # The prompt's last token would go into the answer's first: they are encoded apart.
    template = dataclasses.replace(TEMPLATE, add_bos=True)
    ids, where = template.encode_answer(Merges(), "q?", "a.", eos_id=9)
    assert ids.tolist() == [300, *b"Q: q?\nA: ", *b"a.", 9]
    assert ids[~where].tolist() == template.encode(Merges(), "q?").tolist()


def test_templates_of_tofu():
    assert PromptTemplate.llama2().render("q") == "[INST] q [/INST]"
    assert PromptTemplate.phi().render("q") == "Question: q\nAnswer: "
    assert PromptTemplate.chatml().render("q").endswith("q<|im_end|>\n<|im_start|>assistant\n")


def test_scores_do_not_depend_on_batches():
    rows = [TEMPLATE.encode_answer(ByteTokenizer(), "q", "x" * n) for n in (1, 40, 3, 90, 7)]
    one = score_rows(bigram(), rows, batch_size=1)
    many = score_rows(bigram_in_jax(), rows, batch_size=3)
    assert one.greedy is not None
    assert many.greedy is not None
    for a, b in zip([*one.nll, *one.greedy], [*many.nll, *many.greedy], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert many.counts().tolist() == [2, 41, 4, 91, 8]
    with pytest.raises(ValueError, match="row 0: its first token is a target"):
        score_rows(bigram(), [(np.array([1, 2]), np.array([True, True]))])
    assert score_rows(lambda tokens, targets: tokens * 0.0, rows).greedy is None
