"""Each metric against cases worked by hand, scipy, and the definitions written out."""

import itertools
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from experiments.forgetting import tofu
from experiments.forgetting.tofu._forget_quality import forget_quality
from experiments.forgetting.tofu._metrics import privleak
from experiments.forgetting.tofu._truth_ratio import (
    answer_probability,
    log_truth_ratio,
    model_utility,
    normalised_probability,
    truth_ratio,
    truth_ratio_forget,
    truth_ratio_utility,
)
from logitjax.evaluation import rouge
from logitjax.unlearning.measures._membership import membership_auc, memorisation

GOLDENS = pathlib.Path(__file__).parent / "goldens"
losses = st.floats(0, 30)
wrong_losses = st.lists(losses, min_size=1, max_size=5)


def golden(field):
    log = json.loads((GOLDENS / "eval_real_world_wo_options.json").read_text())
    return list(log[field].values())


def test_a_log_of_tofus_own_code_says_the_same():
    truth, wrong = golden("avg_paraphrased_loss"), golden("average_perturb_loss")
    np.testing.assert_allclose(truth_ratio(truth, wrong), golden("truth_ratio"), rtol=1e-6)
    likely = normalised_probability(golden("avg_gt_loss"), wrong)
    np.testing.assert_allclose(-np.log(likely), golden("normalized_gt_loss"), rtol=1e-12)
    _, generated, answers = zip(*golden("generated_text"))
    assert rouge(answers, generated).rouge_l.tolist() == golden("rougeL_recall")


def test_metrics_of_that_log():
    metrics = tofu.metrics_from_logs(GOLDENS)
    scores = metrics.scores["world_facts"]
    assert scores.items == 7
    assert scores.rouge_l == pytest.approx(6 / 7)
    assert scores.probability == pytest.approx(
        np.exp(-np.array(golden("normalized_gt_loss"))).mean()
    )
    ratio = np.array(golden("truth_ratio"))
    assert scores.truth_ratio == pytest.approx(np.maximum(0, 1 - ratio).mean(), rel=1e-6)
    assert metrics.model_utility is None
    assert metrics.forget_quality is None


@hypothesis.given(losses, wrong_losses, st.floats(-5, 5))
def test_truth_ratios_as_they_are_written(truth, wrong, shift):
    p, others = np.exp(-truth), np.exp(-np.array(wrong))
    arithmetic = truth_ratio([truth], [wrong], form="arithmetic")[0]
    geometric = truth_ratio([truth], [wrong])[0]
    assert arithmetic == pytest.approx(others.mean() / p)
    assert geometric == pytest.approx(stats.gmean(others) / p)
    assert arithmetic >= geometric * (1 - 1e-12)
    # A constant on every loss, e.g. a longer answer's, leaves both alone.
    moved = truth_ratio([truth + shift], [np.array(wrong) + shift])[0]
    assert moved == pytest.approx(geometric)
    likely = normalised_probability([truth], [wrong])[0]
    assert likely == pytest.approx(p / (p + others.sum()))


def test_nothing_overflows_for_a_model_that_was_destroyed():
    assert normalised_probability([2000.0], [[2000.0, 2000.0]])[0] == pytest.approx(1 / 3)
    assert normalised_probability([2000.0], [[0.0]])[0] == 0
    far = log_truth_ratio([5000.0, 0.0], [[0.0], [5000.0]])
    assert far.tolist() == [5000.0, -5000.0]
    assert truth_ratio_utility(far) == 0.5
    assert truth_ratio_forget(far) == 0.0
    assert log_truth_ratio([0.0], [[2000.0, 2000.0]], form="arithmetic").tolist() == [-2000.0]


def destroyed(losses, nats):
    """Logs of 200 items, and those of a model of which every answer costs some nats more."""

    def log(more):
        rng = np.random.default_rng(3)
        answers, wrong = rng.uniform(1, 3, (2, 200)), rng.uniform(1, 4, (200, 5))
        columns = {"avg_gt_loss": answers[0], "avg_paraphrased_loss": answers[1]}
        return {name: list(column + more) for name, column in columns.items()} | {
            "average_perturb_loss": (wrong + more).tolist()
        }

    return {name: log(nats if name in losses else 0.0) for name in ("forget", "retain")}


