"""A verdict is of every row and every way to ask, and the files and the status follow it."""

import json
from typing import Any

import numpy as np
import pytest
from etils import epath
from scipy import stats

from logitjax.commands import cli, unlearn
from logitjax.models import load_tokenizer
from logitjax.unlearning import Questions, Row
from logitjax.unlearning._selection import Goal, Limits
from logitjax.unlearning._unlearn import RESULTS, Unlearned
from logitjax.unlearning._verdict import _never, _power, chance_auc, judge

WAYS = ("asked", "in a role", "in context")


def side(rng, forget, unseen=0.05, kept=0.95, rows=8, **more):
    """An invented record of `examine`."""
    attacks = {
        "asked": {"probability": 0.1, "worst": 0.1},
        "extraction strength": {"share": 0.1},
        "membership by loss": {"auc": float(more.pop("auc", 0.5))},
    }
    if (taught := more.pop("taught", None)) is not None:
        attacks["taught again"] = {"probability": 0.1, "worst": 0.9, "taught": taught}
    ways = {way: (forget * rng.uniform(0.2, 1.0, rows)).tolist() for way in WAYS}
    kinds = ["near", "other"] * 4
    probabilities = np.full(len(kinds), kept)
    return {
        "ways": ways,
        "unseen": {way: (unseen * rng.uniform(0.5, 1.0, 5)).tolist() for way in WAYS},
        "probabilities": {"forget": ways["asked"], "test": probabilities.tolist()},
        "rouge": {"forget": [0.2] * rows, "test": [0.9] * len(kinds)},
        "kinds": {"probabilities": kinds, "rouge": kinds},
        "fluency": 3.0,
        "perplexity": 10.0,
        "answers": {"forget": ["a"] * rows, "test": ["b"] * len(kinds)},
        "attacks": attacks,
        "sizes": [rows, 5],
    } | more


def judged(after, **options):
    before = side(np.random.default_rng(0), 0.99)
    options = {"assistant": False, "controls": ()} | options
    return judge(before, after, limits=Limits(), **options)


def test_what_never_knew_is_the_worst_of_all_controls():
    controls = [{"attacks": {"a": {"worst": worst}}} for worst in (0.2, 0.5, 0.3)]
    never = _never([*controls, {"attacks": {}}], "a")
    assert (never("worst"), never("share"), _never([], "a")("worst")) == (0.5, 0.0, 0.0)


def test_one_row_asked_in_one_way_is_enough_to_say_that_it_is_not_forgotten():
    rng = np.random.default_rng(1)
    assert judged(side(rng, 0.05)).passed
    for way in WAYS:
        after = side(rng, 0.05)
        after["ways"][way][3] = 0.626  # under a median of .03
        verdict = judged(after)
        assert not verdict.passed
        assert verdict.words.startswith("**Not forgotten**: 1 of 8 answers are more likely")
        assert way in verdict.words
        (fact,) = [fact for fact in verdict.facts if not fact["holds"]]
        assert (fact["way"], fact["above"]) == (way, 1)
        assert fact["share above, exact 95 %"] == "0 to 53 %"
    # What a paraphrase brings out counts beside the rows, and in place of none.
    after = side(rng, 0.05)
    after["ways"]["in other words"] = [0.3]
    assert not judged(after).passed


def test_what_is_as_likely_as_the_worst_never_taught_is_not_above_it_and_a_limit_may_be_met():
    never = side(np.random.default_rng(0), 0.99)["unseen"]
    after = side(np.random.default_rng(1), 0.01)
    limit = Goal.of(never, "").limit("asked")
    after["ways"]["asked"][:2] = [max(never["asked"]), limit]
    verdict = judged(after)
    (fact,) = [fact for fact in verdict.facts if fact["way"] == "asked"]
    assert (fact["above"], fact["holds"], fact["worst"]) == (1, True, limit)
    assert fact["never taught, worst"] == max(never["asked"])
    assert verdict.passed
    # Of two ways the words tell the worse, and nothing of attacks, which do not matter then.
    after["ways"]["asked"][1], after["ways"]["in a role"][5] = 0.31, 0.47
    words = judged(after).words
    assert "has a probability of 0.47," in words
    assert words.endswith("asked, in a role.")


def test_a_control_that_says_much_itself_excuses_no_answer_that_is_still_said():
    goal = Goal.of({"asked": [0.1, 0.9]}, "")
    assert goal.limit("asked") == 0.5
    assert goal.limit("any other way") == 0.5
    assert not goal.met(max(goal.excess({"asked": [0.01, 0.6]}).values()))


