"""Intervals over seeds: right coverage, exact pairing, and no number where there is none.

Coverage is proved by simulation: data are drawn from a normal distribution of known mean, and a 95% interval has to
hold that mean in 93% to 97% of the draws. The same simulation is given an interval that is known to be wrong (normal
quantiles at five seeds, which cover 88%) and has to refuse it, so it can tell the two apart.
"""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from labkit.errors import LabError
from labkit.measure import interval
from labkit.measure.intervals import _weights_RN, bootstrap, student, student_quantile

values = st.floats(-1e6, 1e6, allow_subnormal=False)


def coverage(method, seeds: int, draws: int) -> float:
    """Share of the draws of `seeds` normal values of mean 3 whose interval holds 3."""
    values_RN = np.random.default_rng(1).normal(3.0, 2.0, size=(draws, seeds))
    bounds_R2 = np.array([method(values_N) for values_N in values_RN])
    return float(((bounds_R2[:, 0] <= 3.0) & (3.0 <= bounds_R2[:, 1])).mean())


def public(values_N: np.ndarray) -> tuple[float, float]:
    return interval(values_N)[1:]


def normal_quantiles(values_N: np.ndarray) -> tuple[float, float]:
    """The wrong interval: 1.96 standard errors, as if the spread were known."""
    half = statistics.NormalDist().inv_cdf(0.975) * values_N.std(ddof=1) / math.sqrt(len(values_N))
    return values_N.mean() - half, values_N.mean() + half


@pytest.mark.parametrize(("seeds", "draws"), [(5, 10_000), (30, 2000)])
def test_coverage_is_ninety_five_percent(seeds, draws):
    assert 0.93 < coverage(public, seeds, draws) < 0.97


def test_the_simulation_refuses_a_wrong_interval():
    assert coverage(normal_quantiles, 5, 10_000) < 0.93


@pytest.mark.parametrize("seeds", [20, 50])
def test_the_bootstrap_is_as_wide_as_student_on_normal_data(seeds):
    """Why the tail is expanded: the plain percentile interval of 20 normal values is 9% too narrow."""
    values_N = stats.norm.ppf((np.arange(seeds) + 0.5) / seeds)
    widths = [high - low for low, high in (bootstrap(values_N, 0.95), student(values_N, 0.95))]
    assert widths[0] == pytest.approx(widths[1], rel=0.015)


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 19, 29, 200])
def test_student_quantile_agrees_with_scipy(freedom):
    for probability in (0.005, 0.025, 0.2, 0.5, 0.75, 0.95, 0.975, 0.9995):
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-10)


def test_below_twenty_seeds_it_is_the_paired_t_interval_of_scipy():
    generator = np.random.default_rng(3)
    ours_N, baseline_N = generator.normal(size=(2, 7))
    expected = stats.ttest_rel(ours_N, baseline_N).confidence_interval(0.9)
    estimate, low, high = interval(ours_N, baseline_N, level=0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-10)
    assert estimate == pytest.approx((ours_N - baseline_N).mean())


def test_twenty_seeds_are_the_border_to_the_bootstrap():
    values_N = np.random.default_rng(4).exponential(size=20)
    assert interval(values_N[:19])[1:] == pytest.approx(student(values_N[:19], 0.95))
    assert interval(values_N)[1:] == pytest.approx(bootstrap(values_N, 0.95))
    assert interval(values_N)[1:] != pytest.approx(student(values_N, 0.95))


def test_the_same_values_give_the_same_interval_in_every_process():
    values_N = np.random.default_rng(4).exponential(size=25)
    first = interval(values_N)
    _weights_RN.cache_clear()  # what a new process starts with
    assert interval(values_N) == first


def test_pairing_is_by_seed_and_not_by_order():
    """Each difference is exactly 1, so any wrong pairing shows as a spread."""
    ours, baseline = {3: 11.0, 1: 2.0, 2: 5.0}, {1: 1.0, 2: 4.0, 3: 10.0}
    assert interval(ours, baseline) == (1.0, 1.0, 1.0)
    assert interval([2.0, 5.0], [1.0, 4.0]) == (1.0, 1.0, 1.0)


def test_pairing_removes_what_the_seed_does_to_both():
    seeds = np.random.default_rng(5).normal(scale=100.0, size=6)
    baseline = dict(enumerate(seeds))
    ours = {seed: value - 1.0 + 0.01 * seed for seed, value in baseline.items()}
    assert interval(ours, baseline)[2] < -0.9


def test_ratio_is_geometric_and_turns_round_exactly():
    ours, baseline = {0: 2.0, 1: 8.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    estimate, low, high = interval(ours, baseline, compare="ratio")
    assert estimate == pytest.approx(8 ** (1 / 3))
    back = interval(baseline, ours, compare="ratio")
    assert back == pytest.approx((1 / estimate, 1 / high, 1 / low))


def test_one_seed_has_no_bounds():
    assert interval({7: 1.5}, {7: 1.0}) == (0.5, -math.inf, math.inf)
    assert interval([3.0], [1.0], compare="ratio") == (pytest.approx(3.0), 0.0, math.inf)


@given(st.lists(values, min_size=1, max_size=40), st.data())
def test_bounds_enclose_the_estimate_and_are_never_nan(ours, data):
    baseline = data.draw(st.lists(values, min_size=len(ours), max_size=len(ours)))
    estimate, low, high = interval(ours, baseline)
    assert low <= estimate <= high
    assert math.isclose(estimate, statistics.fmean(a - b for a, b in zip(ours, baseline, strict=True)), abs_tol=1e-6)


@given(values, st.integers(2, 40))
def test_equal_values_have_an_interval_of_no_width(value, seeds):
    assert interval([value] * seeds) == (value, value, value)


def test_values_of_any_size_do_not_overflow():
    assert interval([1e300, 3e300, 2e300])[0] == pytest.approx(2e300)
    low, high = interval([1e-300, 3e-300, 2e-300])[1:]
    assert low < 1e-300 and 3e-300 < high < 1e-299


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: interval({1: 1.0, 2: 1.0}, {2: 1.0, 3: 1.0}), "partner in the other arm: 1, 3"),
        (lambda: interval([1.0, 2.0], [1.0]), "2 and 1 values"),
        (lambda: interval({1: 1.0}, [1.0]), "by seed and the other"),
        (lambda: interval({4: math.nan, 5: 1.0}), "seed 4 is not finite"),
        (lambda: interval([1.0, math.inf]), "seed 1 is not finite"),
        (lambda: interval([1.5e308], [-1.5e308]), "not finite"),
        (lambda: interval([]), "no values"),
        (lambda: interval(["much"]), "not a number"),
        (lambda: interval([1.0, 0.0], [1.0, 1.0], compare="ratio"), "above zero"),
        (lambda: interval([1.0], compare="ratio"), "two arms"),
        (lambda: interval([1.0], compare="quotient"), "quotient"),
        (lambda: interval([1.0], level=95), "95"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(LabError, match=said):
        call()
