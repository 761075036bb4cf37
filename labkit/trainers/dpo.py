"""Preference training on fixed pairs of answers: one model by the shared loop, or a stack of models at once.

    L = -log sigmoid(beta (rho(chosen) - rho(rejected)))          labkit.objectives.dpo_loss
    L = mean of -log p(chosen)                                    objective="sft": imitation of the chosen answers

A step takes the next `batch` pairs of the row, and begins again when they end: the order is the caller's. The reference
is the model as it is at the start, and its log-probabilities are computed once. Learning rate: linear to 0.
Source: phase 3 of G-Zero's code (arXiv 2605.09959).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from labkit.errors import LabError
from labkit.models import GPT, answer_logprob
from labkit.models.explicit_attention import ExplicitAttention
from labkit.objectives import dpo_loss
from labkit.tasks import answer_mask
from labkit.trainers.checkpoint import fingerprint
from labkit.trainers.loop import History, TrainSettings, append_row, train
from labkit.trainers.schedule import learning_rate_factor
from labkit.trainers.stack import StackedAdamW, Weights, clip_stack, stack_weights


@dataclass(frozen=True)
class Pairs:
    """N questions, each with a chosen and a rejected answer; answers are filled with END behind their END."""

    prompt_NP: Tensor
    chosen_NA: Tensor
    rejected_NA: Tensor

    def __len__(self) -> int:
        return len(self.prompt_NP)

    def rows(self, index) -> "Pairs":
        """Some of them, in this order."""
        return Pairs(self.prompt_NP[index], self.chosen_NA[index], self.rejected_NA[index])

    def swapped(self, where_N: Tensor) -> "Pairs":
        """With chosen and rejected exchanged in some rows."""
        return Pairs(self.prompt_NP, torch.where(where_N[:, None], self.rejected_NA, self.chosen_NA),
                     torch.where(where_N[:, None], self.chosen_NA, self.rejected_NA))


@dataclass(frozen=True)
class DPOSettings:
    """One run. On a CPU equal settings give equal weights, bit for bit."""

    steps: int
    learning_rate: float
    batch: int = 8
    beta: float = 2.0
    length_normalized: bool = True
    objective: str = "dpo"  # or "sft"
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # of the gradient's norm
    precision: str = "fp32"

    def __post_init__(self):
        if self.objective not in ("dpo", "sft"):
            raise LabError(f"There is no objective {self.objective!r}.", "Choose dpo or sft.")
        if not self.beta > 0:
            raise LabError(f"beta={self.beta} would prefer nothing, or the rejected answers.", "Use a beta above 0.")
        self.training()  # refuses what the loop would refuse

    def training(self) -> TrainSettings:
        """The settings of the loop underneath: no warm-up, linear to 0, no weight decay."""
        return TrainSettings(self.steps, self.learning_rate, batch=self.batch, warmup=0, decay=1.0, weight_decay=0.0,
                             betas=self.betas, clip=self.clip, precision=self.precision)

    def batch_rows(self, pairs: int, step: int) -> Tensor:
        """The rows of a step."""
        return torch.arange(step * self.batch, (step + 1) * self.batch) % pairs


def check_pairs(pairs: Pairs) -> None:
    """Raises LabError where there is nothing to learn from."""
    if not len(pairs):
        raise LabError("There are no pairs to learn from.", "Draw a larger pool, or drop fewer of it.")
    if len(pairs.chosen_NA) != len(pairs) or len(pairs.rejected_NA) != len(pairs):
        raise LabError(f"{len(pairs)} questions have {len(pairs.chosen_NA)} chosen and {len(pairs.rejected_NA)} "
                       "rejected answers.", "Give one of each a question.")


def pair_loss(chosen: Sequence[Tensor], rejected: Sequence[Tensor], settings: DPOSettings) -> tuple[Tensor, dict]:
    """The loss of (logp, reference logp, mask) of both answers."""
    if settings.objective == "sft":
        logp_BA, _, mask_BA = chosen
        loss = -torch.where(mask_BA, logp_BA, 0.0).sum() / mask_BA.sum()
        return loss, {}
    (logp_BA, reference_BA, mask_BA), (other_BA, other_reference_BA, other_mask_BA) = chosen, rejected
    return dpo_loss(logp_BA, other_BA, reference_BA, other_reference_BA, mask_BA, other_mask_BA, beta=settings.beta,
                    length_normalized=settings.length_normalized)


def gpt_logprob(model: GPT, prompt_NP: Tensor, answer_NA: Tensor) -> Tensor:
    """log p of each answer token, [N, A]."""
    return answer_logprob(model, prompt_NP, answer_NA)[0]


def dpo(model: nn.Module, pairs: Pairs, settings: DPOSettings, *, reference: nn.Module | None = None,
        logprob: Callable[[nn.Module, Tensor, Tensor], Tensor] = gpt_logprob,
        mask: Callable[[Tensor], Tensor] = answer_mask, checkpoint: Path | None = None,
        label: str = "preferences") -> History:
    """Train `model` in place.

    Args:
        pairs: on the model's device.
        reference: without it the model as it is now, which a run that goes on from a checkpoint must be given as well.
        logprob, mask: how this kind of model scores answers, and which of their tokens count; those of a labkit GPT
            without them.
        checkpoint: as in `labkit.trainers.train`.
    Returns:
        the history; its `rollouts` have margin, accuracy, chosen and rejected of each step.
    """
    check_pairs(pairs)
    history = History()
    answers = {name: (each, mask(each)) for name, each in
               (("chosen", pairs.chosen_NA), ("rejected", pairs.rejected_NA))}
    with torch.no_grad():
        known = {name: logprob(reference or model, pairs.prompt_NP, each) for name, (each, _) in answers.items()}

    def loss_at(model: nn.Module, step: int) -> Tensor:
        row_B = settings.batch_rows(len(pairs), step).to(pairs.prompt_NP.device)
        sides = [(logprob(model, pairs.prompt_NP[row_B], each[row_B]), known[name][row_B], counts[row_B])
                 for name, (each, counts) in answers.items()]
        loss, stats = pair_loss(*sides, settings)
        append_row(history.rollouts, step=step, **{name: float(value) for name, value in stats.items()})
        return loss

    identity = f"{fingerprint(model)} {len(pairs)} pairs {settings}" if checkpoint else ""
    return train(model, loss_at, settings.training(), history=history, checkpoint=checkpoint, label=label,
                 identity=identity)


# many at once ---------------------------------------------------------------------------------------------------------


@dataclass
class StackTrace:
    """What happened to each of M models: loss before every step, [steps, M]; weights at the steps that were kept."""

    loss: list[Tensor] = field(default_factory=list)
    kept: dict[int, Weights] = field(default_factory=dict)


def stacked_logprob(model: GPT, weights: Weights, prompt_MBP: Tensor, answer_MBA: Tensor) -> Tensor:
    """log p of each answer token under each of M models, [M, B, A]. `model` gives the architecture."""

    def one(weights: Weights, prompt_BP: Tensor, answer_BA: Tensor) -> Tensor:
        model.attention.peaks.clear()
        tokens_BT = torch.cat((prompt_BP, answer_BA[:, :-1]), 1)
        logits_BAV = functional_call(model, weights, (tokens_BT,))[:, prompt_BP.shape[1] - 1 :]
        return F.log_softmax(logits_BAV.float(), -1).gather(-1, answer_BA[..., None])[..., 0]

    return vmap(one)(weights, prompt_MBP, answer_MBA)


def dpo_stack(models: Sequence[GPT], pairs: Sequence[Pairs], settings: DPOSettings,
              rates: Sequence[float] | None = None, *, keep: Sequence[int] = ()) -> tuple[Weights, StackTrace]:
    """M runs of `dpo` at once: model i learns from pairs[i] at rates[i] (the settings' rate without `rates`).

    The models have one shape and stay as they are. Returns the trained weights, name -> [M, ...], and the trace, which
    also has the weights after each of the steps in `keep`. Raises LabError where the numbers do not fit.
    """
    rates = [settings.learning_rate] * len(models) if rates is None else rates
    if not len(models) == len(pairs) == len(rates):
        raise LabError(f"{len(models)} models, {len(pairs)} sets of pairs and {len(rates)} rates are no stack.",
                       "Give one of each a model.")
    for each in pairs:
        check_pairs(each)
    device = models[0].embedding.weight.device
    shape = GPT(models[0].config, attention=ExplicitAttention()).to(device)
    weights = {name: each.detach().clone().requires_grad_() for name, each in stack_weights(models).items()}
    optimizer = StackedAdamW(weights, torch.tensor(rates, device=device), betas=settings.betas, weight_decay=0.0)
    known = [known_logprobs(model, each) for model, each in zip(models, pairs, strict=True)]
    trace = StackTrace()
    for step in range(settings.steps):
        rows = [settings.batch_rows(len(each), step).to(device) for each in pairs]
        loss_M = stacked_pair_loss(shape, weights, pairs, known, rows, settings)
        gradient = dict(zip(weights, torch.autograd.grad(loss_M.sum(), list(weights.values())), strict=True))
        factor = learning_rate_factor(step, settings.steps, warmup=0, decay=1.0)
        optimizer.step(clip_stack(gradient, settings.clip), factor)
        trace.loss.append(loss_M.detach())
        if step + 1 in keep:
            trace.kept[step + 1] = {name: each.detach().clone() for name, each in weights.items()}
    return {name: each.detach() for name, each in weights.items()}, trace


@torch.no_grad()
def known_logprobs(model: GPT, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """log-probabilities of all chosen and all rejected answers under the reference."""
    return tuple(gpt_logprob(model, pairs.prompt_NP, each) for each in (pairs.chosen_NA, pairs.rejected_NA))


def stacked_pair_loss(shape: GPT, weights: Weights, pairs: Sequence[Pairs], known: Sequence[tuple[Tensor, Tensor]],
                      rows: Sequence[Tensor], settings: DPOSettings) -> Tensor:
    """The loss of each model on its rows, [M]. Both answers of all pairs go through the model as one batch."""
    part = [each.rows(row) for each, row in zip(pairs, rows, strict=True)]
    prompt_MBP = torch.stack([each.prompt_NP for each in part])
    answer_MCA = torch.stack([torch.cat((each.chosen_NA, each.rejected_NA)) for each in part])
    reference_MCA = torch.stack([torch.cat((chosen[row], rejected[row]))
                                 for (chosen, rejected), row in zip(known, rows, strict=True)])
    mask_MCA = answer_mask(answer_MCA.flatten(0, 1)).view(answer_MCA.shape)
    logp_MCA = stacked_logprob(shape, weights, prompt_MBP.repeat(1, 2, 1), answer_MCA)

    def loss(*three: Tensor) -> Tensor:
        chosen, rejected = zip(*(each.chunk(2) for each in three), strict=True)
        return pair_loss(chosen, rejected, settings)[0]

    return vmap(loss)(logp_MCA, reference_MCA, mask_MCA)


def unstacked(shape: GPT, weights: Weights) -> list[GPT]:
    """The models of a stack, one by one; `shape` gives the architecture and the attention."""
    models = []
    for m in range(len(next(iter(weights.values())))):
        model = GPT(shape.config, attention=shape.attention).to(shape.embedding.weight.device)
        model.load_state_dict({name: each[m] for name, each in weights.items()})
        models.append(model)
    return models
