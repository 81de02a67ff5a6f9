"""Strategies with fixed weights, against their formulas."""

import jax
import jaxtyping
import numpy as np
import pytest

from logitjax.fusion import (
    ContrastiveDecoding,
    DExperts,
    DynamicFusion,
    LogitDifference,
    ProxyTuning,
    TeacherMixture,
    TeacherRedraw,
)
from tests._compiled import compiled
from tests.fusion.test_dynamic import BASE, EXPERT, LARGE, log_softmax
from tests.fusion.test_several_experts import EXPERTS

VOCAB = LARGE.shape[-1]


def fuse(strategy, *logits, **options):
    """A strategy as one program that gives numpy's arrays."""
    return jax.device_get(compiled(strategy)(*logits, **options))


def test_proxy_tuning_adds_differences():
    fused, info = fuse(ProxyTuning(alpha=0.5), LARGE, EXPERTS, BASE)
    expected = LARGE + 0.5 * (EXPERTS[0] - BASE) + 0.5 * (EXPERTS[1] - BASE)
    np.testing.assert_allclose(fused, expected, atol=1e-5)
    assert info == {}


def test_strategies_are_static_arguments():
    def run(strategy, *logits):
        return strategy(*logits)[0]

    jitted = jax.jit(run)
    for strategy in (ProxyTuning(), DynamicFusion(), DExperts(), LogitDifference()):
        assert hash(strategy) == hash(type(strategy)())
    np.testing.assert_allclose(
        jitted(ProxyTuning(), LARGE, EXPERT, BASE), LARGE + EXPERT - BASE, atol=1e-5
    )


def test_dexperts_keeps_the_large_models_nucleus():
    fused, _ = fuse(DExperts(alpha=1.0, top_p=0.8), LARGE, EXPERT, BASE)
    p = np.exp(log_softmax(np.float64(LARGE)))
    for row, kept in zip(p, np.isfinite(fused), strict=True):
        order = np.argsort(-row)
        size = int((np.cumsum(row[order]) < 0.8 - 1e-6).sum()) + 1
        assert set(np.flatnonzero(kept)) == set(order[:size])


def test_a_nucleus_of_nothing_keeps_the_likeliest_token():
    fused, _ = fuse(DExperts(top_p=0.0), LARGE, EXPERT, BASE)
    np.testing.assert_array_equal(np.isfinite(fused).sum(-1), 1)


def test_contrastive_decoding_masks_the_implausible():
    fused, _ = fuse(ContrastiveDecoding(plausibility=0.2), LARGE, None, BASE)
    p = np.exp(log_softmax(np.float64(LARGE)))
    kept = p >= 0.2 * p.max(-1, keepdims=True)
    np.testing.assert_array_equal(np.isfinite(fused), kept)
    expected = 1.5 * LARGE - 0.5 * BASE
    np.testing.assert_allclose(np.asarray(fused)[kept], expected[kept], atol=1e-5)
    empty = np.zeros((0, *LARGE.shape), np.float32)
    again, _ = fuse(ContrastiveDecoding(plausibility=0.2), LARGE, empty, BASE[None])
    np.testing.assert_array_equal(again, fused)
    with pytest.raises(ValueError, match="expected None, got"):
        ContrastiveDecoding()(LARGE, EXPERT, BASE)


@pytest.mark.parametrize("form", ["raw", "centred"])
@pytest.mark.parametrize("rate", [0.02, 0.002])
def test_logit_difference_with_the_official_filter(form, rate):
    options = dict(alpha=0.5, form=form, filter="official", rate=rate)
    fused, info = fuse(LogitDifference(**options), LARGE, EXPERT)
    log_p = log_softmax(np.float64(LARGE))
    k = int(rate * VOCAB)
    masked = np.zeros(LARGE.shape, bool)
    if k:
        threshold = np.minimum(np.sort(log_p, -1)[:, -k], log_p.max(-1) + np.log(rate))
        masked = log_p < threshold[:, None]
    assistant = np.float64(EXPERT)
    if form == "centred":
        assistant = log_softmax(assistant) + np.log(VOCAB)
    expected = np.where(masked, LARGE, LARGE - 0.5 * assistant)
    np.testing.assert_allclose(fused, expected, atol=1e-4)
    np.testing.assert_array_equal(info["changed"], (~masked).sum(-1))
    excluded, _ = fuse(LogitDifference(**options, outside="exclude"), LARGE, EXPERT)
    np.testing.assert_array_equal(np.isinf(excluded), masked)


