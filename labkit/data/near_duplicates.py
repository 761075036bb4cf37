"""Near duplicates by MinHash: how alike two texts are, from a few numbers kept for each.

A text is the set A of its shingles: runs of k neighbouring tokens. The likeness of two is Jaccard's index,
J = |A & B| / |A | B|. For a random hash h the minima agree with exactly that probability,

    P[min h(A) = min h(B)] = J,        so  J ~ the share of P hash functions whose minima agree,  sd <= 1 / (2 sqrt P)

(Broder, "On the resemblance and containment of documents", 1997). Integers only, so a result is exact and the same on
every machine: h_p(x) = the upper half of a_p x + b_p mod 2^64 with odd a_p (Dietzfelbinger's multiply-shift).
"""

import zlib
from collections.abc import Sequence

import numpy as np

from labkit.errors import LabError

BLOCK = 2**21  # hashes held at once: bounds the memory by 16 MB


def words(text: str) -> np.ndarray:
    """One integer for each word between white space: CRC-32, so equal words have equal ids in all runs. [T], uint64."""
    known: dict[str, int] = {}
    ids = [known.setdefault(word, zlib.crc32(word.encode())) for word in text.split()]
    return np.array(ids, np.uint64)


def shingles(token_T: np.ndarray, k: int) -> np.ndarray:
    """The different hashes of all runs of k tokens, sorted. [n], uint64; a text shorter than k is one shingle.

    h = sum_j token_j * c^(k-j) mod 2^64, c odd, then mixed, so that order counts and nearby numbers scatter.
    """
    if k < 1:
        raise LabError(f"Shingles of {k} tokens are none.", "Use k of 1 or more.")
    token_T = np.asarray(token_T, np.uint64)
    runs_NK = np.lib.stride_tricks.sliding_window_view(token_T, min(k, max(1, len(token_T)))) if len(token_T) else \
        np.zeros((1, 0), np.uint64)  # every empty text is the same shingle
    hash_N = np.full(len(runs_NK), runs_NK.shape[1], np.uint64)
    for j in range(runs_NK.shape[1]):
        hash_N = mixed(hash_N * np.uint64(0x9E3779B97F4A7C15) + runs_NK[:, j])
    return np.unique(hash_N)


def mixed(x_N: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection after which every input bit has moved about half of all bits."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def signatures(sets: Sequence[np.ndarray], *, hashes: int = 128, seed: int = 0) -> np.ndarray:
    """The minimum of each hash function over each set: [N, P], uint32. `sets` come from `shingles`, none is empty."""
    if not len(sets):
        return np.zeros((0, hashes), np.uint32)
    drawn_P2 = np.random.default_rng(seed).integers(0, 2**64, (hashes, 2), np.uint64)
    a_P, b_P = drawn_P2[:, 0] | np.uint64(1), drawn_P2[:, 1]
    signature_NP = np.empty((len(sets), hashes), np.uint32)
    first = 0
    while first < len(sets):
        last, size = first, 0
        while last < len(sets) and (last == first or (size + len(sets[last])) * hashes <= BLOCK):
            size += len(sets[last])
            last += 1
        signature_NP[first:last] = minima(sets[first:last], a_P, b_P)
        first = last
    return signature_NP


def minima(sets: Sequence[np.ndarray], a_P: np.ndarray, b_P: np.ndarray) -> np.ndarray:
    """Rows of `signatures` for a block of sets, each one slice of a long list."""
    start_N = np.cumsum([0, *(len(each) for each in sets[:-1])])
    hash_MP = (np.concatenate(sets)[:, None] * a_P + b_P) >> np.uint64(32)
    return np.minimum.reduceat(hash_MP.astype(np.uint32), start_N, axis=0)


def jaccard(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """The exact likeness of two sets of shingles; two empty ones are alike."""
    common = len(np.intersect1d(first_N, second_N, assume_unique=True))
    union = len(first_N) + len(second_N) - common
    return common / union if union else 1.0


def likeness(signature_NP: np.ndarray, one_P: np.ndarray) -> np.ndarray:
    """Estimated Jaccard of each row with one signature: [N]."""
    return (signature_NP == one_P).mean(axis=1)


def keep_first(signature_NP: np.ndarray, threshold: float, *, bands: int | None = None) -> np.ndarray:
    """[N] bool: rows that are kept when each one too much like a kept earlier row (likeness >= threshold) is dropped.

    Without `bands` every row is compared with all kept ones: exact, and quadratic. With it only those are compared that
    agree on a whole band of P / bands hashes: a pair of likeness J meets with probability 1 - (1 - J^(P/bands))^bands.
    """
    N, P = signature_NP.shape
    if not 0 < threshold <= 1 or (bands is not None and (bands < 1 or P % bands)):
        raise LabError(f"threshold={threshold} and bands={bands} don't fit signatures of {P} hashes.",
                       "Use 0 < threshold <= 1, and bands that divide the hashes.")
    kept, buckets = [], {}
    for row in range(N):
        if bands is None:
            rivals = kept
        else:
            keys = list(enumerate(part.tobytes() for part in np.split(signature_NP[row], bands)))
            rivals = sorted({rival for key in keys for rival in buckets.get(key, ())})
        if len(rivals) and (likeness(signature_NP[rivals], signature_NP[row]) >= threshold).any():
            continue
        kept.append(row)
        for key in keys if bands else ():
            buckets.setdefault(key, []).append(row)
    chosen_N = np.zeros(N, bool)
    chosen_N[kept] = True
    return chosen_N

