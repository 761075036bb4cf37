"""The synthetic language has the statistics it promises, and its entropy is the one that simulation finds."""

import itertools
import math

import pytest
import torch

from labkit.data import TopicLanguage
from labkit.errors import LabError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> TopicLanguage:
    defaults = {"vocab": 60, "topics": 5, "words_per_topic": 12, "segment": 16, "copy": 0.3, "seed": 3}
    return TopicLanguage(**defaults | changes)


def test_same_seeds_same_text_other_seeds_other_text():
    """The language depends on its seed alone, the text on language and generator."""
    assert torch.equal(small().tokens(500, generator(1)), small().tokens(500, generator(1)))
    assert not torch.equal(small().tokens(500, generator(1)), small().tokens(500, generator(2)))
    assert not torch.equal(small().topic_ZW, small(seed=4).topic_ZW)
    assert len(small().tokens(501, generator())) == 501 and small().tokens(501, generator()).dtype == torch.long


def test_without_copies_a_segment_stays_in_its_topic():
    """At ρ = 0 every token is one of its topic's words, all of which occur, and segments change topic."""
    language = small(copy=0.0)
    token_NT, topic_N = language.segments(400, generator())
    for topic in range(5):
        assert set(token_NT[topic_N == topic].flatten().tolist()) == set(language.topic_ZW[topic].tolist())
    assert all(len(set(words.tolist())) == 12 for words in language.topic_ZW) and len(set(topic_N.tolist())) == 5


@pytest.mark.parametrize("rho", [0.0, 0.1, 0.3, 1.0])
def test_the_fraction_of_copies_is_rho(rho):
    """Successors follow with ρ plus the chance that a fresh draw hits one; the count agrees within 5 standard
    errors."""
    language = TopicLanguage(copy=rho)
    token_NT, topic_N = language.segments(400, generator())
    expected_NT = language.successor_V[token_NT[:, :-1]]
    hit_NT = (expected_NT == token_NT[:, 1:]).double()
    chance_NT = (1 - rho) * language.word_probability()[topic_N[:, None], expected_NT]
    expected = float((rho + chance_NT).mean())
    assert abs(float(hit_NT.mean()) - expected) <= 5 * math.sqrt(expected * (1 - expected) / hit_NT.numel())


def test_zipf_weights():
    """With exponent 1 the k-th word of a topic comes k times less often than the first (5 standard errors)."""
    language = small(copy=0.0, zipf=1.0, topics=1)
    counts = language.tokens(160_000, generator()).bincount(minlength=60)[language.topic_ZW[0]] / 160_000
    expected = 1 / torch.arange(1, 13) / sum(1 / k for k in range(1, 13))
    assert (counts - expected).abs().max() < 5 * 0.00125


def test_floor_in_closed_form():
    """ρ = 0: ln W. One topic of all words: the first token ln V, then that of a draw with one word raised by ρ."""
    assert TopicLanguage(copy=0.0).entropy_floor() == pytest.approx(math.log(512), abs=1e-9)
    language = small(words_per_topic=60, topics=1, copy=0.3)
    raised, other = 0.3 + 0.7 / 60, 0.7 / 60
    later = -raised * math.log(raised) - 59 * other * math.log(other)
    assert language.entropy_floor() == pytest.approx((math.log(60) + 15 * later) / 16, abs=1e-9)
    assert small(copy=1.0).entropy_floor() == pytest.approx(math.log(12) / 16, abs=1e-9)


def test_floor_against_all_texts():
    """With 5 words and 4 tokens all 625 texts can be listed: the floor is their entropy given the topic, per token."""
    language = TopicLanguage(vocab=5, topics=3, words_per_topic=3, segment=4, copy=0.4, zipf=1.5, seed=2)
    total = 0.0
    for fresh in language.word_probability().tolist():
        for text in itertools.product(range(5), repeat=4):
            p = fresh[text[0]]
            for before, word in itertools.pairwise(text):
                p *= 0.6 * fresh[word] + 0.4 * (int(language.successor_V[before]) == word)
            total -= p * math.log(p) if p else 0.0
    assert language.entropy_floor() == pytest.approx(total / 3 / 4, abs=1e-12)


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_floor_is_the_loss_of_one_who_knows_the_topic(zipf):
    """-ln p(x_t | x_{t-1}, z), simulated: its mean is the floor within 5 standard errors of the mean over segments."""
    language = small(zipf=zipf)
    token_NT, topic_N = language.segments(4000, generator(5))
    probability_NT = language.word_probability()[topic_N[:, None], token_NT]
    copied_NT = (language.successor_V[token_NT[:, :-1]] == token_NT[:, 1:]).double()
    probability_NT[:, 1:] = 0.7 * probability_NT[:, 1:] + 0.3 * copied_NT
    loss_N = -probability_NT.log().mean(1)
    assert abs(loss_N.mean() - language.entropy_floor()) < 5 * loss_N.std() / math.sqrt(4000)


def test_best_loss_against_brute_force():
    """-ln of Σ_z p(z)·p(segment | z), summed over the segment, is what the step-by-step posterior must add up to."""
    language = small()
    token_NT, _ = language.segments(50, generator(7))
    step_NTZ = language.word_probability().T[token_NT]
    copied_NT = (language.successor_V[token_NT[:, :-1]] == token_NT[:, 1:]).double()
    step_NTZ[:, 1:] = 0.7 * step_NTZ[:, 1:] + 0.3 * copied_NT[..., None]
    whole_N = -step_NTZ.prod(1).mean(1).log()
    assert (language.best_loss(token_NT).sum(1) - whole_N).abs().max() < 1e-9


def test_best_loss_exceeds_the_floor_by_the_price_of_the_topic():
    """Not knowing the topic costs its entropy once a segment: best - floor is ln(topics) / segment, give or take
    noise."""
    language = TopicLanguage(copy=0.1)
    token_NT, _ = language.segments(300, generator(9))
    excess = float(language.best_loss(token_NT).mean()) - language.entropy_floor()
    assert 0.5 * math.log(64) / 256 < excess < 1.5 * math.log(64) / 256


@pytest.mark.parametrize("setting", [{"copy": 1.5}, {"copy": -0.1}, {"words_per_topic": 61}, {"words_per_topic": 0},
                                     {"topics": 0}, {"segment": 0}])
def test_impossible_settings(setting):
    """Each gives one sentence, at once."""
    with pytest.raises(LabError):
        small(**setting)
