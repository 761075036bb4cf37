"""Reinforcement learning with verifiable rewards: draw groups of answers, compare within the group, step.

A round:
    answers   y_1 .. y_G ~ pi_old(. | x) for each of N problems x          (labkit.trainers.rollout)
    reward    R_i = 1 if the verifier takes y_i, else 0
    advantage A_i = (R_i - mean R) / std R within the group                (labkit.objectives.group_advantage)
    steps     `epochs` times over the answers in `minibatches` shuffled parts, each one step on
              policy_loss(log pi, log pi_old, A) + kl * KL(pi, reference)  (labkit.objectives.policy_loss)

With one step a round the ratio pi / pi_old is 1 and every method is the plain policy gradient; the methods differ once
the policy has moved away from the answers it learns from. `advantage="reward"` is 1-0 REINFORCE: right answers are
learned, wrong ones are left alone.
Sources: GRPO, arXiv 2402.03300; the methods' own papers stand in labkit.objectives.policy_gradient.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.errors import LabError
from labkit.models import GPT, answer_logprob
from labkit.objectives import group_advantage, policy_loss, reference_kl
from labkit.tasks import World, answer_lengths
from labkit.trainers.checkpoint import fingerprint
from labkit.trainers.loop import History, TrainSettings, append_row, train
from labkit.trainers.rollout import Rollout, accuracy, roll_out
from labkit.trainers.schedule import annealed

VALIDATION_SEED = 2**31 - 1  # no training run uses it: every arm is measured on the same problems


@dataclass(frozen=True)
class GRPOSettings:
    """One run of reinforcement learning. On a CPU equal settings give equal weights, bit for bit."""

    rounds: int
    learning_rate: float
    prompts: int = 32  # N, problems a round
    samples: int = 8  # G, answers to each
    minibatches: int = 1  # parts into which the N * G answers of a round are cut
    epochs: int = 1  # times that a round's answers are used
    method: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    p: float = 1.0  # the exponent of method "holder"
    p_end: float | None = None  # where p ends; None keeps it
    p_shape: str = "linear"
    level: str = "sequence"
    advantage: str = "group"  # or "reward"
    scale_by_std: bool = True
    drop_equal_groups: bool = False  # DAPO: groups whose rewards are all equal do not count
    kl: float = 0.0  # weight of the KL divergence to the reference
    temperature: float = 1.0
    seed: int = 0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient's norm
    warmup: int = 0  # steps
    schedule: str = "constant"
    precision: str = "fp32"
    evaluate_every: int = 0  # rounds; 0 evaluates at the start and at the end
    evaluation_problems: int = 0  # problems of the validation side in each evaluation; 0 evaluates never
    checkpoint_every: int = 0  # rounds

    def __post_init__(self):
        sizes = (self.rounds, self.prompts, self.samples, self.minibatches, self.epochs)
        if min(sizes) < 1 or (self.prompts * self.samples) % self.minibatches:
            raise LabError(f"{self.prompts} prompts x {self.samples} samples in {self.minibatches} minibatches, "
                           f"{self.epochs} epochs, {self.rounds} rounds: this is no plan.",
                           "Use whole numbers of 1 or more, and minibatches that divide prompts x samples.")
        if self.advantage not in ("group", "reward"):
            raise LabError(f"There is no advantage {self.advantage!r}.", "Choose group or reward.")
        if self.advantage == "group" and self.samples == 1:
            raise LabError("A group of one answer has nothing to compare it with: its advantage is 0.",
                           'Draw 2 samples or more, or use advantage="reward".')
        self.training()  # refuses what the loop would refuse

    @property
    def updates(self) -> int:
        """Steps a round."""
        return self.minibatches * self.epochs

    def training(self) -> TrainSettings:
        """The settings of the loop underneath."""
        shared = {field.name for field in dataclasses.fields(TrainSettings)}
        same = {name: value for name, value in vars(self).items() if name in shared}
        return TrainSettings(**same | {
            "steps": self.rounds * self.updates, "batch": self.prompts * self.samples // self.minibatches,
            "evaluate_every": self.evaluate_every * self.updates,
            "checkpoint_every": self.checkpoint_every * self.updates})

    def exponent(self, round_: int) -> float:
        """p of a round: held while its answers are used, as in HölderPO's code."""
        return self.p if self.p_end is None else annealed(round_, self.rounds, self.p, self.p_end, self.p_shape)


