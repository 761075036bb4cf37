"""MinHash against exact Jaccard, and what is kept."""

import numpy as np
import pytest
from planted import altered

from labkit.data import near_duplicates
from labkit.data.near_duplicates import jaccard, keep_first, likeness, shingles, signatures, words
from labkit.errors import LabError


def test_words_are_the_same_integers_in_every_run():
    """CRC-32 of the word, whatever white space stands between; no text has no words."""
    assert words("ab  c\nab").tolist() == [2659403885, 112844655, 2659403885]
    assert words(" \n").shape == (0,) and words("").dtype == np.uint64


@pytest.mark.parametrize("k", [1, 2, 5])
def test_shingles_are_the_different_runs_of_tokens(k):
    """As many hashes as a set of tuples has members, sorted, on small alphabets where runs repeat."""
    generator = np.random.default_rng(k)
    for length in (1, 2, 5, 6, 40, 300):
        token_T = generator.integers(0, 3, length)
        runs = {tuple(token_T[i : i + k]) for i in range(max(1, length - k + 1))}
        found = shingles(token_T, k)
        assert len(found) == len(runs) and (np.diff(found.astype(object)) > 0).all()


def test_shingles_of_odd_texts():
    """Order counts, an empty text is one shingle that no other text has, and k below 1 is refused."""
    assert jaccard(shingles([1, 2, 3], 2), shingles([3, 2, 1], 2)) == 0.0
    assert jaccard(shingles([], 3), shingles([], 3)) == 1.0
    assert jaccard(shingles([], 3), shingles([0], 3)) == 0.0 == jaccard(shingles([0], 3), shingles([0, 0], 3))
    with pytest.raises(LabError, match="Shingles of 0"):
        shingles([1], 0)


def test_exact_jaccard():
    """Common over all, by Python's sets; two sets without members are alike."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        a, b = (set(generator.integers(0, 30, generator.integers(1, 20)).tolist()) for _ in range(2))
        first_N, second_N = (np.array(sorted(each), np.uint64) for each in (a, b))
        assert jaccard(first_N, second_N) == len(a & b) / len(a | b)
    assert jaccard(np.zeros(0, np.uint64), np.zeros(0, np.uint64)) == 1.0


def pair(common: int, alone: int, generator) -> list[np.ndarray]:
    """Two sets with `common` members in both and `alone` more in each."""
    drawn = np.unique(generator.integers(0, 2**63, common + 2 * alone, np.uint64))
    return [np.sort(drawn[: common + alone]), np.sort(np.concatenate([drawn[:common], drawn[common + alone :]]))]


@pytest.mark.parametrize("common, alone", [(10, 90), (50, 50), (180, 10)])
def test_the_share_of_equal_minima_estimates_jaccard(common, alone):
    """Over 40 pairs with 256 hashes the mean error is within four standard errors, and the spread is the binomial's."""
    generator = np.random.default_rng(common)
    pairs = [pair(common, alone, generator) for _ in range(40)]
    truth = common / (common + 2 * alone)
    assert jaccard(*pairs[0]) == truth
    found = np.array([likeness(signatures(two, hashes=256, seed=i)[:1], signatures(two, hashes=256, seed=i)[1])[0]
                      for i, two in enumerate(pairs)])
    sd = np.sqrt(truth * (1 - truth) / 256)
    assert abs(found.mean() - truth) < 4 * sd / np.sqrt(40)
    assert 0.6 * sd < found.std() < 1.5 * sd


def test_signatures_do_not_depend_on_the_blocks(monkeypatch):
    """Small blocks, one set longer than a block, and no set at all give the same rows as one block."""
    generator = np.random.default_rng(1)
    sets = [np.unique(generator.integers(0, 2**64, size, np.uint64)) for size in (1, 5, 700, 3, 40)]
    whole = signatures(sets, hashes=32)
    monkeypatch.setattr(near_duplicates, "BLOCK", 32 * 10)
    assert np.array_equal(whole, signatures(sets, hashes=32)) and whole.dtype == np.uint32
    drawn_P2 = np.random.default_rng(0).integers(0, 2**64, (32, 2), np.uint64)
    by_hand = [min((int(x) * (int(a) | 1) + int(b)) % 2**64 >> 32 for x in sets[2]) for a, b in drawn_P2]
    assert whole[2].tolist() == by_hand
    assert signatures([], hashes=8).shape == (0, 8)


