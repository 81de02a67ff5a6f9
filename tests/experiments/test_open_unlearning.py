"""Measures beside OpenUnlearning's formulas, written out in float64, on random logits."""

import json
import zlib

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.forgetting import tofu
from experiments.forgetting.tofu._forget_quality import forget_quality
from experiments.forgetting.tofu._metrics import privleak
from experiments.forgetting.tofu._truth_ratio import (
    answer_probability,
    log_truth_ratio,
    normalised_probability,
    preference,
    truth_ratio,
    truth_ratio_forget,
    truth_ratio_utility,
)
from logitjax.models import load_model, with_layout
from logitjax.unlearning import Deployed
from logitjax.unlearning.measures._membership import (
    detection_rate,
    membership_auc,
    memorisation,
    min_k,
    zlib_loss,
)

RNG = np.random.default_rng(0)
ITEMS, TOKENS, VOCAB, WRONG, EPS = 12, 9, 40, 5, 1e-10


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# Right answers, their paraphrases and wrong answers: [items, 2 + WRONG, tokens, vocab].
LOG_P = log_softmax(3.0 * RNG.normal(size=(ITEMS, 2 + WRONG, TOKENS, VOCAB)))
LABELS = np.where(
    RNG.uniform(size=LOG_P.shape[:-1]) < 0.5,
    LOG_P.argmax(-1),
    RNG.integers(0, VOCAB, LOG_P.shape[:-1]),
)
NLL = -np.take_along_axis(LOG_P, LABELS[..., None], -1)[..., 0]
AVERAGE = NLL.mean(-1)
TRUTH, REWORDED, PERTURBED = AVERAGE[:, 0], AVERAGE[:, 1], AVERAGE[:, 2:]
LISTED = list(PERTURBED)


def test_probabilities_and_truth_ratios():
    np.testing.assert_allclose(answer_probability(TRUTH), np.exp(-TRUTH), rtol=1e-12)
    p, wrong = np.exp(-TRUTH), np.exp(-PERTURBED)
    expected = p / (p + wrong.sum(1) + EPS)
    np.testing.assert_allclose(normalised_probability(TRUTH, LISTED, eps=EPS), expected, rtol=1e-12)
    correct, mean = np.exp(-REWORDED), np.exp(-PERTURBED.mean(1))
    ratios = mean / (correct + EPS)
    np.testing.assert_allclose(truth_ratio(REWORDED, LISTED, eps=EPS), ratios, rtol=1e-12)
    logs = log_truth_ratio(REWORDED, LISTED, eps=EPS)
    forget = np.mean(np.minimum(ratios, 1 / (ratios + EPS)))
    assert truth_ratio_forget(logs, eps=EPS) == pytest.approx(forget, rel=1e-12)
    assert truth_ratio_utility(logs) == pytest.approx(np.maximum(0, 1 - ratios).mean(), rel=1e-12)
    expected = correct / (correct + mean + EPS)
    np.testing.assert_allclose(preference(REWORDED, LISTED, eps=EPS), expected, rtol=1e-12)
    # Without their eps nothing is called impossible because all of it is unlikely.
    np.testing.assert_allclose(
        preference(REWORDED + 60, list(PERTURBED + 60)), preference(REWORDED, LISTED), rtol=1e-12
    )
    assert preference(REWORDED + 60, list(PERTURBED + 60), eps=EPS).max() < 1e-10
    both = preference(REWORDED, LISTED) + preference(PERTURBED.mean(1), list(REWORDED[:, None]))
    np.testing.assert_allclose(both, 1.0)


def test_memorisation():
    for log_p, labels in zip(LOG_P[:, 0], LABELS[:, 0]):
        best = log_p.argmax(-1)
        for k in range(TOKENS):
            if (best[k:] == labels[k:]).all():
                break
        greedy = best == labels
        # Their loop leaves k at the last token where no end fits.
        strength, exact = memorisation(greedy)
        assert max(strength, 1 / TOKENS) == pytest.approx(1 - k / TOKENS)
        assert exact == pytest.approx((best == labels).sum() / TOKENS)


@pytest.mark.parametrize("k", [0.2, 0.4, 1.0])
def test_membership_scores_of_tokens(k):
    for log_p, nll in zip(LOG_P[:, 0], NLL[:, 0]):
        least = -np.mean(sorted(-nll)[: max(1, int(k * TOKENS))])
        assert min_k(nll, k=k) == pytest.approx(least, rel=1e-12)
        mu = (np.exp(log_p) * log_p).sum(-1)
        sigma = (np.exp(log_p) * log_p**2).sum(-1) - mu**2
        scores = (-nll - mu) / np.sqrt(np.clip(sigma, 1e-6, None))
        expected = -np.mean(sorted(scores)[: max(1, int(k * TOKENS))])
        assert min_k(-scores, k=k) == pytest.approx(expected, rel=1e-12)


