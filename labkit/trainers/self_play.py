"""Self-play without a verifier: a proposer looks for hints that move the solver, the solver learns what they brought.

    phase 1   the proposer by GRPO:  r = max(delta, -5) - share of near duplicates - penalty on long hints
              A = r - mean r of its group of G (no division by the standard deviation); the solver stands still
    phase 2   a pool of pairs from the new proposer                          (labkit.trainers.self_play_pool)
    phase 3   the solver by length-normalised DPO on a band of the pool      (labkit.trainers.dpo)
    round k   begins with the proposer and the solver of round k - 1

All groups answer one instruction, so a "group" is G proposals of the batch. An unreadable proposal has -1, far below
any delta, so early steps teach the format. One step a batch: the ratio to the sampler is 1, and no clip matters.
R-Zero's and Absolute Zero's rewards can take the place of the first (labkit.objectives.proposer_rewards).
Source: the code of G-Zero (arXiv 2605.09959), where proposer and solver are called Challenger and Solver.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models import GPT, answer_logprob
from labkit.objectives import group_advantage, policy_loss
from labkit.objectives.duplicates import duplicate_share
from labkit.objectives.proposer_rewards import (
    absolute_zero_reward,
    g_zero_reward,
    length_penalty,
    majority_share,
    r_zero_reward,
)
from labkit.tasks import HintProposals, answer_mask
from labkit.tasks.hints import KINDS
from labkit.trainers.dpo import DPOSettings, dpo
from labkit.trainers.loop import History, TrainSettings, append_row, train
from labkit.trainers.self_play_pool import Pool, answers_to, draw_pool, instruction, plain_answers, propose

REWARDS = ("g-zero", "r-zero", "absolute-zero")
WRITING, SOLVING = 7, 8  # streams of the draws


@dataclass(frozen=True)
class ProposerSettings:
    """One run of phase 1. The rate and the free length are this world's; the code has 4e-5, and 200 characters."""

    steps: int = 6
    learning_rate: float = 2e-3
    groups: int = 8
    samples: int = 16  # G
    reward: str = "g-zero"
    temperature: float = 0.7  # of the solver's answers
    votes: int = 8  # answers to each question, for the rewards that need several
    share: bool = True  # the penalty on near duplicates
    length: bool = True  # the penalty on long hints
    free_length: float = 2.0  # tokens of a hint that cost nothing
    length_rate: float = 0.03  # a token beyond
    seed: int = 0

    def __post_init__(self):
        if self.reward not in REWARDS:
            raise LabError(f"There is no reward {self.reward!r}.", f"Choose one of {', '.join(REWARDS)}.")
        if self.samples < 2 or self.groups < 1:
            raise LabError(f"{self.groups} groups of {self.samples} have nothing to compare.",
                           "Use at least one group of at least two.")

    def training(self) -> TrainSettings:
        """The settings of the loop underneath."""
        return TrainSettings(self.steps, self.learning_rate, batch=self.groups * self.samples, warmup=0,
                             schedule="constant", weight_decay=0.0, betas=(0.9, 0.95), seed=self.seed)


@dataclass
class Judged:
    """N proposals with what is known of them."""

    prompt_NT: Tensor
    valid_N: Tensor
    reward_N: Tensor
    delta_N: Tensor  # 0 for what cannot be read, and where the reward does not ask for it
    share_N: Tensor


@torch.no_grad()
def judge(proposal_NA: Tensor, solver: GPT, proposals: HintProposals, settings: ProposerSettings,
          step: int = 0) -> Judged:
    """The reward of each proposal."""
    prompt_NT, valid_N = proposals.read(proposal_NA)
    world, device = proposals.world, proposal_NA.device
    words = [row if valid else None for row, valid in
             zip(prompt_NT[:, : world.length].tolist(), valid_N.tolist(), strict=True)]
    share_N = torch.tensor(duplicate_share(words), dtype=torch.float32, device=device)
    paid_share_N = share_N if settings.share else torch.zeros_like(share_N)
    dice = generator_for(settings.seed, step, SOLVING, device=device)
    known_N, delta_N = torch.zeros_like(share_N), torch.zeros_like(share_N)
    if settings.reward == "g-zero":
        delta_N[valid_N] = plain_answers(solver, prompt_NT[valid_N], world, dice, temperature=settings.temperature)[1]
        penalty_N = torch.zeros_like(share_N) if not settings.length else length_penalty(
            proposals.hint_length(prompt_NT).float(), free=settings.free_length, rate=settings.length_rate, unit=1.0)
        return Judged(prompt_NT, valid_N, g_zero_reward(delta_N, valid_N, paid_share_N, penalty_N), delta_N,
                      share_N)
    known_N[valid_N] = votes_of(solver, prompt_NT[valid_N], proposals, settings, dice)
    reward_N = (r_zero_reward(known_N, valid_N, paid_share_N) if settings.reward == "r-zero"
                else absolute_zero_reward(known_N, valid_N))
    return Judged(prompt_NT, valid_N, reward_N, delta_N, share_N)


