"""On-policy distillation: the student draws answers, and the teacher says at each token what it would have done.

    y ~ pi(. | x);    L = sum_t D(pi(. | x, y_<t), pi_T(. | x, y_<t)) / number of answer tokens in the batch

D is the reverse KL over the whole vocabulary unless the settings say otherwise (labkit.objectives.distill_loss has the
supports and directions). The answers are drawn afresh at every step and no gradient flows through drawing them: what a
token does to later states is not counted. There is no task reward; the verifier only keeps the books.
Sources: GKD, arXiv 2306.13649; MiniLLM, 2306.08543; K. Lu and Thinking Machines, On-Policy Distillation (2025).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.models import GPT, answer_logits
from labkit.objectives import distill_loss
from labkit.tasks import World
from labkit.trainers.checkpoint import fingerprint
from labkit.trainers.loop import History, TrainSettings, append_row, train
from labkit.trainers.rollout import roll_out


@dataclass(frozen=True)
class DistillSettings:
    """One run of on-policy distillation: every step draws `prompts` x `samples` answers and learns from them once."""

    steps: int
    learning_rate: float
    prompts: int = 64
    samples: int = 2
    support: str = "full"  # or "topk", "sampled"
    k: int | None = None
    direction: str = "reverse"  # or "forward", "jsd"
    renormalize: bool = True
    temperature: float = 1.0  # of drawing; student and teacher are compared at 1
    seed: int = 0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    precision: str = "fp32"
    checkpoint_every: int = 0

    def __post_init__(self):
        if min(self.prompts, self.samples) < 1:
            raise LabError(f"{self.prompts} prompts x {self.samples} samples: this is no plan.",
                           "Use whole numbers of 1 or more.")
        if self.support == "sampled" and self.temperature != 1:
            raise LabError(f"Tokens drawn at temperature {self.temperature} are no sample of the student.",
                           'Use temperature 1 with support="sampled".')
        self.training()  # refuses what the loop would refuse

    def training(self) -> TrainSettings:
        """The settings of the loop underneath."""
        shared = {field.name for field in dataclasses.fields(TrainSettings)}
        same = {name: value for name, value in vars(self).items() if name in shared}
        return TrainSettings(**same, batch=self.prompts * self.samples)


def distill(student: GPT, teacher: GPT, world: World, settings: DistillSettings, *,
            after_step: Callable[[GPT, int], None] | None = None, checkpoint: Path | None = None,
            label: str = "distillation") -> History:
    """Train `student` in place towards `teacher` on the student's own answers to a world's training problems.

    Returns:
        a History; `rollouts` has a row a step: reward (never used in the loss) and answer tokens.
    Raises:
        LabError: the answers do not fit into the context, or the vocabularies differ.
    """
    history = History()

    def loss_at(student: GPT, step: int) -> Tensor:
        drawn = roll_out(student, world, prompts=settings.prompts, samples=settings.samples, seed=settings.seed,
                         step=step, temperature=settings.temperature)
        with torch.no_grad():
            teacher_BAV = answer_logits(teacher, drawn.prompt_BT, drawn.answer_BA)
        student_BAV = answer_logits(student, drawn.prompt_BT, drawn.answer_BA)
        sampled = {"token_N": drawn.answer_BA.flatten()} if settings.support == "sampled" else {}
        loss_N = distill_loss(student_BAV.flatten(0, 1), teacher_BAV.flatten(0, 1), support=settings.support,
                              k=settings.k, direction=settings.direction, renormalize=settings.renormalize,
                              mask_N=drawn.mask_BA.flatten(), **sampled)
        tokens = drawn.mask_BA.sum()
        append_row(history.rollouts, step=step, reward=float(drawn.reward_B.mean()), tokens=float(tokens))
        return loss_N.sum() / tokens

    return train(student, loss_at, settings.training(), after_step=after_step, history=history, checkpoint=checkpoint,
                 label=label, identity=f"{settings} {world.name} {fingerprint(student)} {fingerprint(teacher)}")