@dataclass
class Batch:
    """What the steps of a round learn from; all tensors have B = N * G rows."""

    drawn: Rollout
    advantage_B: Tensor
    old_logp_BA: Tensor
    reference_logp_BA: Tensor | None  # None without a KL penalty
    kept_B: Tensor  # False where a whole group had equal rewards and the settings drop such groups
    facts: dict[str, Tensor]  # of the round, for history.rollouts
    seconds: float  # of drawing and scoring


def advantages(reward_B: Tensor, settings: GRPOSettings) -> tuple[Tensor, Tensor]:
    """The advantage of each answer, and whether it counts."""
    reward_NG = reward_B.view(-1, settings.samples)
    mixed_N = (reward_NG != reward_NG[:, :1]).any(1)
    kept_B = mixed_N.repeat_interleave(settings.samples) if settings.drop_equal_groups else torch.ones_like(
        reward_B, dtype=torch.bool)
    if settings.advantage == "reward":
        return reward_B, kept_B
    return group_advantage(reward_NG, scale_by_std=settings.scale_by_std).flatten(), kept_B


@torch.no_grad()
def collect(model: GPT, world: World, settings: GRPOSettings, round_: int, reference: GPT | None) -> Batch:
    """Draw a round's answers, judge them, and score them once under the policy that learns.

    The ratios compare the learner with itself, not with the sampler: bf16 sampling would make them differ from 1 before
    anything was learned.
    """
    start = time.perf_counter()
    drawn = roll_out(model, world, prompts=settings.prompts, samples=settings.samples, seed=settings.seed, step=round_,
                     temperature=settings.temperature)
    advantage_B, kept_B = advantages(drawn.reward_B, settings)
    logp_BA, entropy_BA = answer_logprob(model, drawn.prompt_BT, drawn.answer_BA, temperature=settings.temperature)
    reference_BA = None if reference is None else answer_logprob(
        reference, drawn.prompt_BT, drawn.answer_BA, temperature=settings.temperature)[0]
    facts = facts_of(drawn, entropy_BA, settings.samples)
    if drawn.reward_B.is_cuda:
        torch.cuda.synchronize(drawn.reward_B.device)  # else the clock would stop before the GPU does
    return Batch(drawn, advantage_B, logp_BA, reference_BA, kept_B, facts, time.perf_counter() - start)


def facts_of(drawn: Rollout, entropy_BA: Tensor, samples: int) -> dict[str, Tensor]:
    """Means over a round: reward, cut-off answers, tokens an answer, groups with unequal rewards, entropy in nats."""
    length_B, ended_B = answer_lengths(drawn.answer_BA)
    reward_NG = drawn.reward_B.view(-1, samples)
    return {"reward": drawn.reward_B.mean(), "truncated": (~ended_B).float().mean(), "tokens": length_B.float().mean(),
            "mixed_groups": (reward_NG != reward_NG[:, :1]).any(1).float().mean(),
            "entropy": (entropy_BA * drawn.mask_BA).sum() / length_B.sum()}


def minibatch(settings: GRPOSettings, round_: int, update: int, device: torch.device) -> Tensor | slice:
    """Rows of one step: a part of a permutation that each epoch draws anew."""
    if settings.minibatches == 1:
        return slice(None)
    epoch, part = divmod(update, settings.minibatches)
    rows = settings.prompts * settings.samples
    order_B = torch.randperm(rows, generator=generator_for(settings.seed, round_, 2, epoch))
    return order_B.chunk(settings.minibatches)[part].to(device)


