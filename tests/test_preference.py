"""Preferences: dpo_loss and hint_delta against written-out sums, rewards by hand, the trainers against each other."""

import math
import sys

import numpy as np
import pytest
import torch
from planted import altered

from labkit.errors import LabError
from labkit.models import GPT, GPTConfig, answer_logprob
from labkit.models.explicit_attention import ExplicitAttention
from labkit.objectives import dpo_loss, duplicates, group_advantage, hint_delta, preference, proposer_rewards
from labkit.tasks import answer_mask
from labkit.tasks.alphabet import END, VOCAB
from labkit.trainers import DPOSettings, Pairs, dpo
from labkit.trainers.dpo import dpo_stack, known_logprobs, stacked_pair_loss, unstacked
from labkit.trainers.stack import stack_weights

SMALL = GPTConfig(VOCAB, context=16, width=16, layers=1, heads=2)


def rows(B, T, seed=0, dtype=torch.float64):
    """Log-probabilities and a mask with a row of every length, 0 included; NaN where the mask is false."""
    logp_BT = -torch.rand(B, T, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3
    mask_BT = torch.arange(T) < (torch.arange(B) % (T + 1))[:, None]
    return torch.where(mask_BT, logp_BT, torch.nan), mask_BT


def by_hand(chosen, rejected, beta, normalized):
    """The loss, one pair and one token at a time. Each argument: (logp, reference, mask)."""
    def rho(logp_T, reference_T, mask_T):
        terms = [float(a - b) for a, b, counts in zip(logp_T, reference_T, mask_T, strict=True) if counts]
        return sum(terms) / (max(1, len(terms)) if normalized else 1)

    margins = [beta * (rho(*a) - rho(*b)) for a, b in zip(zip(*chosen, strict=True), zip(*rejected, strict=True),
                                                         strict=True)]
    return sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins), margins


def assert_by_hand(loss):
    """Values and statistics of a dpo_loss, for both kinds, odd shapes and two widths."""
    for B, T, S in ((1, 1, 1), (7, 5, 3), (6, 2, 5)):
        (a, mask), (b, other_mask) = rows(B, T), rows(B, S, 1)
        reference, other_reference = rows(B, T, 2)[0], rows(B, S, 3)[0]
        for normalized, beta in ((True, 2.0), (False, 0.3)):
            said, stats = loss(a, b, reference, other_reference, mask, other_mask, beta=beta,
                               length_normalized=normalized)
            want, margins = by_hand((a, reference, mask), (b, other_reference, other_mask), beta, normalized)
            assert float(said) == pytest.approx(want, abs=1e-12)
            assert float(stats["margin"]) == pytest.approx(np.mean(margins), abs=1e-12)
            assert float(stats["accuracy"]) == pytest.approx(np.mean([margin > 0 for margin in margins]))


def test_dpo_loss_is_the_written_out_sum():
    """Tokens outside the mask are NaN, so a sum that touched them would show."""
    assert_by_hand(dpo_loss)


@pytest.mark.parametrize(("old", "new"), [
    ("chosen_B - rejected_B", "rejected_B - chosen_B"),
    ("margin_B = beta *", "margin_B ="),
    ("-F.logsigmoid(margin_B)", "-F.logsigmoid(margin_B.clamp(max=0.1))"),
])
def test_a_fault_in_dpo_loss_is_seen(old, new):
    """Sign, beta, and a cut margin."""
    with pytest.raises(AssertionError):
        assert_by_hand(altered(preference.dpo_loss, "dpo_loss", old, new, vars(preference).copy()))


def test_normalised_and_summed_disagree_as_in_the_brief():
    """-3 over 10 tokens against -5 over 50: margin -0.4 normalised, +4 summed, at beta 2."""
    zeros = torch.zeros(1, 50, dtype=torch.float64)
    a, b = torch.full((1, 10), -0.3, dtype=torch.float64), torch.full((1, 50), -0.1, dtype=torch.float64)
    masks = torch.ones(1, 10), torch.ones(1, 50)
    margins = [float(dpo_loss(a, b, zeros[:, :10], zeros, *masks, beta=2.0, length_normalized=kind)[1]["margin"])
               for kind in (True, False)]
    assert margins == pytest.approx([-0.4, 4.0])