def votes_of(solver: GPT, prompt_NT: Tensor, proposals: HintProposals, settings: ProposerSettings,
             generator: torch.Generator) -> Tensor:
    """The majority's share of the solver's answers, or for "absolute-zero" the share of right ones: [N].

    Both rewards are for questions alone, so the hint is left out. Votes count the numbers at an answer's end.
    """
    if not len(prompt_NT):
        return torch.zeros(0, device=prompt_NT.device)
    world, G = proposals.world, settings.votes
    question_NT = world.without_hint(prompt_NT)
    answer_BA = answers_to(solver, question_NT, world, generator, temperature=settings.temperature, samples=G)
    if settings.reward == "absolute-zero":
        return world.verify(question_NT.repeat_interleave(G, 0), answer_BA).float().view(-1, G).mean(1)
    return majority_share(world.numbers_said(answer_BA).view(-1, G, world.length))


def facts_of(judged: Judged, proposals: HintProposals) -> dict[str, float]:
    """What a batch of proposals is like: means, and the share of each kind of hint among those that can be read."""
    prompt_NT = judged.prompt_NT[judged.valid_N]
    readable = max(1, len(prompt_NT))
    kinds = {kind: float(proposals.world.is_kind(prompt_NT, kind).sum()) / readable for kind in KINDS[1:]}
    return {"reward": float(judged.reward_N.mean()), "valid": float(judged.valid_N.float().mean()),
            "delta": float(judged.delta_N[judged.valid_N].sum()) / readable,
            "duplicates": float(judged.share_N.mean()),
            "hint_length": float(proposals.hint_length(prompt_NT).sum()) / readable,
            "easy": float(proposals.world.is_easy(prompt_NT).sum()) / readable, **kinds}


def train_proposer(proposer: GPT, solver: GPT, proposals: HintProposals, settings: ProposerSettings, *,
                   label: str = "proposer") -> History:
    """Phase 1: train `proposer` in place. The history's `rollouts` have a row a step, of the batch it learned from."""
    history, device = History(), proposer.embedding.weight.device
    B = settings.groups * settings.samples
    prompt_BT = instruction(proposals, device).expand(B, -1)

    def loss_at(proposer: GPT, step: int) -> Tensor:
        proposal_BA = propose(proposer, proposals, B, generator_for(settings.seed, step, WRITING, device=device))
        judged = judge(proposal_BA, solver, proposals, settings, step)
        append_row(history.rollouts, step=step, **facts_of(judged, proposals))
        advantage_B = group_advantage(judged.reward_N.view(settings.groups, -1), scale_by_std=False).flatten()
        logp_BA = answer_logprob(proposer, prompt_BT, proposal_BA)[0]
        return policy_loss(logp_BA, logp_BA.detach(), advantage_B, answer_mask(proposal_BA), method="dr_grpo")[0]

    return train(proposer, loss_at, settings.training(), history=history, label=label)


# rounds ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SelfPlaySettings:
    """All rounds alike. `proposer=None` leaves the proposer as it is, which the authors' code also offers."""

    dpo: DPOSettings
    proposer: ProposerSettings | None = ProposerSettings()
    rounds: int = 2
    pool: int = 2000
    band: tuple[float, float] = (0.0, 50.0)
    temperature: float = 0.7
    seed: int = 0


@dataclass
class Round:
    """What a round left: both models (copies), the pool and how many of its pairs were kept."""

    proposer: GPT
    solver: GPT
    pool: Pool
    kept: int
    proposer_history: History | None
    solver_history: History = field(default_factory=History)


def self_play(proposer: GPT, solver: GPT, proposals: HintProposals, settings: SelfPlaySettings) -> list[Round]:
    """All rounds; the given models stay as they are."""
    rounds = []
    for k in range(settings.rounds):
        proposer, solver, history = copy.deepcopy(proposer), copy.deepcopy(solver), None
        if settings.proposer is not None:
            own = replace(settings.proposer, seed=1000 * settings.seed + k, temperature=settings.temperature)
            history = train_proposer(proposer, solver, proposals, own, label=f"round {k + 1}: proposer")
        pool = draw_pool(proposer, solver, proposals, count=settings.pool, temperature=settings.temperature,
                         seed=settings.seed, round_=k)
        pairs = pool.pairs(proposals.world, pool.band(*settings.band))
        learned = dpo(solver, pairs, settings.dpo, label=f"round {k + 1}: solver")
        rounds.append(Round(proposer, solver, pool, len(pairs), history, learned))
    return rounds
