"""The loop that every trainer shares: loss, gradient, clip, step.

A trainer gives `loss_at(model, step)`, a function of the weights and the step *alone*: batches are drawn from
(seed, step), not from a stream. So the whole state of a run is its weights, its optimizer and the number of the next
step, and an interrupted run that is continued ends with the same weights, bit for bit on a CPU.
Optimizer: AdamW (arXiv 1711.05101) with weight decay on matrices only, or plain SGD; gradients clipped by global norm.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.progress import bar
from labkit.trainers.checkpoint import load_checkpoint, save_checkpoint
from labkit.trainers.schedule import learning_rate_factor


@dataclass(frozen=True)
class TrainSettings:
    """How to train, whatever the objective. On a CPU two runs with equal settings give equal weights, bit for bit."""

    steps: int
    learning_rate: float
    batch: int = 16
    context: int = 64
    seed: int = 0
    optimizer: str = "adamw"  # or "sgd", without momentum
    schedule: str = "wsd"
    warmup: int = 20
    decay: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "fp32"  # or "bf16": products in bfloat16, weights and optimizer stay in fp32
    evaluate_every: int = 0  # steps; 0 evaluates only after the last step
    evaluation_windows: int = 256  # windows of held-out text in each evaluation
    checkpoint_every: int = 0  # steps; 0 writes no checkpoint

    def __post_init__(self):
        if self.steps < 1 or self.batch < 1 or self.context < 1:
            raise LabError(f"Training needs at least one step, sequence and position, not steps={self.steps}, "
                           f"batch={self.batch}, context={self.context}.", "Use whole numbers of 1 or more.")
        if self.evaluation_windows < 1 or not 0 <= self.warmup <= self.steps or self.seed < 0:
            raise LabError(f"evaluation_windows={self.evaluation_windows}, warmup={self.warmup} and seed={self.seed} "
                           f"do not fit {self.steps} steps.", "Use windows >= 1, 0 <= warmup <= steps and seed >= 0.")
        if self.precision not in ("fp32", "bf16"):
            raise LabError(f"There is no precision {self.precision!r}.", "Choose fp32 or bf16.")
        if self.optimizer not in ("adamw", "sgd"):
            raise LabError(f"There is no optimizer {self.optimizer!r}.", "Choose adamw or sgd.")
        learning_rate_factor(0, self.steps, warmup=self.warmup, kind=self.schedule)  # refuses an unknown schedule


@dataclass
class History:
    """What happened, as plain columns: one row a step in `train`, one an evaluation, one a round of rollouts."""

    train: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "loss": [], "gradient_norm": []})
    evaluations: dict[str, list[float]] = field(default_factory=lambda: {"step": []})
    rollouts: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def final_loss(self) -> float:
        """The last held-out loss."""
        return self.evaluations["loss"][-1]


def append_row(table: dict[str, list[float]], **values: float) -> None:
    """One more row of a table of columns."""
    for name, value in values.items():
        table.setdefault(name, []).append(value)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on matrices only: a norm's scale has no reason to be small."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)


def train_step(model: nn.Module, optimizer, loss_at, step: int, settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """One update; returns the loss before it and the gradient's norm, still on the device."""
    factor = learning_rate_factor(step, settings.steps, warmup=settings.warmup, kind=settings.schedule,
                                  decay=settings.decay)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * factor
    device_type = next(model.parameters()).device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=settings.precision == "bf16"):
        loss = loss_at(model, step)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    return loss.detach(), norm


def train(model: nn.Module, loss_at: Callable[[nn.Module, int], Tensor], settings: TrainSettings, *,
          evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
          before_step: Mapping[int, Callable[[nn.Module], None]] | None = None,
          after_step: Callable[[nn.Module, int], None] | None = None, history: History | None = None,
          status: Callable[[History], str] | None = None,
          checkpoint: Path | None = None, identity: str = "", label: str = "training") -> History:
    """Train `model` in place.

    Args:
        loss_at: (model, step) -> scalar loss; must depend on nothing else.
        evaluate: model -> held-out loss, or a mapping of named numbers; called before the first step, every
            `evaluate_every` steps and after the last.
        before_step: things to do to the model once, just before the step of that number.
        after_step: called with the model and the number of steps done, after each; must not change the model.
        history: the table to write into, for a trainer that adds rows of its own; a new one without it.
        status: what the progress bar says; the loss without it.
        checkpoint: a file to continue from if it exists, and to write every `checkpoint_every` steps.
        identity: what else, besides the settings, tells this run from others (model, text, method); a checkpoint of
            another run is refused.
        label: of the progress bar.
    Raises:
        LabError: the checkpoint is damaged or of another run; the loss is not finite.
    """
    optimizer, history, start = make_optimizer(model, settings), history or History(), time.perf_counter()
    identity = f"{settings} {identity}"
    first = load_checkpoint(checkpoint, model, optimizer, history, identity) if checkpoint else 0
    pending: list[tuple[int, Tensor, Tensor]] = []  # not yet read from the device
    with bar(settings.steps, label) as progress:
        progress.update(first)
        for step in range(first, settings.steps):
            if evaluate and (step == 0 or (settings.evaluate_every and step % settings.evaluate_every == 0)):
                record_evaluation(history, step, evaluate, model)
            if before_step and step in before_step:
                before_step[step](model)
            pending.append((step, *train_step(model, optimizer, loss_at, step, settings)))
            progress.update(1)
            if after_step is not None:  # an empty Keep has length 0
                after_step(model, step + 1)
            due = checkpoint and settings.checkpoint_every and (step + 1) % settings.checkpoint_every == 0
            if due or len(pending) == 50 or step + 1 == settings.steps or step == first:
                read_pending(history, pending, label)
                progress.set_postfix_str(status(history) if status else f"loss {history.train['loss'][-1]:.3f}")
            if due:
                save_checkpoint(checkpoint, model, optimizer, history, identity, step + 1)
    if evaluate and history.evaluations["step"][-1:] != [settings.steps]:
        record_evaluation(history, settings.steps, evaluate, model)
    history.seconds += time.perf_counter() - start
    return history


def record_evaluation(history: History, step: int, evaluate, model: nn.Module) -> None:
    """Append a row; a resumed run that stands at an evaluated step does not append it twice."""
    if history.evaluations["step"][-1:] != [step]:
        measured = evaluate(model)
        columns = measured if isinstance(measured, Mapping) else {"loss": measured}
        append_row(history.evaluations, step=step, **columns)


def read_pending(history: History, pending: list, label: str) -> None:
    """Move waiting numbers from the device into the history: one wait for many steps."""
    if pending:
        losses = torch.stack([loss for _, loss, _ in pending]).tolist()
        norms = torch.stack([norm for _, _, norm in pending]).tolist()
        for (step, _, _), loss, norm in zip(pending, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise LabError(f"The loss of {label} stopped being finite at step {step}.",
                               "Lower the learning rate, or raise the warm-up.")
            append_row(history.train, step=step, loss=loss, gradient_norm=norm)
        pending.clear()