def test_logit_difference_with_the_clean_filter():
    strategy = LogitDifference(alpha=1.0, form="raw", filter="clean", rate=0.3)
    fused, info = fuse(strategy, LARGE, EXPERT[None], None)
    p = np.exp(log_softmax(np.float64(LARGE)))
    changed = p >= 0.3 * p.max(-1, keepdims=True)
    np.testing.assert_allclose(fused, np.where(changed, LARGE - EXPERT, LARGE), atol=1e-5)
    np.testing.assert_array_equal(info["changed"], changed.sum(-1))


def test_a_uniform_assistant_changes_nothing_when_centred():
    uniform = np.full_like(LARGE, 3.0)
    fused, _ = fuse(LogitDifference(), LARGE, uniform)
    np.testing.assert_allclose(fused, LARGE, atol=1e-5)
    raw, _ = fuse(LogitDifference(form="raw"), LARGE, uniform)
    assert np.abs(raw - LARGE).max() > 1


def test_by_default_an_answer_that_the_target_is_sure_of_is_forgotten():
    large, assistant = np.zeros((2, 1000), np.float32)
    large[3], assistant[3] = 20.0, 40.0
    fused, _ = fuse(LogitDifference(), large, assistant)
    assert np.exp(log_softmax(np.float64(fused)))[3] < 1e-3


def test_an_excluded_token_never_wins():
    """The release multiplies scores by a mask: where all kept ones are negative, a zero wins."""
    large, assistant = np.float32([-4.0, -2.0, -9.0, -9.5]), np.zeros(4, np.float32)
    fused, _ = fuse(LogitDifference(filter="clean", outside="exclude", rate=0.1), large, assistant)
    assert int(fused.argmax()) == 1
    with pytest.raises(ValueError, match="expected None, got"):
        LogitDifference()(large, assistant, assistant)


def test_padding_gives_no_nan():
    large = np.float32([1.0, 0.0, -np.inf])
    expert = np.float32([1.0, -np.inf, 2.0])
    for strategy in (ProxyTuning(), DExperts()):
        fused, _ = fuse(strategy, large, expert, np.zeros(3, np.float32))
        assert not np.isnan(fused).any()
        assert np.isinf(fused[1:]).all()
    where = np.array([True, True, False])
    fused, _ = fuse(ProxyTuning(), np.zeros(3, np.float32), expert, expert, vocab_where=where)
    np.testing.assert_array_equal(np.isfinite(fused), [True, False, False])
    for strategy in (LogitDifference(filter="clean"), LogitDifference(filter="official", rate=0.9)):
        assert not np.isnan(fuse(strategy, large, expert)[0]).any()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LogitDifference(form="log"), "form: expected one of raw, centred"),
        (lambda: LogitDifference(rate=0.0), "rate"),
        (lambda: DExperts(top_p=1.5), "top_p"),
        (lambda: ContrastiveDecoding(plausibility=-1.0), "plausibility"),
    ],
)
def test_mistakes_are_named(make, named, monkeypatch):
    # Under tests a wrong choice would fail before, by its annotation.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=named):
        make()


def test_at_the_highest_plausibility_the_likeliest_token_is_left():
    fused, _ = fuse(ContrastiveDecoding(plausibility=1.0), LARGE, None, BASE)
    peak = LARGE.argmax(-1)[:, None]
    np.testing.assert_array_equal(np.isfinite(fused), np.arange(VOCAB) == peak)


def test_a_student_samples_with_its_teachers_help():
    q, p = (np.exp(log_softmax(np.float64(x))) for x in (LARGE, EXPERT))
    mixed, _ = fuse(TeacherMixture(share=0.3), LARGE, EXPERT)
    np.testing.assert_allclose(np.exp(mixed), 0.3 * p + 0.7 * q, rtol=1e-4)
    redrawn, _ = fuse(TeacherRedraw(top_k=5), LARGE, EXPERT)
    accepted = p >= np.sort(p, -1)[..., -5:-4]
    expected = np.where(accepted, q, 0)
    expected += (1 - expected.sum(-1, keepdims=True)) * p
    np.testing.assert_allclose(np.exp(redrawn), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="logits_experts: expected one teacher, got 2"):
        TeacherMixture()(LARGE, np.stack([EXPERT, EXPERT]))
