"""A width is an interval with a reason, or it is refused: what each kind of rows has to get."""

import jax.numpy as jnp
import numpy as np
import pytest

from logitjax.leakage import align_head, estimate_output_subspace
from logitjax.leakage._gram import Table, spectrum
from logitjax.leakage._residual import residual
from logitjax.leakage._spectrum import clip_spectrum, fit_white_noise, max_gap_dimension, noise_edge
from tests.leakage._models import head_and_states, log_softmax
from tests.leakage.apis import NOISES, ROWS, draw, violates

VOCAB, WIDTH = 600, 16


def _rows(count, *, width=WIDTH, noise=0.0, seed=0, **options):
    head, states = head_and_states(VOCAB, width, count, seed=seed, **options)
    rows = log_softmax(states @ head.T)
    rows += noise * np.random.default_rng(seed + 1).standard_normal(rows.shape)
    return rows.astype(np.float32)


def _interval(rows, **options):
    width = estimate_output_subspace(rows, **options).width
    return width.lower, width.estimate, width.upper


@pytest.mark.parametrize(("width", "rows_each"), [(16, 1.1), (16, 22), (37, 21), (16, 60)])
def test_exact_rows_are_certain_however_many_they_are(width, rows_each):
    subspace = estimate_output_subspace(_rows(int(np.ceil(width * rows_each)), width=width))
    assert subspace.width.certain
    assert subspace.width.estimate == subspace.dimension == width
    assert str(subspace.width) == str(width)


def test_fewer_rows_than_the_width_give_a_lower_bound_only():
    width = estimate_output_subspace(_rows(12)).width
    assert width.estimate is None
    assert width.upper is None
    assert 1 <= width.lower <= 12
    assert "no white noise explains" in width.reason
    # A noise that was named too small makes no directions of the rest of it.
    for named in (0.0, 0.1, 0.3):
        lower, estimate, upper = _interval(_rows(12, noise=0.3), noise=named)
        assert lower <= 12
        assert estimate is upper is None


def test_rows_that_were_asked_for_twice_count_once():
    rows = _rows(12)
    twice = np.concatenate([rows, rows])
    width = estimate_output_subspace(twice).width
    assert width.lower <= 12
    assert width.estimate is None
    assert "12 rows repeat others" in width.reason
    # Fresh noise on each answer makes them differ, but not by more than it.
    jitter = np.random.default_rng(0).standard_normal((60, VOCAB))
    for sigma in (1e-6, 3e-5, 2e-2):
        again = (np.repeat(rows, 5, axis=0) + sigma * jitter).astype(np.float32)
        width = estimate_output_subspace(again).width
        assert width.lower <= 12
        assert width.upper is None
        assert "few rows differ" in width.reason or "repeat others" in width.reason


@pytest.mark.parametrize("named", [None, 0.3, 0.27, 0.21, 0.39])
def test_the_noise_is_fitted_and_a_wrong_one_is_found_out(named):
    width = estimate_output_subspace(_rows(48, noise=0.3), noise=named).width
    assert (width.lower, width.estimate, width.upper) == (WIDTH, WIDTH, WIDTH)
    assert width.noise == pytest.approx(0.3, rel=0.02)
    assert ("not the" in width.reason) == (named in (0.21, 0.39))
    # Under noise weaker directions could hide, and that is said with their size.
    assert not width.certain
    assert str(width) == "16 seen"
    assert 0.3 * (48 * VOCAB) ** 0.25 < width.floor < 2 * 0.3 * (48**0.5 + VOCAB**0.5)