def test_gradient_is_beta_sigma_over_length():
    """d loss / d logp_t of the chosen answer = -beta sigmoid(-margin) / |a| / B: the same for all its tokens, 0 outside
    of the mask, and none for the reference."""
    logp, mask = rows(3, 4)
    logp = logp.nan_to_num().requires_grad_()
    reference = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    other = torch.zeros(3, 4, dtype=torch.float64)
    loss, _ = dpo_loss(logp, other, reference, other, mask, mask)
    loss.backward()
    n_B = mask.sum(1).clamp(min=1)
    margin_B = 2 * torch.where(mask, logp, 0).sum(1) / n_B
    want = -(2 * torch.sigmoid(-margin_B) / n_B)[:, None] * mask / 3
    torch.testing.assert_close(logp.grad, want.detach())
    assert reference.grad is None


def test_no_pairs_and_bad_input():
    """No pairs give 0; numbers that do not fit give a sentence."""
    empty = torch.zeros(0, 4)
    assert float(dpo_loss(*[empty] * 6)[0]) == 0
    some = torch.zeros(2, 4)
    with pytest.raises(LabError, match="prefer nothing"):
        dpo_loss(*[some] * 6, beta=0)
    with pytest.raises(LabError, match="are no pairs"):
        dpo_loss(some, empty, some, empty, some, empty)
    with pytest.raises(LabError, match="mask_BT"):
        dpo_loss(some, some, some, some, some[:, :2], some)


# ---- Hint-delta


def test_hint_delta_is_a_sample_of_the_divergence():
    """p = (.8, .2), p' = (.5, .5): the mean over draws of n * delta is KL(p, p') = 0.1927, and no other."""
    p, other = torch.tensor([0.8, 0.2]).double(), torch.tensor([0.5, 0.5]).double()
    logp_21, hinted_21 = p.log()[:, None], other.log()[:, None]
    delta_2 = hint_delta(logp_21, hinted_21, torch.ones(2, 1))
    assert float((p * delta_2).sum()) == pytest.approx(0.192745, abs=1e-6)