def test_what_is_made_of_them():
    text = "Ada was born in Marrowby."
    per_token = NLL[0, 0].mean() / len(zlib.compress(text.encode()))
    assert zlib_loss(NLL[0, 0], text) == pytest.approx(per_token * NLL[0, 0].size, rel=1e-12)
    members, others = TRUTH[:6], TRUTH[6:]
    # sklearn's area: members are the ones with the lower score.
    pairs = (members[:, None] < others).mean() + 0.5 * (members[:, None] == others).mean()
    auc = membership_auc(members, others)
    assert auc == pytest.approx(pairs, rel=1e-12)
    for reference in (0.5, 0.62):
        expected = ((1 - auc) - (1 - reference)) / (1 - reference + EPS) * 100
        assert privleak(auc, reference) == pytest.approx(expected, rel=1e-9)
    ratios, reference = (np.exp(-PERTURBED.mean(1) - (-REWORDED)) * shift for shift in (1.0, 1.7))
    expected = stats.ks_2samp(1 / (ratios + EPS), 1 / (reference + EPS)).pvalue
    quality = forget_quality(np.log(ratios), np.log(reference))
    assert quality.p_value == pytest.approx(expected, rel=1e-12)
    assert detection_rate(members, members + 10) == 1.0
    assert detection_rate(members + 10, members) == 0.0


def evaluated():
    """A `TOFU_EVAL.json` of these numbers."""

    def entries(key, values):
        by_item = {str(i): {key: v} for i, v in enumerate(np.asarray(values).tolist())}
        return {"agg_value": float(np.mean(values)), "value_by_index": by_item}

    greedy = LOG_P[:, 0].argmax(-1) == LABELS[:, 0]
    strengths, exact = zip(*map(memorisation, greedy))
    made = {
        "extraction_strength": entries("score", strengths),
        "exact_memorization": entries("score", exact),
        "model_utility": {"agg_value": 0.5},
    }
    for name in ("forget", "retain", "ra", "wf"):
        made[f"{name}_Q_A_Prob"] = entries("avg_loss", TRUTH)
        made[f"{name}_Q_A_PERT_Prob"] = entries("avg_loss", PERTURBED)
        made[f"{name}_Q_A_ROUGE"] = entries("rougeL_recall", np.full(ITEMS, 0.5))
        if name in ("forget", "retain"):
            made[f"{name}_Q_A_PARA_Prob"] = entries("avg_loss", REWORDED)
    return made


def test_its_logs_are_read(tmp_path):
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps(evaluated()))
    metrics = tofu.metrics_from_logs(tmp_path, reference_logs=evaluated(), eps=EPS)
    ratios = np.exp(-PERTURBED.mean(1)) / (np.exp(-REWORDED) + EPS)
    scores = metrics.scores["forget"]
    assert scores.truth_ratio == pytest.approx(np.minimum(ratios, 1 / (ratios + EPS)).mean())
    assert scores.probability == pytest.approx(np.exp(-TRUTH).mean())
    assert scores.exact_memorisation > scores.extraction_strength
    p = np.exp(-TRUTH)
    options = metrics.scores["real_authors"]
    assert options.probability == pytest.approx((p / (p + np.exp(-PERTURBED).sum(1) + EPS)).mean())
    parts = [
        getattr(metrics.scores[name], part)
        for name in ("retain", "real_authors", "world_facts")
        for part in ("probability", "rouge_l", "truth_ratio")
    ]
    assert metrics.model_utility == pytest.approx(stats.hmean(parts))
    assert metrics.forget_quality.p_value == 1.0
    broken = evaluated() | {"forget_Q_A_PARA_Prob": {"value_by_index": {"0": {}}}}
    with pytest.raises(ValueError, match="forget_Q_A_PARA_Prob: item 0 has no 'avg_loss'"):
        tofu.metrics_from_logs(broken)


@pytest.mark.slow
def test_surprise_of_a_model():
    model = with_layout(load_model("tiny:1"), "listed")
    tokens = RNG.integers(1, 200, (1, 9)).astype(np.int32)
    targets = np.arange(9)[None] >= 3
    deployed = Deployed(model=model, block=4)
    log_p = log_softmax(np.asarray(jax.jit(model.__call__)(tokens), np.float64))[0, :-1]
    mu = (np.exp(log_p) * log_p).sum(-1)
    sigma = (np.exp(log_p) * log_p**2).sum(-1) - mu**2
    log_probs = log_p[np.arange(8), tokens[0, 1:]]
    expected = ((mu - log_probs) / np.sqrt(np.clip(sigma, 1e-6, None)))[2:]
    np.testing.assert_allclose(
        np.asarray(deployed.surprise(tokens, targets))[0, 3:], expected, rtol=2e-4
    )