def test_pure_noise_has_no_width():
    rng = np.random.default_rng(0)
    refused = 0
    for seed in range(20):
        rows = rng.standard_normal((60 + seed, 500)).astype(np.float32)
        width = estimate_output_subspace(rows, centre=False).width
        refused += width.estimate is None and width.lower == 0 and width.upper is None
    assert refused >= 19
    assert width.reason == f"only white noise of {width.noise:.3g} is seen"
    assert str(width) == "not known"
    for nothing in (np.zeros((5, 40)), np.full((5, 40), -3.7)):
        width = estimate_output_subspace(nothing.astype(np.float32)).width
        assert width.reason == "only rounding is seen"
    assert estimate_output_subspace(_rows(1)).width.lower <= 1


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_tokens_without_a_value_are_left_out(value):
    rows = _rows(40)
    head, _ = head_and_states(VOCAB, WIDTH, 40)
    rows[3, 7] = rows[:, 11] = value
    subspace = estimate_output_subspace(rows)
    assert subspace.width.certain
    assert subspace.width.estimate == WIDTH
    assert np.flatnonzero(~subspace.vocab_where).tolist() == [7, 11]
    where = subspace.vocab_where
    assert align_head(np.asarray(subspace.basis)[where], head[where]).leak > 0.999
    tokens = subspace.choose_tokens(2 * WIDTH)
    whole = subspace.complete(tokens, rows[:2, tokens])
    assert np.isnan(whole[:, [7, 11]]).all()
    np.testing.assert_allclose(whole[:, where], rows[:2, where], atol=1e-3)
    with pytest.raises(ValueError, match="tokens: expected tokens of the basis"):
        subspace.complete(np.array([7, *tokens]), rows[:2, [7, *tokens]])
    rows[0, 200:] = value
    with pytest.raises(ValueError, match="expected finite values in most tokens, got 402 of 600"):
        estimate_output_subspace(rows)


def test_an_offset_that_all_rows_share_is_said():
    head, states = head_and_states(VOCAB, WIDTH, 60)
    bias = np.random.default_rng(3).standard_normal(VOCAB)
    for noise in (0.0, 0.2):
        rows = states @ head.T + bias
        rows += noise * np.random.default_rng(4).standard_normal(rows.shape)
        width = estimate_output_subspace(rows.astype(np.float32), centre=False).width
        assert (width.lower, width.estimate, width.upper) == (WIDTH, WIDTH + 1, WIDTH + 1)
        assert "17 is the width behind a LayerNorm, 16 with a bias on the output" in width.reason
        assert not width.certain
    # A mean that states share is no offset: it lies among the head's own directions.
    moved = (states + 3 * states.std()) @ head.T
    assert _interval(moved.astype(np.float32), centre=False) == (WIDTH, WIDTH, WIDTH)


def test_noise_that_is_not_white_is_scaled_until_it_is():
    head, states = head_and_states(VOCAB, WIDTH, 80)
    rows = (states @ head.T).astype(np.float32)
    rng = np.random.default_rng(5)
    rounded = np.asarray(jnp.asarray(rows, jnp.bfloat16), np.float32)
    uneven = rows + 0.1 * np.exp(rng.standard_normal(VOCAB)) * rng.standard_normal(rows.shape)
    loud = rows + 0.1 * np.exp(rng.standard_normal((80, 1))) * rng.standard_normal(rows.shape)
    for noisy in (rounded, uneven, loud):
        width = estimate_output_subspace(noisy.astype(np.float32), centre=False).width
        assert (width.lower, width.estimate, width.upper) == (WIDTH, WIDTH, WIDTH)
        assert not width.certain
    # Rows that say they have 16 bits explain their own rounding.
    half = estimate_output_subspace(jnp.asarray(rows, jnp.bfloat16), centre=False)
    assert half.width.estimate == WIDTH


@pytest.mark.parametrize("noise", NOISES)
def test_an_interval_holds_the_width_whatever_the_api_does_to_rows(noise):
    rng = np.random.default_rng(1)
    for kind in ROWS:
        # Next to float32's own rounding, where noise was taken for directions.
        case = draw((noise, kind), rng, 3e-5)
        width = estimate_output_subspace(case.rows, noise=case.named).width
        assert not violates(case, width), f"{case.about}: {width}, {width.reason}"


def test_rows_rounded_so_coarsely_that_they_share_cells_count_once():
    rng = np.random.default_rng(0)
    shared = 9 * rng.standard_normal(VOCAB)
    rows = shared + 0.3 * rng.standard_normal((60, WIDTH)) @ rng.standard_normal((WIDTH, VOCAB)) / 4
    width = estimate_output_subspace(rows.round().astype(np.float32)).width
    assert width.lower <= WIDTH
    assert width.upper is None
    assert "rows repeat others" in width.reason


def test_rows_that_are_cut_off_are_no_images_of_hidden_states():
    rows = _rows(60)
    floored = np.maximum(rows, np.quantile(rows, 0.3))
    kept = np.sort(rows, axis=1)[:, -20:-19]
    for cut in (floored, np.where(rows < kept, kept, rows)):
        width = estimate_output_subspace(cut).width
        assert (width.lower, width.estimate, width.upper) == (0, None, None)
        assert "cut off, or were filled in" in width.reason