def test_hint_delta_is_a_mean_over_tokens_with_this_sign():
    """Two tokens that the hint makes less likely by 1 and 2 nats: +1.5. An empty answer: 0."""
    plain, hinted = torch.tensor([[-1.0, -1.0, 9], [0, 0, 0]]), torch.tensor([[-2.0, -3.0, -9], [5, 5, 5]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert hint_delta(plain, hinted, mask).tolist() == [1.5, 0.0]


# ---- duplicates and rewards


def test_bleu_by_hand():
    """Identical texts of four words: 1. Of three: (1 * 1 * 1 * 0.1)^(1/4), for there is no 4-gram. A shorter
    hypothesis pays exp(1 - r/c); no common word is 0."""
    assert duplicates.sentence_bleu("abcd", "abcd") == pytest.approx(1)
    assert duplicates.sentence_bleu("abc", "abc") == pytest.approx(0.1**0.25)
    assert duplicates.sentence_bleu("abcd", "wxyz") == 0
    # precisions of "the the the a": unigrams 2/4 (clipped at one "the", one "a"), no pair, no triple, no quadruple
    want = (2 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25
    assert duplicates.sentence_bleu("a the b c".split(), "the the the a".split()) == pytest.approx(want)
    want = (1 * 1 * 1 * 1) ** 0.25 * math.exp(1 - 6 / 4)
    assert duplicates.sentence_bleu("abcdef", "abcd") == pytest.approx(want)


def test_average_linkage_by_hand():
    """0 and 1 merge at 0.1; 2 is at (0.2 + 0.9) / 2 = 0.55 of them and stays out below 0.5, single linkage would take
    it; 3 and 4 merge."""
    far = 0.9
    distance = np.array([[0, .1, .2, far, far], [.1, 0, far, far, far], [.2, far, 0, far, far],
                         [far, far, far, 0, .3], [far, far, far, .3, 0]])
    cluster = duplicates.average_linkage(distance, 0.5)
    assert len(set(cluster)) == 3 and cluster[0] == cluster[1] and cluster[3] == cluster[4] != cluster[2]
    assert len(set(duplicates.average_linkage(distance, 0.56))) == 2
    assert len(set(duplicates.average_linkage(distance, 0.1))) == 5  # at the threshold nothing is merged


def test_linkage_agrees_with_scipy():
    """The same partitions as a peer, on random distances and several thresholds."""
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    dice = np.random.default_rng(0)
    for N in (2, 9, 23):
        half = np.triu(dice.random((N, N)), 1)
        distance = half + half.T
        tree = hierarchy.linkage(distance[np.triu_indices(N, 1)], "average")
        for threshold in (0.2, 0.4, 0.6):
            theirs = hierarchy.fcluster(tree, threshold, "distance")
            ours = duplicates.average_linkage(distance, threshold)
            assert ((ours[:, None] == ours) == (theirs[:, None] == theirs)).all()


def test_duplicate_shares():
    """What cannot be read is one cluster, equal words are another, and nothing is nobody."""
    assert duplicates.duplicate_share(["abc", None, "abc", "xyz", None]).tolist() == [.4, .4, .4, .2, .4]
    assert duplicates.duplicate_share([]).tolist() == []


def test_the_briefs_reward_and_advantages():
    """A hint of 350 characters, delta 0.08, unique among 128: 0.0272. Fifteen of 0.05 and an unreadable one."""
    penalty = proposer_rewards.length_penalty(torch.tensor([350.0, 200, 100]))
    assert penalty.tolist() == pytest.approx([0.045, 0, 0])
    reward = proposer_rewards.g_zero_reward(torch.tensor([0.08, -9.0, 7.0]), torch.tensor([True, True, False]),
                                            torch.tensor([1 / 128, 0, 0.25]), penalty)
    assert reward.tolist() == pytest.approx([0.0271875, -5.0, -1.25])
    group = torch.tensor([[0.05] * 15 + [-1 - 1 / 128]])
    assert group_advantage(group, scale_by_std=False)[0, [0, 15]].tolist() == pytest.approx([0.0661, -0.9917], abs=1e-4)


def test_the_other_rewards():
    """R-Zero is largest at a split vote, Absolute Zero for what is rarely solved; never solved and unreadable cost."""
    share, valid = torch.tensor([0.0, 0, 0.1, 0.1]), torch.tensor([True, True, True, False])
    r = proposer_rewards.r_zero_reward(torch.tensor([0.5, 0.9, 1.0, 0.5]), valid, share)
    assert r.tolist() == pytest.approx([0.5, 0.1, -0.1, -1.1])
    a = proposer_rewards.absolute_zero_reward(torch.tensor([0.125, 1.0, 0.0, 0.5]), valid)
    assert a.tolist() == pytest.approx([0.875, 0.0, -0.5, -1.0])
    votes = torch.tensor([[[1, 2], [1, 2], [2, 1], [1, 3]], [[0, 0]] * 4])
    assert proposer_rewards.majority_share(votes).tolist() == [0.5, 1.0]


# ---- the trainers


def some_pairs(N, seed=0):
    """Random prompts of 3 tokens and answers of up to 4, filled with END."""
    dice = torch.Generator().manual_seed(seed)
    answers = []
    for _ in range(2):
        answer_NA = torch.randint(11, VOCAB, (N, 4), generator=dice)
        length_N1 = torch.randint(0, 4, (N, 1), generator=dice)
        answers.append(answer_NA.masked_fill(torch.arange(4) >= length_N1, END))
    return Pairs(torch.randint(11, VOCAB, (N, 3), generator=dice), *answers)


def test_dpo_prefers_what_it_is_told():
    """After some steps the chosen answers are likelier and the margin is above 0; swapped pairs do the opposite."""
    pairs, settings = some_pairs(8), DPOSettings(20, 3e-3)
    for sign, taught in ((1, pairs), (-1, pairs.swapped(torch.ones(8, dtype=torch.bool)))):
        model = GPT(SMALL)
        before = known_logprobs(model, pairs)
        history = dpo(model, taught, settings)
        after = known_logprobs(model, pairs)
        rise = [float((b - a).mean()) for a, b in zip(before, after, strict=True)]
        assert sign * (rise[0] - rise[1]) > 0 and history.rollouts["margin"][-1] > 0
        assert history.rollouts["margin"][0] == pytest.approx(0, abs=1e-5)  # the reference is the start


@pytest.mark.parametrize("changes", [{}, {"length_normalized": False, "beta": 0.3}, {"objective": "sft"}],
                         ids=["normalised", "summed", "sft"])
def test_a_stack_is_its_runs_one_by_one(changes):
    """Different weights, pairs (also in number) and rates: the stack gives what `dpo` gives each alone."""
    settings = DPOSettings(5, 1e-3, batch=4, clip=0.5, **changes)
    models, data, rates = [GPT(SMALL, seed=seed) for seed in range(3)], [some_pairs(N, N) for N in (9, 4, 6)], \
        (1e-3, 3e-3, 1e-4)
    weights, trace = dpo_stack(models, data, settings, rates, keep=(2,))
    for m, (model, pairs, rate) in enumerate(zip(models, data, rates, strict=True)):
        alone = GPT(SMALL, seed=m)
        history = dpo(alone, pairs, DPOSettings(**{**vars(settings), "learning_rate": rate}))
        stacked = unstacked(model, weights)[m]
        for (name, a), b in zip(alone.named_parameters(), stacked.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=name)
        assert [float(loss[m]) for loss in trace.loss] == pytest.approx(history.train["loss"], rel=1e-4, abs=1e-5)
    assert set(trace.kept) == {2} and not torch.equal(trace.kept[2]["norm.weight"], weights["norm.weight"])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), GPT(SMALL, seed=0).parameters(), strict=True))


