"""Self-play: pools and bands by hand, filters by example, a proposer that finds what it is paid for."""

import copy

import pytest
import torch
from planted import altered

from labkit.errors import LabError
from labkit.models import answer_logprob
from labkit.tasks import HintProposals, HintWorld, answer_mask
from labkit.tasks.alphabet import END, decode
from labkit.trainers import DPOSettings, accuracy, load_world_base, self_play_pool
from labkit.trainers.self_play import ProposerSettings, SelfPlaySettings, judge, self_play, train_proposer, votes_of
from labkit.trainers.self_play_pool import Pool, TextFilters, answers_to, draw_pool, plain_answers, pool_of

WORLD = HintWorld()
PROPOSALS = HintProposals(WORLD)


@pytest.fixture(scope="module")
def base():
    return load_world_base("hints").model


def test_the_base_passes_the_gate(base):
    """What the lab needs: with STRUCT right in 90% at least, without a hint far less, proposals that can be read."""
    right = {name: accuracy(base, world, problems=500) for name, world in load_world_base("hints").worlds.items()}
    assert right["with STRUCT"] >= 0.9 and 0.3 < right["no hint"] < 0.6 and right["proposals"] > 0.8


def pool_with(deltas, fits=None):
    N = len(deltas)
    prompt_NT, answer_NA = torch.zeros(N, 8, dtype=torch.long), torch.full((N, 2), END)
    fits_N = torch.ones(N, dtype=torch.bool) if fits is None else torch.tensor(fits)
    return Pool(prompt_NT, answer_NA, answer_NA + 1, torch.tensor(deltas), fits_N)


def assert_bands(band):
    """Both borders included, percentiles of the whole pool, filters afterwards."""
    pool = pool_with([4.0, 0, 1, 2, 3])
    assert band(pool, 0, 50).tolist() == [False, True, True, True, False]
    assert band(pool, 50, 100).tolist() == [True, False, False, True, True]
    assert band(pool, 20, 80).tolist() == [False, False, True, True, True]  # 0.8 to 3.2
    assert band(pool_with([4.0, 0, 1, 2, 3], [True, False, True, True, True]), 0, 50).tolist() == [
        False, False, True, True, False]


def test_bands_by_hand():
    """Five deltas; an empty pool has an empty band."""
    assert_bands(Pool.band)
    assert pool_with([]).band().tolist() == []
    with pytest.raises(LabError, match="no band"):
        pool_with([1.0]).band(50, 50)


@pytest.mark.parametrize(("old", "new"), [("delta_N <= top", "delta_N < top"), (" & self.fits_N", ""),
                                          ("delta_N = self.delta_N.double()", "delta_N = self.delta_N[self.fits_N]")])
def test_a_fault_in_the_band_is_seen(old, new):
    """An open border, forgotten filters, percentiles of what passed them."""
    with pytest.raises((AssertionError, RuntimeError)):
        assert_bands(altered(Pool.band, "band", old, new, vars(self_play_pool).copy()))


@pytest.mark.parametrize(("assisted", "plain", "reason"), [
    ("x" * 99, "x" * 99, "short"), ("word " * 2001, "word " * 2001, "long"), ("abcdefghij" * 26, "x" * 100, "padded"),
    ("a" * 500, "a" * 500, "repetitive"), ("a" * 499, "a" * 499, None),
    ("Write a poem about the sea now" + "." * 100, "x" * 100, "echo"),
    ("Write a poem about the sea no " + "." * 100, "x" * 100, None), (" Assistant: " + "fine " * 30, "x" * 100, "role"),
    ("x" * 250, "x" * 100, None),
])
def test_filters_of_the_code(assisted, plain, reason):
    """Each default at its border, in the order of the code."""
    assert TextFilters().problem("Write a poem about the sea now, please", plain, assisted) == reason


def test_a_pool_is_what_it_says(base):
    """Deltas are the two means of log-probabilities, the pairs' prompts have no hint, and nothing depends on more than
    (seed, round)."""
    pool = draw_pool(base, base, PROPOSALS, count=60, seed=3)
    again = draw_pool(base, base, PROPOSALS, count=60, seed=3)
    other = draw_pool(base, base, PROPOSALS, count=60, round_=1)
    assert torch.equal(pool.delta_N, again.delta_N) and not torch.equal(pool.prompt_NT[:20], other.prompt_NT[:20])
    bare_NT, mask_NA = WORLD.without_hint(pool.prompt_NT), answer_mask(pool.plain_NA)
    with torch.no_grad():
        plain, hinted = (answer_logprob(base, each, pool.plain_NA)[0] for each in (bare_NT, pool.prompt_NT))
    want = [float((a - b)[m].mean()) for a, b, m in zip(plain, hinted, mask_NA, strict=True)]
    assert pool.delta_N.tolist() == pytest.approx(want, abs=1e-5)
    pairs = pool.pairs(WORLD, pool.band())
    assert WORLD.is_kind(pairs.prompt_NP, "none").all() and len(pairs) == int(pool.band().sum())
    assert torch.equal(pairs.chosen_NA, pool.assisted_NA[pool.band()])
    assert not WORLD.is_kind(pool.prompt_NT, "HASTE").any()  # the base does not propose it