def chain() -> np.ndarray:
    """Signatures in which row 1 is like row 0, row 2 like row 1 but not like row 0, and row 3 is a copy of row 0."""
    first = np.arange(10, dtype=np.uint32)
    second = np.where(np.arange(10) < 6, first, first + 100).astype(np.uint32)
    third = np.where(np.arange(10) < 4, first + 200, second).astype(np.uint32)
    return np.stack([first, second, third, first])


@pytest.mark.parametrize("bands", [None, 10])
def test_a_row_is_dropped_for_a_kept_one_only(bands):
    """0 keeps 1 away (0.6 alike); 2 is like 1 alone (0.6), which is gone, so it stays; equal to the threshold is too
    much; at 1 only copies go."""
    assert keep_first(chain(), 0.5, bands=bands).tolist() == [True, False, True, False]
    assert keep_first(chain(), 0.6, bands=bands).tolist() == [True, False, True, False]
    assert keep_first(chain(), 0.61, bands=bands).tolist() == [True, True, True, False]
    assert keep_first(chain(), 1.0, bands=bands).tolist() == [True, True, True, False]
    assert keep_first(chain()[:0], 0.5, bands=bands).tolist() == []


def test_bands_find_what_their_curve_says():
    """A pair of likeness J meets with probability 1 - (1 - J^r)^b: with P bands of one hash every pair above 0 does;
    with one band only copies do; between, far pairs are not compared and near ones are."""
    generator = np.random.default_rng(2)
    sets = [each for alone in (2, 3, 400) for _ in range(20) for each in pair(100, alone, generator)]
    signature_NP = signatures(sets, hashes=64)
    exact = keep_first(signature_NP, 0.5)
    assert np.array_equal(exact, keep_first(signature_NP, 0.5, bands=64)) and exact.sum() == 80
    assert np.array_equal(exact, keep_first(signature_NP, 0.5, bands=16))
    assert keep_first(signature_NP, 0.5, bands=1).sum() > 110


@pytest.mark.parametrize("threshold, bands", [(0.0, None), (1.5, None), (0.5, 0), (0.5, 3)])
def test_settings_that_fit_nothing_are_refused(threshold, bands):
    """One sentence."""
    with pytest.raises(LabError, match="don't fit signatures of 10 hashes"):
        keep_first(chain(), threshold, bands=bands)


FAULTS = {
    "order does not count": ("shingles", "mixed(hash_N * np.uint64(0x9E3779B97F4A7C15) + runs_NK[:, j])",
                             "hash_N + mixed(runs_NK[:, j])", test_shingles_of_odd_texts),
    "one token less": ("shingles", "min(k, max(1, len(token_T)))", "min(max(1, k - 1), max(1, len(token_T)))",
                       lambda: test_shingles_are_the_different_runs_of_tokens(5)),
    "union counts twice": ("jaccard", " - common", "", test_exact_jaccard),
    "a block's end": ("minima", "sets[:-1]", "sets[1:]", None),
    "even multipliers": ("signatures", "| np.uint64(1)", "& np.uint64(2**64 - 2)", None),
    "lower half": ("minima", ">> np.uint64(32)", "& np.uint64(2**32 - 1)", None),
    "the first only": ("minima", "np.minimum.reduceat(hash_MP.astype(np.uint32), start_N, axis=0)",
                       "hash_MP.astype(np.uint32)[start_N]", None),
    "dropped rows drop": ("keep_first", "            continue\n        kept.append(row)",
                          "            kept = kept + [row]\n            continue\n        kept.append(row)",
                          lambda: test_a_row_is_dropped_for_a_kept_one_only(None)),
    "above for from": ("keep_first", ">= threshold).any()", "> threshold).any()",
                       lambda: test_a_row_is_dropped_for_a_kept_one_only(None)),
    "one band only": ("keep_first", "np.split(signature_NP[row], bands)))",
                      "np.split(signature_NP[row], bands)[:1]))", test_bands_find_what_their_curve_says),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    """One altered line each, and a test above fails."""
    name, old, new, check = FAULTS[fault]
    faulty = altered(getattr(near_duplicates, name), name, old, new, vars(near_duplicates).copy())
    monkeypatch.setattr(near_duplicates, name, faulty)
    monkeypatch.setitem(globals(), name, faulty)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        check() if check else test_signatures_do_not_depend_on_the_blocks(monkeypatch)
