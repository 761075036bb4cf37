"""Confidence intervals over seeds: the only way a number of this course gets its error bar.

Two arms trained from the same seeds are compared seed by seed, so that what a seed does to both cancels:
    d_n = ours_n - baseline_n,   estimate = mean(d)
Fewer than 20 seeds:  mean(d) +- t * std(d) / sqrt(N), t = Student's quantile at N - 1 degrees of freedom.
From 20 seeds on:     the bootstrap percentile interval, with the tail widened as Hesterberg proposes ("What Teachers
    Should Know About the Bootstrap", 2015, section 5.3). The plain percentile interval is too narrow by about
    sqrt(N / (N - 1)) and by normal-instead-of-Student tails; BCa mends skewness but not that, and at 20 to 50 seeds
    narrowness is the larger error. The resampling uses a fixed seed: the same values give the same interval.
A ratio is compared on the log scale: the estimate is the geometric mean of the paired ratios, and so
interval(a, b) and interval(b, a) are exact reciprocals, which a mean of ratios is not.
Needs numpy only. Student's quantile is our own short routine, held against scipy in tests/test_intervals.py.
"""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from labkit.errors import LabError

BOOTSTRAP_FROM = 20
RESAMPLES = 10_000
BLOCK = 2**20  # weights held at once: bounds the memory of a bootstrap over many values

Seeded = Mapping[object, float] | Sequence[float]


def interval(
    ours: Seeded, baseline: Seeded | None = None, *, compare: str = "difference", level: float = 0.95
) -> tuple[float, float, float]:
    """(estimate, low, high) of `ours`, of `ours - baseline` or of `ours / baseline`, over N seeds.

    ours, baseline: mappings seed -> value (paired by seed) or sequences (paired by position).
    compare: "difference" (mean of the paired differences) or "ratio" (geometric mean of the paired ratios).
    One seed has no spread to learn from: low = -inf and high = inf (a ratio's low is 0).
    Raises LabError for unpaired seeds, empty or non-finite input, and a ratio of values that are not all positive.
    """
    if compare not in ("difference", "ratio"):
        raise LabError(f"compare={compare!r} is not a comparison.", 'Use compare="difference" or compare="ratio".')
    if not 0.0 < level < 1.0:
        raise LabError(f"A confidence level of {level} is not between 0 and 1.", "Use level=0.95, for example.")
    ours_N, baseline_N = _paired(ours, baseline)
    if compare == "difference":
        with np.errstate(over="ignore"):  # a difference beyond the largest float is refused by name, not warned about
            return _mean_interval(ours_N if baseline_N is None else _finite(ours_N - baseline_N), level)
    if baseline_N is None:
        raise LabError("A ratio needs two arms, and only one was given.", "Pass `baseline` too.")
    if min(ours_N.min(), baseline_N.min()) <= 0.0:
        raise LabError(
            "A ratio needs values above zero: on the log scale zero and negative values have no place.",
            'Use compare="difference", or a metric that is positive.',
        )
    with np.errstate(over="ignore"):  # beyond the largest float a bound is infinite, which is what exp returns
        estimate, low, high = np.exp(_mean_interval(np.log(ours_N) - np.log(baseline_N), level))
    return float(estimate), float(low), float(high)