def test_empty_pools(base):
    """No question gives a pool of none, not an error."""
    pool = pool_of(base, torch.zeros(0, WORLD.prompt_length, dtype=torch.long), WORLD)
    assert len(pool.delta_N) == len(pool.band()) == 0
    assert plain_answers(base, torch.zeros(0, 8, dtype=torch.long), WORLD, torch.Generator())[1].tolist() == []


def test_rewards_of_the_three(base):
    """The same proposals under three rewards: unreadable ones are worst in each, G-Zero's equals delta - share, and the
    two others do not see the hint."""
    dice = torch.Generator().manual_seed(0)
    proposal_NA = PROPOSALS.solve(PROPOSALS.problems(40), "corpus", dice)
    judged = {name: judge(proposal_NA, base, PROPOSALS, ProposerSettings(reward=name)) for name in
              ("g-zero", "r-zero", "absolute-zero")}
    valid_N = judged["g-zero"].valid_N
    assert 0 < valid_N.sum() < 40
    for each in judged.values():
        assert each.reward_N[~valid_N].max() <= -1 < each.reward_N[valid_N].min()
    plainly = judge(proposal_NA, base, PROPOSALS, ProposerSettings(length=False))
    torch.testing.assert_close(plainly.reward_N[valid_N], (plainly.delta_N - plainly.share_N)[valid_N])
    length_N = PROPOSALS.hint_length(plainly.prompt_NT)[valid_N]
    paid_N = (plainly.reward_N - judged["g-zero"].reward_N)[valid_N]
    torch.testing.assert_close(paid_N, 0.03 * (length_N - 2).clamp(min=0).float())
    settings = ProposerSettings(reward="r-zero")
    prompt_NT = plainly.prompt_NT[valid_N]
    votes = [votes_of(base, each, PROPOSALS, settings, torch.Generator().manual_seed(1))
             for each in (prompt_NT, WORLD.without_hint(prompt_NT))]
    assert torch.equal(*votes)


def test_votes_by_hand(base):
    """The shares of a majority and of right answers, against text."""
    prompt_NT = WORLD.problems(6)
    drawn = answers_to(base, WORLD.without_hint(prompt_NT), WORLD, torch.Generator().manual_seed(5), samples=4)
    said = [decode(row).split("$")[0][-3:] for row in drawn]
    for name in ("r-zero", "absolute-zero"):
        settings = ProposerSettings(reward=name, votes=4)
        got = votes_of(base, prompt_NT, PROPOSALS, settings, torch.Generator().manual_seed(5))
        groups = [said[i : i + 4] for i in range(0, 24, 4)]
        right = WORLD.verify(prompt_NT.repeat_interleave(4, 0), drawn).view(-1, 4)
        most = [max(map(group.count, group)) / 4 for group in groups]
        want = most if name == "r-zero" else right.float().mean(1).tolist()
        assert got.tolist() == pytest.approx(want)


def test_a_proposer_finds_what_it_is_paid_for(base):
    """Some steps of GRPO raise the reward and the share of proposals that can be read; the solver is not touched."""
    proposer, before = copy.deepcopy(base), [each.clone() for each in base.parameters()]
    history = train_proposer(proposer, base, PROPOSALS, ProposerSettings(steps=8))
    reward = history.rollouts["reward"]
    assert sum(reward[-2:]) > sum(reward[:2]) and history.rollouts["valid"][-1] > history.rollouts["valid"][0]
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))
    rows = history.rollouts
    assert rows["STRUCT"][0] + rows["NO-OP"][0] + rows["BAD"][0] + rows["LEAK"][0] == pytest.approx(1)


def test_rounds_go_on_where_the_last_ended(base):
    """Two rounds: each has a solver of its own, the second begins with the first's; without phase 1 the proposer stays
    as it was; the given models too."""
    settings = SelfPlaySettings(DPOSettings(2, 1e-4), proposer=None, rounds=2, pool=80)
    before = [each.clone() for each in base.parameters()]
    first, second = self_play(base, base, PROPOSALS, settings)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), second.proposer.parameters(), strict=True))
    rounds = self_play(base, first.solver, PROPOSALS, SelfPlaySettings(DPOSettings(2, 1e-4), None, 1, 80))
    pool = draw_pool(base, first.solver, PROPOSALS, count=80, round_=1)
    assert torch.equal(second.pool.delta_N, pool.delta_N)
    assert not torch.equal(rounds[0].pool.delta_N[:9], pool.delta_N[:9])
    assert first.kept == int(first.pool.band().sum())


def test_settings_that_make_no_sense():
    """A sentence for each."""
    with pytest.raises(LabError, match="no reward"):
        ProposerSettings(reward="spice")
    with pytest.raises(LabError, match="nothing to compare"):
        ProposerSettings(samples=1)