def batch_loss(model: GPT, batch: Batch, rows: Tensor | slice, settings: GRPOSettings,
               p: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective on some rows of a round."""
    drawn = batch.drawn
    mask_BA = drawn.mask_BA[rows] & batch.kept_B[rows, None]
    logp_BA = answer_logprob(model, drawn.prompt_BT[rows], drawn.answer_BA[rows], temperature=settings.temperature)[0]
    old_logp_BA = batch.old_logp_BA[rows] if settings.updates > 1 else logp_BA.detach()  # then the ratio is exactly 1
    loss, stats = policy_loss(logp_BA, old_logp_BA, batch.advantage_B[rows], mask_BA, method=settings.method,
                              clip_low=settings.clip_low, clip_high=settings.clip_high, p=p, level=settings.level)
    if batch.reference_logp_BA is not None:
        stats["kl"] = reference_kl(logp_BA, batch.reference_logp_BA[rows], mask_BA)
        loss = loss + settings.kl * stats["kl"]
        stats["kl"] = stats["kl"].detach()
    return loss, stats


def grpo(model: GPT, world: World, settings: GRPOSettings, *, reference: GPT | None = None,
         after_step: Callable[[GPT, int], None] | None = None, checkpoint: Path | None = None,
         label: str = "reinforcement learning") -> History:
    """Train `model` in place on the problems of a world's training side.

    Args:
        reference: the policy to stay near; needed where `settings.kl` is above 0.
        after_step: called with the model and the number of steps done, e.g. a `Keep`.
        checkpoint: a file to continue from if it exists, written every `checkpoint_every` rounds.
    Returns:
        a History: `train` a row a step; `rollouts` a row a round (`facts_of` it, the means of policy_loss's stats over
        its steps, seconds of drawing); `evaluations`: sampled accuracy on the validation side.
    Raises:
        LabError: the answers do not fit into the model's context; kl without a reference, or with the learner as one.
    """
    if settings.kl and (reference is None or reference is model):
        raise LabError("A KL penalty needs a policy to stay near, which does not learn itself.",
                       "Pass reference=, a copy of the base model.")
    history, device = History(), model.embedding.weight.device
    reference = reference if settings.kl else None
    batch: Batch | None = None
    stats_of_round: list[dict[str, Tensor]] = []

    def loss_at(model: GPT, step: int) -> Tensor:
        nonlocal batch
        round_, update = divmod(step, settings.updates)
        if update == 0:
            batch = collect(model, world, settings, round_, reference)
            stats_of_round.clear()
        loss, stats = batch_loss(model, batch, minibatch(settings, round_, update, device), settings,
                                 settings.exponent(round_))
        stats_of_round.append(stats)
        if update == settings.updates - 1:
            record_round(history, round_, batch, stats_of_round)
        return loss

    def evaluate(model: GPT) -> dict[str, float]:
        return {"accuracy": accuracy(model, world, problems=settings.evaluation_problems, split="validation",
                                     temperature=settings.temperature, seed=VALIDATION_SEED)}

    return train(model, loss_at, settings.training(), evaluate=evaluate if settings.evaluation_problems else None,
                 after_step=after_step, history=history, status=lambda history: status_of(history, settings),
                 checkpoint=checkpoint, label=label,
                 identity=f"{settings} {world.name} {fingerprint(model)} {reference and fingerprint(reference)}")


def record_round(history: History, round_: int, batch: Batch, stats_of_round: list[dict[str, Tensor]]) -> None:
    """A row of history.rollouts; all its numbers come from the device at once."""
    means = {name: torch.stack([stats[name] for stats in stats_of_round]).mean() for name in stats_of_round[0]}
    facts = {**means, **batch.facts}  # the exact entropy of a round replaces policy_loss's estimate
    numbers = torch.stack([fact.float() for fact in facts.values()]).tolist()
    append_row(history.rollouts, round=round_, **dict(zip(facts, numbers, strict=True)), seconds=batch.seconds)


def throughput(history: History, settings: GRPOSettings) -> dict[str, float]:
    """Answers and answer tokens that a run drew, judged and scored in a second; the steps are not counted."""
    seconds = sum(history.rollouts["seconds"])
    answers = settings.prompts * settings.samples
    return {"rollouts_per_s": answers * len(history.rollouts["seconds"]) / seconds,
            "tokens_per_s": answers * sum(history.rollouts["tokens"]) / seconds}


def status_of(history: History, settings: GRPOSettings) -> str:
    """For the progress bar: accuracy of the last five rounds' answers, and how fast they come.

    The standard error counts problems, not answers: those of one group stand or fall together.
    """
    if not history.rollouts:
        return "first round"  # it is not over before its last step
    recent = history.rollouts["reward"][-5:]
    mean = sum(recent) / len(recent)
    error = math.sqrt(mean * (1 - mean) / (len(recent) * settings.prompts))
    return f"accuracy {mean:.2f} ± {error:.2f}, {throughput(history, settings)['rollouts_per_s']:,.0f} rollouts/s"