def test_the_stacked_loss_is_the_written_out_one():
    """Against dpo_loss on answer_logprob, pair by pair; a planted fault (chosen and rejected exchanged) is seen."""
    models, data = [GPT(SMALL, seed=seed) for seed in (0, 1)], [some_pairs(5, 1), some_pairs(5, 2)]
    known = [[each + 0.3 for each in known_logprobs(model, pairs)] for model, pairs in zip(models, data, strict=True)]
    shape, row = GPT(SMALL, attention=ExplicitAttention()), [torch.arange(4)] * 2
    args = (shape, stack_weights(models), data, known, row, DPOSettings(1, 1e-3))
    want = []
    for model, pairs, (a, b) in zip(models, data, known, strict=True):
        part = pairs.rows(row[0])
        answers = part.chosen_NA, part.rejected_NA
        logps = [answer_logprob(model, part.prompt_NP, each)[0].detach() for each in answers]
        want.append(float(dpo_loss(*logps, a[:4], b[:4], *map(answer_mask, answers))[0]))
    assert stacked_pair_loss(*args).tolist() == pytest.approx(want, rel=1e-5)
    space = vars(sys.modules["labkit.trainers.dpo"]).copy()
    wrong = altered(stacked_pair_loss, "stacked_pair_loss", "torch.cat((each.chosen_NA, each.rejected_NA))",
                    "torch.cat((each.rejected_NA, each.chosen_NA))", space)
    assert wrong(*args).tolist() != pytest.approx(want, rel=1e-5)


def test_batches_follow_the_pool_in_order():
    """Eight by eight, and again from the start: with the defaults of the code 50 steps see 400 pairs at most."""
    settings = DPOSettings(50, 1e-5)
    seen = torch.cat([settings.batch_rows(730, step) for step in range(50)])
    assert torch.equal(seen, torch.arange(400))
    assert settings.batch_rows(5, 1).tolist() == [3, 4, 0, 1, 2, 3, 4, 0]


def test_what_cannot_be_trained_is_refused():
    """Empty pairs, unequal numbers, an unknown objective."""
    model, pairs = GPT(SMALL), some_pairs(3)
    with pytest.raises(LabError, match="no pairs to learn from"):
        dpo(model, pairs.rows(torch.zeros(0, dtype=torch.long)), DPOSettings(1, 1e-3))
    with pytest.raises(LabError, match="are no stack"):
        dpo_stack([model], [pairs, pairs], DPOSettings(1, 1e-3))
    with pytest.raises(LabError, match="no objective"):
        DPOSettings(1, 1e-3, objective="kto")