def test_a_model_of_which_all_answers_cost_100_nats_more_has_no_forget_quality():
    whole, gone = destroyed((), 0.0), destroyed(("forget", "retain"), 100.0)
    columns = ("avg_paraphrased_loss", "average_perturb_loss")
    losses = [[logs["forget"][name] for name in columns] for logs in (gone, whole)]
    # TOFU's form sees nothing; OpenUnlearning's sees its eps, and gives the floor of the test.
    assert forget_quality(*(log_truth_ratio(*side) for side in losses)).p_value == 1.0
    with_eps = forget_quality(*(log_truth_ratio(*side, eps=1e-10) for side in losses))
    assert with_eps.p_value == pytest.approx(1.94e-119, rel=5e-3)
    assert with_eps.statistic == 1.0

    metrics = tofu.metrics_from_logs(gone, reference_logs=whole)
    assert metrics.forget_quality is None
    assert str(metrics.damage).startswith("over-forgotten: 102.")
    assert "forget quality: none, for the model is over-forgotten" in metrics.table()
    assert metrics.forget_quality is None
    assert tofu.metrics_from_logs(whole, reference_logs=whole).damage is None


def test_a_models_damage_is_a_guess_on_the_forget_set_or_a_doubled_perplexity_on_the_retain_set():
    whole = destroyed((), 0.0)
    forgot = destroyed(("forget",), 3.0)
    assert tofu.metrics_from_logs(forgot, reference_logs=whole).damage is None
    small = tofu.metrics_from_logs(forgot, reference_logs=whole, vocab_size=32)
    assert str(small.damage).startswith("over-forgotten")
    for nats, damaged in ((0.69, False), (0.7, True)):
        metrics = tofu.metrics_from_logs(destroyed(("retain",), nats), reference_logs=whole)
        assert (metrics.forget_quality is None) == damaged
        assert (metrics.damage or "destroyed").startswith("destroyed")
    with pytest.raises(ValueError, match=r"^vocab_size: expected at least 2 tokens, got 1"):
        tofu.metrics_from_logs(whole, reference_logs=whole, vocab_size=1)


@pytest.mark.parametrize(
    ("loss", "ratio"), [(20, 0.5785), (23.03, 0.303), (25, 0.074), (30, 5.7e-4)]
)
def test_open_unlearnings_eps_takes_over_at_23_nats(loss, ratio):
    assert truth_ratio([loss], [[loss + 0.5]])[0] == pytest.approx(0.6065, abs=1e-4)
    ratio_with_eps = truth_ratio([loss], [[loss + 0.5]], eps=1e-10)[0]
    assert ratio_with_eps == pytest.approx(ratio, rel=1e-2)


def test_losses_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"^perturbed_nll: expected finite losses of item 1, got"):
        truth_ratio([1.0, 2.0], [[1.0], [np.inf]])
    with pytest.raises(ValueError, match=r"^truth_nll: expected finite losses of item 0, got"):
        truth_ratio([np.nan], [[1.0]])
    with pytest.raises(ValueError, match=r"^eps: expected a number from 0 to below 1, got nan"):
        truth_ratio([1.0], [[1.0]], eps=np.nan)


def test_wrong_answers_are_needed():
    with pytest.raises(
        ValueError, match=r"^perturbed_nll: expected losses of wrong answers of item 1"
    ):
        truth_ratio([1.0, 2.0], [[1.0], []])
    with pytest.raises(
        ValueError, match=r"^perturbed_nll: expected one list for each of 2 items, got 1"
    ):
        normalised_probability([1.0, 2.0], [[1.0]])


def parts(values):
    sets, fields = ("retain", "real_authors", "world_facts"), ("probability", "rouge_l")
    names = [f"{a}.{b}" for a in sets for b in (*fields, "truth_ratio")]
    return dict(zip(names, values, strict=True))


def test_model_utility_of_llama_2_that_knows_all_authors():
    # The nine numbers of its published logs, rounded; the utility from the logs is .6227.
    published = [0.990, 0.986, 0.475, 0.455, 0.933, 0.596, 0.419, 0.882, 0.539]
    assert model_utility(parts(published)) == pytest.approx(0.6227, abs=5e-4)
    assert model_utility(parts([0.0, *published[1:]])) == 0.0
    with pytest.raises(ValueError, match=r"^parts: expected numbers from 0 to 1"):
        model_utility(parts([-0.1, *published[1:]]))
    with pytest.raises(ValueError, match=r"^parts: expected numbers from 0 to 1"):
        model_utility(parts([np.nan, *published[1:]]))
    with pytest.raises(ValueError, match=r"got none of \['retain.probability'\]"):
        model_utility({k: v for k, v in parts(published).items() if k != "retain.probability"})


@hypothesis.given(st.lists(st.floats(0.01, 1), min_size=9, max_size=9))
def test_model_utility_is_scipys_harmonic_mean(values):
    assert model_utility(parts(values)) == pytest.approx(stats.hmean(values))


def shifted(n, k):
    """Two samples of n with D = k / n and no ties."""
    return np.arange(n, dtype=float), np.arange(n) + k - 0.5


