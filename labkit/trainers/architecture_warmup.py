"""One arm of a contest of stabilisers: locked blocks, gains, clipping, QK-norm, QK-clip, soft-cap, longer warm-up.

Every seed with every learning rate is one model of a stack (labkit.trainers.stack). The learning rate rises linearly
for `warmup` steps and falls linearly to 0 behind; AdamW; no clipping unless the arm is clipping. Batches depend on
(seed, step) alone, so all arms and rates of a seed read the same text from the same initial weights. A locked block is
not computed, and FLOPs are counted accordingly.
Source: Taming Curvature (arXiv 2606.16768).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from labkit.data import generator_for, random_windows
from labkit.errors import LabError
from labkit.measure.curvature import Product, preconditioned
from labkit.measure.flops import training_flops
from labkit.models import GPT, GPTConfig
from labkit.models.explicit_attention import ExplicitAttention, clip_queries_and_keys
from labkit.models.locked_blocks import BlockLock, gain_gate, prepare_block, prores_gains, set_gains, set_locked
from labkit.trainers.pretrain import EVALUATION_SEED
from labkit.trainers.schedule import learning_rate_factor
from labkit.trainers.stack import StackedAdamW, clip_stack, stack_weights, stacked_losses


@dataclass(frozen=True)
class Arm:
    """What an arm does that the base does not."""

    lock: BlockLock | None = None
    warmup: int | None = None  # steps of learning-rate warm-up, where not those of the plan
    clip: float | None = None  # largest gradient norm
    qk_norm: bool = False
    qk_clip: float | None = None  # largest attention logit, held by shrinking queries and keys
    cap: float | None = None  # of the attention logits, by tanh
    prores: int | None = None  # steps over which ProRes opens the last layer


@dataclass(frozen=True)
class StackPlan:
    """What all arms share. The stack holds len(rates) * len(seeds) models, rate by rate."""

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    batch: int = 8
    context: int = 32
    warmup: int = 30
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    precision: str = "fp32"  # or "bf16"
    evaluation_windows: int = 128

    def __post_init__(self):
        if self.steps < 1 or not self.rates or not self.seeds or not 0 <= self.warmup <= self.steps:
            raise LabError(f"steps={self.steps}, warmup={self.warmup}, {len(self.rates)} rates and {len(self.seeds)} "
                           "seeds are no plan.", "Use 0 <= warmup <= steps, and at least one of the others.")
        if self.precision not in ("fp32", "bf16"):
            raise LabError(f"There is no precision {self.precision!r}.", "Choose fp32 or bf16.")

    @property
    def models(self) -> list[tuple[float, int]]:
        """(rate, seed) of each model of the stack."""
        return [(rate, seed) for rate in self.rates for seed in self.seeds]


@dataclass
class StackHistory:
    """What happened to each model of a stack."""

    models: list[tuple[float, int]]
    loss_NM: np.ndarray  # training loss before each of the N steps
    peak_NM: np.ndarray  # largest attention logit of any layer and head
    start_M: np.ndarray  # held-out loss before the first step
    end_M: np.ndarray  # and after the last
    flops: int  # of one model

    def by_seed(self, rate: float, values_M: Sequence[float] | None = None) -> dict[int, float]:
        """{seed: value} at one rate; the held-out loss at the end without `values_M`."""
        values_M = self.end_M if values_M is None else values_M
        return {seed: float(value) for (each, seed), value in zip(self.models, values_M, strict=True) if each == rate}


def build_model(config: GPTConfig, arm: Arm, seed: int = 0) -> GPT:
    """A decoder for this arm. Equal seeds give equal matrices in all arms."""
    config = replace(config, qk_norm=arm.qk_norm)
    gained = arm.prores is not None or (arm.lock is not None and arm.lock.reading == "ramp")
    gate = {"gate": gain_gate} if gained else {}
    return GPT(config, attention=ExplicitAttention(arm.cap), seed=seed, **gate)


class StackRun:
    """A stack in training: `advance()` makes one step. Open to be looked at between steps."""

    def __init__(self, config: GPTConfig, tokens_M: Tensor, plan: StackPlan, arm: Arm):
        self.plan, self.arm, self.tokens, self.device, self.steps_done = plan, arm, tokens_M, tokens_M.device, 0
        drawn = {seed: build_model(config, arm, seed) for seed in plan.seeds}
        self.model = build_model(config, arm).to(self.device)
        self.config = self.model.config
        stacked = stack_weights([drawn[seed] for _, seed in plan.models])
        self.weights = {name: each.detach().to(self.device).requires_grad_() for name, each in stacked.items()}
        rate_M = torch.tensor([rate for rate, _ in plan.models], device=self.device)
        self.optimizer = StackedAdamW(self.weights, rate_M, betas=plan.betas, eps=plan.eps,
                                      weight_decay=plan.weight_decay)
        self.active = self.active_at(0)

    def active_at(self, step: int) -> list[int]:
        """Layers that are computed at this step."""
        layers = self.config.layers
        return list(range(layers)) if self.arm.lock is None else self.arm.lock.active(layers, step)

    def set_architecture(self, step: int) -> None:
        """Unlock what is due, and set gains."""
        lock, layers = self.arm.lock, self.config.layers
        self.active = self.active_at(step)
        set_locked(self.model, self.active)
        for layer in lock.due(layers, step) if lock else []:
            noise = [generator_for(seed, step, layer) for _, seed in self.plan.models]
            prepare_block(self.weights, layer, lock, self.config, noise)
        if self.arm.prores is not None:
            set_gains(self.model, prores_gains(layers, step, self.arm.prores))
        elif lock is not None and lock.reading == "ramp":
            set_gains(self.model, lock.gains(layers, step))

    def trained(self) -> dict[str, Tensor]:
        """The weights that are not locked."""
        locked = {f"blocks.{layer}." for layer in range(self.config.layers) if layer not in self.active}
        return {name: each for name, each in self.weights.items() if not name.startswith(tuple(locked))}

    def windows(self, step: int) -> Tensor:
        """Each model's batch, [M, B, T + 1]; models of one seed have the same."""
        plan = self.plan
        drawn = {seed: random_windows(self.tokens, batch=plan.batch, length=plan.context + 1, seed=seed, step=step)
                 for seed in plan.seeds}
        return torch.stack([drawn[seed] for _, seed in plan.models])

    def losses(self, windows_MBT1: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [M] and largest attention logits [M, L, H] of the active layers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            loss_M, peak_MLH = stacked_losses(self.model, self.weights, windows_MBT1)
        return loss_M.float(), peak_MLH.float()

    def advance(self) -> tuple[Tensor, Tensor]:
        """One step; the loss before it and the largest attention logit, each [M]."""
        step, arm = self.steps_done, self.arm
        self.set_architecture(step)
        loss_M, peak_MLH = self.losses(self.windows(step))
        trained = self.trained()
        gradient = dict(zip(trained, torch.autograd.grad(loss_M.sum(), list(trained.values())), strict=True))
        if arm.clip is not None:
            gradient = clip_stack(gradient, arm.clip)
        self.optimizer.step(gradient, self.rate_factor(step))
        if arm.qk_clip is not None:
            clip_queries_and_keys(self.weights, self.active, peak_MLH, arm.qk_clip, self.config)
        self.steps_done += 1
        return loss_M.detach(), peak_MLH.flatten(1).amax(1)

    def curvature(self, probe_MBT1: Tensor, also: Sequence[str] = ()) -> tuple[Product, dict[str, Tensor]]:
        """The map u -> G u and Adam's P on a probe, as labkit.measure.curvature wants them, over the matrices of the
        active blocks; in fp32 whatever the precision of training. Without embedding and head, unless `also` names them:
        a row of a token that hardly occurred has P near eps, and one occurrence in the probe then outweighs all."""
        blocks = [name for name, each in self.trained().items() if name.startswith("blocks.") and each.ndim == 3]
        spread = {name: self.optimizer.spread(name) for name in (*blocks, *also)}
        loss_M, _ = stacked_losses(self.model, self.weights, probe_MBT1)
        return preconditioned(loss_M, self.weights, spread), spread

    def rate_factor(self, step: int) -> float:
        """Linear warm-up, then linear decay to 0."""
        warmup, steps = self.plan.warmup if self.arm.warmup is None else self.arm.warmup, self.plan.steps
        return learning_rate_factor(step, steps, warmup=warmup, decay=(steps - warmup) / steps)

    @torch.no_grad()
    def held_out(self, held_out_M: Tensor, chunk: int = 16) -> Tensor:
        """Each model's loss on the same windows of a held-out text, [M]."""
        drawn_NT = random_windows(held_out_M, batch=self.plan.evaluation_windows, length=self.plan.context + 1,
                                  seed=EVALUATION_SEED, step=0)
        models = len(self.plan.models)
        parts = [self.losses(part.expand(models, -1, -1))[0] * len(part) for part in drawn_NT.split(chunk)]
        return torch.stack(parts).sum(0) / len(drawn_NT)


def run_flops(config: GPTConfig, plan: StackPlan, arm: Arm) -> int:
    """Training FLOPs of one model; locked blocks cost nothing."""
    def at(layers: int) -> int:
        return training_flops(replace(config, layers=layers), plan.batch * plan.context, plan.context)

    return sum(at(config.layers if arm.lock is None else len(arm.lock.active(config.layers, step)))
               for step in range(plan.steps))


def train_stack(config: GPTConfig, tokens_M: Tensor, held_out_M: Tensor, plan: StackPlan, arm: Arm) -> StackHistory:
    """All seeds and learning rates of one arm. A model whose loss is not a number keeps its row; others go on."""
    run = StackRun(config, tokens_M, plan, arm)
    run.set_architecture(0)
    start_M = run.held_out(held_out_M)
    rows = [run.advance() for _ in range(plan.steps)]
    loss_NM, peak_NM = (torch.stack(column).cpu().numpy() for column in zip(*rows, strict=True))
    return StackHistory(plan.models, loss_NM, peak_NM, start_M.cpu().numpy(), run.held_out(held_out_M).cpu().numpy(),
                        run_flops(config, plan, arm))
