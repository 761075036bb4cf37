"""How many of a batch say nearly the same: the share of each text's cluster.

    BLEU(a, b)  geometric mean of the clipped n-gram precisions, n = 1 to 4, times exp(1 - |a| / |b|) where b is shorter
    distance    1 - BLEU;  clusters by average linkage, merged while nearer than 0.5
    share(i)    size of i's cluster / number of texts

A precision of 0 counts as 0.1 / (number of n-grams, or 1): smoothing method 1. No common word at all is BLEU 0. So a
text of three words has BLEU 0.56 with itself, since it has no 4-gram.
Sources: Papineni et al. (2002); Chen and Cherry (2014) for the smoothing; the use as a penalty, R-Zero, arXiv
2508.05004, and G-Zero, 2605.09959.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from labkit.errors import LabError

ORDERS = (1, 2, 3, 4)
SMALLEST = 0.1  # what stands for 0 matches

Words = Sequence[Hashable]


def ngrams(words: Words) -> list[Counter]:
    """How often each run of 1, 2, 3 and 4 words occurs."""
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in ORDERS]


def sentence_bleu(reference: Words, text: Words) -> float:
    """BLEU of one text against one reference, from 0 to 1."""
    return _bleu(len(reference), ngrams(reference), len(text), ngrams(text))


def _bleu(reference_length: int, reference: list[Counter], length: int, text: list[Counter]) -> float:
    matches = [sum((counted & known).values()) for counted, known in zip(text, reference, strict=True)]
    if not matches[0]:
        return 0.0
    totals = [max(1, sum(counted.values())) for counted in text]
    logarithm = sum(math.log((match or SMALLEST) / total) for match, total in zip(matches, totals, strict=True))
    brevity = min(0.0, 1 - reference_length / length)
    return math.exp(logarithm / len(ORDERS) + brevity)


def bleu_distances(texts: Sequence[Words]) -> np.ndarray:
    """1 - BLEU of each text (column) against each earlier one (row), mirrored: [N, N] with 0 in the diagonal."""
    counts = [ngrams(words) for words in texts]
    distance_NN = np.zeros((len(texts), len(texts)))
    for i, row in enumerate(counts):
        for j in range(i + 1, len(texts)):
            bleu = _bleu(len(texts[i]), row, len(texts[j]), counts[j])
            distance_NN[i, j] = distance_NN[j, i] = 1 - bleu
    return distance_NN


def average_linkage(distance_NN: np.ndarray, threshold: float) -> np.ndarray:
    """A cluster number for each item, [N]: the two nearest clusters are merged while nearer than `threshold`; the
    distance of two clusters is the mean over their pairs."""
    distance_NN = np.array(distance_NN, dtype=float)
    np.fill_diagonal(distance_NN, np.inf)
    cluster_N, size_N = np.arange(len(distance_NN)), np.ones(len(distance_NN))
    while len(distance_NN) and distance_NN.min() < threshold:
        a, b = np.unravel_index(distance_NN.argmin(), distance_NN.shape)
        mean_N = (size_N[a] * distance_NN[a] + size_N[b] * distance_NN[b]) / (size_N[a] + size_N[b])
        distance_NN[a], distance_NN[:, a] = mean_N, mean_N
        distance_NN[b], distance_NN[:, b], distance_NN[a, a] = np.inf, np.inf, np.inf
        size_N[a] += size_N[b]
        cluster_N[cluster_N == b] = a
    return cluster_N


def duplicate_share(texts: Sequence[Words | None], threshold: float = 0.5) -> np.ndarray:
    """The share of the batch that each text's cluster has, [N]. All `None` (what could not be read) are one cluster."""
    if not 0 < threshold <= 1:
        raise LabError(f"{threshold} is no distance of texts.", "Use a threshold above 0, at most 1.")
    readable = [i for i, words in enumerate(texts) if words is not None]
    cluster_N = np.full(len(texts), -1)
    cluster_N[readable] = average_linkage(bleu_distances([texts[i] for i in readable]), threshold)
    return np.array([(cluster_N == cluster).mean() for cluster in cluster_N])