def test_forget_quality_of_published_models():
    # 119 of 300 items: Llama-2 that knows all authors against the one retrained on 90 %.
    quality = forget_quality(*shifted(300, 119))
    assert quality.statistic == pytest.approx(0.397, abs=5e-4)
    assert quality.p_value == pytest.approx(1.8e-21, rel=0.05)
    assert quality.log10_p_value == pytest.approx(np.log10(quality.p_value))
    # Of 40 items the p-value can have few values, and tables of others have these. (Those of the
    # paper on logit-difference unlearning also have .66, .58 and .52 at 1 %: only .58 can be.)
    grid = [forget_quality(*shifted(40, k)).p_value for k in range(20)]
    for published in (0.99, 0.92, 0.58, 0.40, 0.27, 0.10, 1.27e-3):
        assert min(abs(p - published) / published for p in grid) < 0.03, published


@hypothesis.given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=30),
    st.lists(st.integers(-6, 6), min_size=1, max_size=30),
)
def test_forget_quality_is_scipys_whatever_increasing_function_is_taken(a, b):
    quality = forget_quality(a, b, resamples=20)
    expected = stats.ks_2samp(a, b)
    assert quality.statistic == expected.statistic
    assert quality.p_value == expected.pvalue
    low, high = quality.interval
    assert 0 <= low <= quality.statistic <= high <= 1
    assert forget_quality(np.exp(a), np.exp(b), resamples=20) == quality
    assert forget_quality(b, a, resamples=1).statistic == quality.statistic


def test_a_model_is_like_itself_and_the_interval_covers():
    rng = np.random.default_rng(0)
    same = rng.normal(size=50)
    assert forget_quality(same, same).interval == (0.0, 0.0)
    # Not told apart at 95 %, so 0 is in the interval.
    assert forget_quality(*shifted(40, 5)).interval[0] == 0
    assert forget_quality(*shifted(40, 30)).interval[0] > 0.3
    # Normals one apart have D = .383; of 60 draws the interval of 90 % should cover most.
    truth = 2 * stats.norm.cdf(0.5) - 1
    covered = 0
    for _ in range(60):
        a, b = rng.normal(size=100), rng.normal(1.0, 1.0, size=100)
        low, high = forget_quality(a, b, paired=False, confidence=0.9, resamples=200).interval
        covered += low <= truth <= high
    assert covered >= 46


def test_p_values_that_no_float_holds():
    quality = forget_quality(*shifted(4000, 3000), resamples=2)
    assert quality.p_value < 1e-300
    assert np.isfinite(quality.log10_p_value)
    assert quality.log10_p_value < -300


def test_forget_quality_refuses_what_is_no_number():
    with pytest.raises(ValueError, match=r"^ratios: expected finite numbers, got nan at 1"):
        forget_quality([1.0, np.nan], [1.0])
    with pytest.raises(ValueError, match=r"^reference_ratios: expected \[n >= 1\]"):
        forget_quality([1.0], [])
    with pytest.raises(ValueError, match=r"^reference_ratios: expected 1, one for each"):
        forget_quality([1.0], [1.0, 2.0], paired=True)


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_extraction_strength_as_it_is_written(hits):
    k = next((k for k in range(len(hits) + 1) if all(hits[k:])), len(hits))
    strength, exact = memorisation(hits)
    assert strength == pytest.approx(1 - k / len(hits))
    assert strength <= exact == pytest.approx(np.mean(hits))


def test_a_text_without_a_token_is_not_known():
    assert memorisation([]) == (0, 0)


@hypothesis.given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_membership_auc_counts_pairs(members, others):
    pairs = [(a < b) + 0.5 * (a == b) for a, b in itertools.product(members, others)]
    assert membership_auc(members, others) == pytest.approx(np.mean(pairs))
    assert membership_auc(members, others) + membership_auc(others, members) == pytest.approx(1)


def test_privleak():
    # As many forgotten texts below as above those held out is what the retrained model has.
    assert privleak(0.4, 0.4) == 0
    assert privleak(0.0, 0.5) == pytest.approx(100)
    assert privleak(0.7, 0.4) == pytest.approx(-50)
    with pytest.raises(ValueError, match=r"auc: expected a number between"):
        privleak(1.5)
    with pytest.raises(ValueError, match=r"losses: expected numbers"):
        membership_auc([], [1.0])


def test_rouge_is_stemmed_recall_in_order():
    scores = rouge(
        ["The cats were running home", "a b c d", "", "Zoë’s"],
        ["home ran a cat, the running cat", "d c b a", "x", "zo"],
    )
    # the, cat, run, home of 5 words; in order: "the ... running" or "cat ... running".
    np.testing.assert_allclose(scores.rouge_1, [4 / 5, 1.0, 0.0, 0.5])
    np.testing.assert_allclose(scores.rouge_l, [2 / 5, 1 / 4, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"as many predictions"):
        rouge(["a"], [])


def test_probability():
    assert answer_probability([0.0, np.log(4.0)]).tolist() == pytest.approx([1.0, 0.25])