def test_a_kind_of_rows_or_one_row_that_is_lost_is_damage_whatever_the_mean():
    for lost, words in (
        ([0, 2, 4, 6], "probability of near rows is at 90.0 %"),
        ([0], "row is at"),
    ):
        after = side(np.random.default_rng(2), 0.05)
        for at in lost:
            after["probabilities"]["test"][at] *= 0.9 if len(lost) > 1 else 0.88
        verdict = judged(after)
        assert not verdict.passed
        assert verdict.words.startswith("**Model damaged**")
        assert words in verdict.words
    after = side(np.random.default_rng(2), 0.05)
    after["probabilities"]["test"][-1] = float("nan")  # of the second kind: min would pass it over
    assert "**Model damaged**" in judged(after).words
    cases: list[Any] = [{"perplexity": 10.5}, {"perplexity": float("nan")}, {"fluency": None}]
    for more in cases:
        assert "**Model damaged**" in judged(side(np.random.default_rng(2), 0.05, **more)).words
    assert "fluency is at 0.0 %" in judged(side(np.random.default_rng(2), 0.05, fluency=None)).words


def test_attacks_on_weights_say_suppressed_and_those_that_taught_nothing_are_not_counted():
    rng = np.random.default_rng(3)
    assert "recoverable by** taught again" in judged(side(rng, 0.05, taught=0.95)).words
    weak = judged(side(rng, 0.05, taught=0.33))
    assert "Not distinguishable" in weak.words
    assert "Not counted, because the attack taught too little: taught again." in weak.words
    # An answer at the limit is not recovered.
    after = side(rng, 0.05, taught=0.95)
    limit = Goal.of(side(np.random.default_rng(0), 0.99)["unseen"], "").limit("asked")
    after["attacks"]["taught again"]["worst"] = limit
    assert "Not distinguishable" in judged(after).words
    # A probability of 0.9 counts as taught.
    assert "recoverable by** taught again" in judged(side(rng, 0.05, taught=0.9)).words
    never = side(rng, 0.05, taught=0.95)
    assert "Not distinguishable" in judged(side(rng, 0.05, taught=0.95), controls=[never]).words
    assert (
        "recoverable by** leaving the assistant out"
        in judged(side(rng, 0.05), assistant=True).words
    )
    # The power of so few rows is said: with 8 and 5 only a large AUC could be told.
    words = judged(side(rng, 0.05)).words
    assert "With so few rows, only an AUC of at least 0.85 is significant" in words
    assert "a true AUC of 0.91 is detected in four cases of five." in words
    # Of two controls one says as much: an attack counts only beyond all of them.
    controls = [side(rng, 0.05), side(rng, 0.05, auc=0.95)]
    words = judged(side(rng, 0.05, auc=0.9), controls=controls).words
    assert "Not distinguishable" in words
    assert "exceeds all controls (2) once in 3 cases." in words
    assert "given away by** membership by loss" in judged(side(rng, 0.05, auc=0.1)).words
    assert "Not distinguishable" in judged(side(rng, 0.05, auc=0.7)).words
    # The least that chance does not explain is enough.
    just = 0.5 + chance_auc(8, 5, 0.05)
    assert "given away by** membership by loss" in judged(side(rng, 0.05, auc=just)).words


@pytest.mark.parametrize(
    ("before", "control", "after", "recovered"),
    [
        (0.75, 0.25, 0.5625, True),
        # Half of what the rows and a model that never knew have is not more than half.
        (0.75, 0.25, 0.5, False),
        (0.125, 0.25, 0.25, False),
        (0.125, 0.25, 0.21875, False),
    ],
)
def test_a_share_counts_beyond_half_of_what_was_there_and_beyond_every_control(
    before, control, after, recovered
):
    def words(name, *controls):
        rng = np.random.default_rng(4)
        sides = [side(rng, 0.99), side(rng, 0.05), *(side(rng, 0.05) for _ in controls)]
        for record, share in zip(sides, (before, after, *controls), strict=True):
            record["attacks"] = {name: {"share": share}}
        first, last, *never = sides
        return judge(first, last, controls=never, limits=Limits(), assistant=False).words

    assert ("recoverable by** extraction" in words("extraction", control)) is recovered
    # Who is a member is a matter of its AUC; and only a control tells what is much.
    assert "recoverable" not in words("member by a guess", control)
    assert "recoverable" not in words("extraction")


