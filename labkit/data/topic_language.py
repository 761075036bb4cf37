"""A synthetic language with a dial for how much the order of words says: topics and copies.

Token superposition (Peng et al., arXiv 2605.06546) trains on bags of tokens. Whether that helps depends on how much
of what can be predicted survives in a bag, so this language makes that a number. A text is a row of segments. Each
segment draws a topic z, uniformly; a topic is a random subset of the words, drawn once from the language's seed. The
segment's first word is a draw from its topic, and then

    x_t = successor(x_{t-1}) with probability ρ,   otherwise   x_t ~ p_z
    p(x_t | x_{t-1}, z) = ρ·[x_t = successor(x_{t-1})] + (1 - ρ)·p_z(x_t)

where `successor` is a random permutation of the words, so a copy may leave the topic. At ρ = 0 a bag says all there is
to know; as ρ grows, more is lost in a bag. p_z is uniform, or falls with the rank as rank^-zipf.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabError


@dataclass(frozen=True)
class TopicLanguage:
    """`topics` subsets of `words_per_topic` out of `vocab` words; segments of `segment` tokens; ρ is called `copy`."""

    vocab: int = 4096
    topics: int = 64
    words_per_topic: int = 512
    segment: int = 256
    copy: float = 0.0
    seed: int = 0
    zipf: float = 0.0

    def __post_init__(self):
        if not 0 <= self.copy <= 1:
            raise LabError(f"copy = {self.copy} is not a probability.", "Use a number between 0 and 1.")
        if not 1 <= self.words_per_topic <= self.vocab:
            raise LabError(f"A topic can't have {self.words_per_topic} of {self.vocab} words.",
                           "Use words_per_topic between 1 and vocab.")
        if min(self.topics, self.segment) < 1:
            raise LabError("A language needs at least one topic and one token a segment.", "Raise topics or segment.")
        generator = torch.Generator().manual_seed(self.seed)
        topic_ZW = [torch.randperm(self.vocab, generator=generator)[: self.words_per_topic] for _ in range(self.topics)]
        successor_V = torch.randperm(self.vocab, generator=generator)
        weight_W = torch.arange(1, self.words_per_topic + 1, dtype=torch.float64) ** -self.zipf
        object.__setattr__(self, "topic_ZW", torch.stack(topic_ZW))  # row z: the topic's words, by rank
        object.__setattr__(self, "successor_V", successor_V)
        object.__setattr__(self, "weight_W", weight_W / weight_W.sum())

    def tokens(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` tokens of running text, LongTensor [n]: whole segments, the last one cut."""
        return self.segments(-(-n // self.segment), generator)[0].flatten()[:n]

    def segments(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` segments, LongTensor [count, segment], and their topics, LongTensor [count]."""
        topic_N = torch.randint(self.topics, (count,), generator=generator)
        uniform_TN = torch.rand(self.segment, count, generator=generator, dtype=torch.float64)
        rank_TN = torch.searchsorted(self.weight_W.cumsum(0), uniform_TN).clamp_(max=self.words_per_topic - 1)
        token_TN = self.topic_ZW[topic_N, rank_TN]
        copied_TN = torch.rand(self.segment, count, generator=generator) < self.copy
        for t in range(1, self.segment):  # a chain in time, all segments at once
            token_TN[t] = torch.where(copied_TN[t], self.successor_V[token_TN[t - 1]], token_TN[t])
        return token_TN.T.contiguous(), topic_N

    def word_probability(self) -> Tensor:
        """p_z(word) as a matrix [topics, vocab], float64, each row summing to 1."""
        probability_ZV = torch.zeros(self.topics, self.vocab, dtype=torch.float64)
        return probability_ZV.scatter_(1, self.topic_ZW, self.weight_W.expand(self.topics, -1))

    def entropy_floor(self) -> float:
        """Exact entropy in nats per token when the topic and the borders are known: no model can be better on average.

        (1/T) Σ_t E[H(x_t | x_{t-1}, z)]. The law of x_t given z is followed exactly: q_1 = p_z, q_{t+1} = (1 - ρ)·p_z
        + ρ·q_t∘successor⁻¹. H(x_t | x_{t-1}, z) differs from the entropy of (1 - ρ)·p_z in one term, the successor's.
        """
        fresh_ZV = (1 - self.copy) * self.word_probability()
        after_ZV = fresh_ZV[:, self.successor_V]  # what a fresh draw gives the successor of each word
        entropy_ZV = _surprise(fresh_ZV).sum(1, keepdim=True) - _surprise(after_ZV) + _surprise(after_ZV + self.copy)
        law_ZV = self.word_probability()
        total = _surprise(law_ZV).sum(1).mean()
        for t in range(1, self.segment):
            loss = (law_ZV * entropy_ZV).sum(1).mean()
            total += loss
            law_ZV, before_ZV = fresh_ZV.index_add(1, self.successor_V, law_ZV, alpha=self.copy), law_ZV
            if (law_ZV - before_ZV).abs().max() < 1e-15:  # the law no longer moves: the rest of the segment is the same
                total += (self.segment - 1 - t) * loss
                break
        return float(total / self.segment)

    def best_loss(self, token_NT: Tensor) -> Tensor:
        """Exact nats [N, T] of the best predictor that sees a segment from its start but isn't told its topic.

        Bayes: the posterior over topics is carried along, p(x_t | x_<t) = Σ_z p(z | x_<t)·p(x_t | x_{t-1}, z). Its
        mean is the least cross-entropy on segments whose borders are known; it exceeds the floor by what must be
        spent on finding the topic.
        """
        probability_ZV = self.word_probability()
        log_posterior_NZ = torch.full((len(token_NT), self.topics), -math.log(self.topics), dtype=torch.float64)
        loss_NT = torch.empty(token_NT.shape, dtype=torch.float64)
        for t in range(token_NT.shape[1]):
            step_NZ = probability_ZV[:, token_NT[:, t]].T
            if t:
                copied_N = (token_NT[:, t] == self.successor_V[token_NT[:, t - 1]]).double()
                step_NZ = (1 - self.copy) * step_NZ + self.copy * copied_N[:, None]
            joint_NZ = log_posterior_NZ + step_NZ.log()
            loss_NT[:, t] = -joint_NZ.logsumexp(1)
            log_posterior_NZ = joint_NZ + loss_NT[:, t, None]
        return loss_NT


def _surprise(p: Tensor) -> Tensor:
    """-p ln p, and 0 at p = 0."""
    return -torch.xlogy(p, p)