def test_a_named_noise_that_the_rows_confirm_makes_few_of_them_enough():
    rows = _rows(80, width=64, noise=0.1)
    assert estimate_output_subspace(rows, noise=0.1).width.estimate == 64
    for named in (None, 0.07):
        width = estimate_output_subspace(rows, noise=named).width
        assert width.estimate is None
        assert width.lower <= 64
        assert width.reason == "fewer than 1.7 rows for each direction"


def test_rounding_is_noise_of_a_known_size():
    width = estimate_output_subspace(_rows(48).round(2), decimals=2).width
    assert width.estimate == width.upper == WIDTH
    assert width.noise == pytest.approx(0.01 / 12**0.5, rel=0.02)


def test_an_uneven_spectrum_under_noise_stays_open():
    head, states = head_and_states(1200, 40, 200, anisotropy=5.0)
    states[:, 0] *= 60  # A direction that all prompts share, as in real models.
    rows = states @ head.T
    rows += 0.3 * np.random.default_rng(0).standard_normal(rows.shape)
    subspace = estimate_output_subspace(rows.astype(np.float32), centre=False)
    assert subspace.max_gap == 1
    assert 28 <= subspace.width.lower <= 40
    assert subspace.width.upper is None


def test_hand_worked_spectra():
    assert max_gap_dimension(np.array([100.0, 10.0, 9.0, 8.0, 1.0, 0.9])) == 1
    # Gaps between exact zeros are no gaps.
    assert max_gap_dimension(np.array([3.0, 2.0, 0.0, 0.0])) == 2
    assert clip_spectrum(np.array([1.0, 0.0], np.float32))[1] == pytest.approx(
        2 * np.finfo(np.float32).eps
    )
    # a = 3, b = 4: 49 + 2.02 * 7 * (7 / 12)^(1/3).
    assert noise_edge(2.0, 10, 16) == pytest.approx(
        2 * (49 + 2.02 * 7 * (7 / 12) ** (1 / 3)) ** 0.5
    )


def test_one_noise_in_a_hundred_passes_its_edge_and_signal_is_counted():
    rng = np.random.default_rng(1)
    tops = [np.linalg.svd(rng.standard_normal((30, 200)), compute_uv=False)[0] for _ in range(300)]
    assert np.mean(tops > noise_edge(1.0, 30, 200)) < 0.04
    assert max(tops) < 1.1 * noise_edge(1.0, 30, 200)
    noise = fit_white_noise(np.array([90.0, 60.0, *np.linspace(18.0, 10.0, 28)]), 30, 200)
    assert noise.above == 2
    # A spectrum that falls all the way has no noise among it.
    assert fit_white_noise(np.geomspace(100.0, 0.1, 30), 30, 200) is None


def test_noise_is_even_only_if_tokens_are_alike_and_rows_are():
    noise = np.random.default_rng(6).standard_normal((80, 400))

    def even(rows):
        table = Table.of(rows, centre=False)
        return residual(table, spectrum(table), 1).even

    assert even(noise)
    assert not even(noise * np.where(np.arange(400) % 2, 1.0, 1.5))
    assert not even(noise * np.where(np.arange(80) % 2, 1.0, 1.5)[:, None])


def test_what_is_nothing_but_zero_behind_a_signal_is_noise_of_size_zero():
    noise = fit_white_noise(np.r_[5.0, np.zeros(39)], 40, 500)
    assert noise is not None
    assert (noise.above, noise.sigma) == (1, 0.0)


def test_too_few_rows_for_a_fit_of_noise_are_refused():
    head, states = head_and_states(VOCAB, WIDTH, 24)
    rows = states @ head.T + 0.05 * np.random.default_rng(0).standard_normal((24, VOCAB))
    width = estimate_output_subspace(rows.astype(np.float32), centre=False).width
    assert width.estimate is None
    assert width.reason == "fewer than 1.7 rows for each direction"


def test_a_fine_spectrum_has_all_values_also_below_what_squares_can_tell():
    rng = np.random.default_rng(0)
    (left, _), (right, _) = (np.linalg.qr(rng.normal(size=(n, 6))) for n in (6, 40))
    values = 10.0 ** -np.arange(0, 12, 2)
    table = Table.of(left * values @ right.T, centre=False)
    fine = spectrum(table, fine=True)
    np.testing.assert_allclose(fine.values, values, rtol=1e-3)
    np.testing.assert_allclose(abs(fine.left.T @ left), np.eye(6), atol=1e-3)