def _paired(ours: Seeded, baseline: Seeded | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The two arms as arrays in the same order of seeds."""
    if baseline is None:
        return _finite(ours), None
    if isinstance(ours, Mapping) != isinstance(baseline, Mapping):
        raise LabError(
            "One arm comes by seed and the other as a plain sequence, so they can't be paired.",
            "Give both as {seed: value}.",
        )
    if isinstance(ours, Mapping):
        alone = [str(seed) for seed in [*ours, *baseline] if (seed in ours) != (seed in baseline)]
        if alone:
            raise LabError(
                f"Seeds without a partner in the other arm: {', '.join(alone)}.",
                "Run both arms with the same seeds, or pass only those that both have.",
            )
        baseline = {seed: baseline[seed] for seed in ours}
    elif len(ours) != len(baseline):
        raise LabError(
            f"The arms have {len(ours)} and {len(baseline)} values and can't be paired.",
            "Give one value a seed in both.",
        )
    return _finite(ours), _finite(baseline)


def _finite(values: Seeded | np.ndarray) -> np.ndarray:
    """Values as a float64 array [N], N >= 1, all finite."""
    seeds = list(values) if isinstance(values, Mapping) else range(len(values))
    try:
        array_N = np.array([float(values[seed]) for seed in seeds], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LabError(f"A value over seeds is not a number ({error}).", "Record one number a seed.") from error
    if not len(array_N):
        raise LabError("There are no values to make an interval from.", "Record at least one seed.")
    bad = [str(seed) for seed, value in zip(seeds, array_N, strict=True) if not math.isfinite(value)]
    if bad:
        raise LabError(
            f"The value of seed {', '.join(bad)} is not finite.", "Find out why that run diverged before comparing it."
        )
    return array_N


def _mean_interval(values_N: np.ndarray, level: float) -> tuple[float, float, float]:
    """Mean of the values with its interval; the values are scaled to at most 1, so no square overflows."""
    scale = float(np.abs(values_N).max()) or 1.0
    unit_N = values_N / scale
    estimate = float(unit_N.mean())
    if len(unit_N) == 1:
        return estimate * scale, -math.inf, math.inf
    if unit_N.min() == unit_N.max():  # a rounded mean would invent a spread of one unit in the last place
        return (float(values_N[0]),) * 3
    low, high = (student if len(unit_N) < BOOTSTRAP_FROM else bootstrap)(unit_N, level)
    # Rounding can put the mean of nearly equal values outside their interval by one unit in the last place.
    return estimate * scale, min(low, estimate) * scale, max(high, estimate) * scale


def student(values_N: np.ndarray, level: float) -> tuple[float, float]:
    """Student's t interval of the mean; right for normal data at any N >= 2."""
    count = len(values_N)
    half = student_quantile(0.5 + level / 2, count - 1) * float(values_N.std(ddof=1)) / math.sqrt(count)
    return float(values_N.mean()) - half, float(values_N.mean()) + half


def bootstrap(values_N: np.ndarray, level: float) -> tuple[float, float]:
    """Expanded percentile interval of the mean: each tail is Phi(-t * sqrt(N / (N - 1))) instead of (1 - level) / 2."""
    count = len(values_N)
    expanded = student_quantile(0.5 + level / 2, count - 1) * math.sqrt(count / (count - 1))
    tail = statistics.NormalDist().cdf(-expanded)
    low, high = np.quantile(_resampled_means(values_N), [tail, 1.0 - tail])
    return float(low), float(high)


def _resampled_means(values_N: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES samples of N values drawn with replacement, always the same draws for the same N."""
    count = len(values_N)
    rows = min(RESAMPLES, max(1, BLOCK // count))
    blocks = range(math.ceil(RESAMPLES / rows))
    return np.concatenate([_weights_RN(block, rows, count) @ values_N for block in blocks])[:RESAMPLES]


@functools.lru_cache(maxsize=4)  # drawing costs ten times the product, and an analysis has the same N again and again
def _weights_RN(block: int, rows: int, count: int) -> np.ndarray:
    """How often each of `count` values is drawn in each of `rows` samples, divided by `count`; `block` is the seed."""
    return np.random.default_rng(block).multinomial(count, np.full(count, 1.0 / count), size=rows) / count


@functools.lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability for Student's T; by bisection on P(|T| > t) = I_x(freedom / 2, 1 / 2)."""
    if probability <= 0.5:
        return -student_quantile(1.0 - probability, freedom) if probability < 0.5 else 0.0
    tail = 2.0 * (1.0 - probability)
    low, high = 0.0, 1.0
    while _two_tails(high, freedom) > tail:
        low, high = high, 2.0 * high
    while (middle := 0.5 * (low + high)) not in (low, high):  # until no float lies between the two
        low, high = (middle, high) if _two_tails(middle, freedom) > tail else (low, middle)
    return high


def _two_tails(t: float, freedom: int) -> float:
    """P(|T| > t) = I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t^2), t > 0."""
    a, b = 0.5 * freedom, 0.5
    x, rest = freedom / (freedom + t * t), t * t / (freedom + t * t)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    if x < (a + 1) / (a + b + 2):  # the continued fraction converges fast on this side, its mirror on the other
        return math.exp(logarithm) * _continued_fraction(x, a, b) / a
    return 1.0 - math.exp(logarithm) * _continued_fraction(rest, b, a) / b


def _continued_fraction(x: float, a: float, b: float) -> float:
    """The fraction of the incomplete beta function (DLMF 8.17.22) by Lentz's method."""
    tiny = 1e-300
    numerator, denominator = 1.0, 1.0 / ((1.0 - (a + b) * x / (a + 1.0)) or tiny)
    value = denominator
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            denominator = 1.0 / ((1.0 + coefficient * denominator) or tiny)
            numerator = (1.0 + coefficient / numerator) or tiny
            value *= numerator * denominator
        if abs(numerator * denominator - 1.0) < 1e-16:
            break
    return value
