"""How many tokens are drafted, by measured costs and acceptance."""

import numpy as np

from logitjax.decoding import DraftControl


def simulated(control, acceptance, costs, tokens):
    """Seconds over plain steps' seconds for so many tokens, by the control's choices."""
    rng, seconds, done = np.random.default_rng(0), 0.0, 0
    while done < tokens:
        length = control.choose()
        if length == 0:
            control.record(0, seconds=6 * costs[0], rounds=6)
            seconds, done = seconds + 6 * costs[0], done + 6
            continue
        rejected = np.flatnonzero(rng.random(length) > acceptance)
        accepted = int(rejected[0]) if len(rejected) else length
        tested = min(accepted + 1, length)
        spent = costs[length] * rng.normal(1, 0.03)
        control.record(length, seconds=spent, tokens=accepted + 1, tested=tested, accepted=accepted)
        seconds, done = seconds + spent, done + accepted + 1
    return seconds / (done * costs[0])


def test_the_draft_length_follows_what_pays():
    costs = {0: 1.0, 2: 1.4, 5: 2.0}
    assert simulated(DraftControl(), 0.0, costs, 256) < 1 / 0.97
    assert simulated(DraftControl(), 0.9, costs, 256) < 0.55
    # Where verification is dear, good drafts do not pay either.
    assert simulated(DraftControl(), 0.6, {0: 1.0, 2: 2.2, 5: 4.5}, 256) < 1 / 0.97
    # What changes is noticed.
    control = DraftControl()
    simulated(control, 0.0, costs, 512)
    assert control.choose() == 0
    simulated(control, 0.95, costs, 2048)
    assert control.choose() == 5
    assert control.predicted(5) > 2
    assert simulated(control, 0.0, costs, 2048) < 1 / 0.97
    # What loses again and again is tried less and less.
    assert simulated(control, 0.0, costs, 8192) < 1 / 0.996


def test_a_loss_is_borne_up_to_its_share_of_the_time():
    control = DraftControl(lengths=(2,))
    for length in (0, 2):
        control.record(length, seconds=0.0)  # compiles
    control.record(0, seconds=1.0)
    # One token in three steps' time: two are lost, which is more than a hundredth of four.
    control.record(2, seconds=3.0, tokens=1, tested=2, accepted=0)
    assert control.choose() == 0
    control.record(0, seconds=196.0, rounds=196)
    assert control.choose() == 0
    control.record(0, seconds=1.0)
    assert control.choose() == 2


def test_looking_may_cost_a_hundredth_by_default():
    control = DraftControl(lengths=(2,))
    for length, seconds, rounds in ((0, 0, 1), (2, 0, 1), (0, 300, 300), (2, 3, 1)):
        control.record(length, seconds=seconds, rounds=rounds, tokens=1)
    assert control.choose() == 2


def test_a_draft_that_only_breaks_even_is_not_made():
    control = DraftControl(lengths=(1,))
    for length in (0, 1):
        control.record(length, seconds=0.0)  # compiles
    control.record(0, seconds=1.0)
    # Half of the drafts are taken to be accepted: one and a half tokens in as many steps' time.
    control.record(1, seconds=1.5, tokens=1)
    assert control.predicted(1) == 1.0
    assert control.choose() == 0