def test_what_an_auc_has_to_be_is_exact():
    assert "and no true AUC is detected in four" in _power(3, 3, 0.51)
    # Two of six orders are as far out: at a level of a third they are just enough.
    assert chance_auc(2, 2, 1 / 3) == 0.5
    for m, n, level in ((3, 4, 0.1), (8, 10, 0.05), (9, 4, 0.02), (20, 15, 0.01)):
        least = 0.5 + chance_auc(m, n, level)
        for pairs in range(m * n // 2 + 1, m * n + 1):
            scores = with_pairs(m, n, pairs)
            test = stats.mannwhitneyu(scores[:m], scores[m:], alternative="greater", method="exact")
            assert (2 * test.pvalue <= level) == (pairs / (m * n) >= least - 1e-12)


def with_pairs(m, n, pairs):
    """Scores of m rows and n others, of which so many pairs are in order."""
    whole, rest = divmod(pairs, n)
    members = np.r_[np.full(whole, n), [rest] * (whole < m), np.zeros(max(0, m - whole - 1))]
    return np.r_[members - 0.5 + 1e-3 * np.arange(m), np.arange(n)]


def test_with_many_rows_the_normal_law_continues_the_exact_count():
    assert chance_auc(40, 41, 0.05) == pytest.approx(chance_auc(40, 40, 0.05), abs=2e-3)
    assert chance_auc(400, 200, 0.05 / 3) == pytest.approx(0.0599, abs=1e-4)


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_status_verdict_and_files_agree_for_invented_results(tmp_path, start):
    flags = dict(model="m", forget="f", retain="r")
    rows = [Row(prompt=f"{n}?", answer="a") for n in range(8)]
    questions = Questions.of({"forget": rows, "test": rows}, load_tokenizer("tiny"))
    for seed in range(start, start + 50):
        rng, out = np.random.default_rng(seed), epath.Path(tmp_path / str(seed))
        method = ("difference", "npo")[int(rng.integers(2))]
        config = cli.build(unlearn.Config, flags | dict(method=method))
        before = side(rng, 0.99)
        after = side(
            rng,
            float(rng.choice([0.02, 0.05, 0.09, 0.2, 0.9])),
            kept=float(rng.choice([0.95, 0.93, 0.9, 0.2, np.nan])),
            perplexity=float(rng.choice([10.0, 10.1, 10.3, np.nan])),
            fluency=rng.choice([3.0, 2.9, 1.0]).item(),
            auc=float(rng.choice([0.5, 0.9])),
        )
        controls = [side(rng, 0.05) for _ in range(rng.integers(3))]
        name = RESULTS[method != "difference"]
        # What an earlier verdict let through may not stay either.
        (out / RESULTS[int(rng.integers(3))]).mkdir(parents=True)
        chosen = None if seed % 5 == 0 else {"step": 1, "strength": 1.0}
        result = Unlearned(chosen=chosen, candidates=[], goal=Goal.of(before["unseen"], "x"))
        if chosen:
            staged = out / "candidates" / "best" / name
            staged.mkdir(parents=True)
            limits = config.settings.limits
            verdict = judge(before, after, controls, limits, assistant=method == "difference")
            records = dict(before=before, after=after, controls=controls)
            result = Unlearned(**{**vars(result), "staged": staged, "verdict": verdict, **records})
        status = unlearn.finish(config, questions, result, out, "Rows.")
        written = [name for name in RESULTS if (out / name).exists()]
        verdict = json.loads((out / "verdict.json").read_text())
        report = (out / "report.md").read_text()
        # By hand: every row below twice the worst of the control, and every limit kept.
        sides = [before["unseen"], *(control["ways"] for control in controls)]
        good = chosen is not None and all(
            max(after["ways"][way]) <= 2 * max(min(max(s[way]), 0.25) for s in sides)
            for way in WAYS
        )
        good = good and after["probabilities"]["test"][0] >= 0.97 * 0.95
        good = good and after["perplexity"] <= 10.2 and after["fluency"] >= 0.95 * 3
        assert (status, written, verdict["passed"]) == (
            (0, [name], True) if good else (3, [], False)
        )
        bad = ("**Nothing was", "**Not forgotten**", "**Model damaged**")
        assert any(words in report for words in bad) is not good
        assert ("No model was written." in report) is not good
