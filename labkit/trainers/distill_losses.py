"""From a rollout and what the teacher says of it to one number: losses of positions, which count, their mean."""

import torch
from torch import Tensor

from labkit.kernels.sparse_head_topk_kl import sparse_head_topk_kl
from labkit.kernels.token_logprob import token_logprob
from labkit.models import GPT, answer_hidden, answer_logits
from labkit.objectives import TeacherList, distill_loss, future_cost
from labkit.tasks.alphabet import END
from labkit.trainers.distill_settings import DistillSettings
from labkit.trainers.rollout import Rollout

OF_THE_LOSS = ("support", "k", "menu", "mode", "baseline", "direction", "beta", "renormalize")


def position_losses(student: GPT, drawn: Rollout, teacher: Tensor | TeacherList, mask_BA: Tensor,
                    settings: DistillSettings) -> tuple[Tensor, Tensor | None]:
    """The loss of each answer position, [B, A], and the student's logits, which the sparse head does not make.

    With gamma the gradient also holds what the token costs later: F_t grad log q(y_t), where F sums later losses.
    """
    if sparse_head_will_do(teacher, settings):
        hidden_BAD = answer_hidden(student, drawn.prompt_BT, drawn.answer_BA)
        loss_N = sparse_head_topk_kl(hidden_BAD.flatten(0, 1), student.head_weight, *teacher,
                                     direction=settings.direction)
        return loss_N.view_as(mask_BA).masked_fill(~mask_BA, 0.0), None
    logits_BAV = answer_logits(student, drawn.prompt_BT, drawn.answer_BA)
    sampled = {"token_N": drawn.answer_BA.flatten()} if settings.support == "sampled" else {}
    teacher = teacher if isinstance(teacher, TeacherList) else teacher.flatten(0, 1)
    losses_BA = distill_loss(logits_BAV.flatten(0, 1), teacher, mask_N=mask_BA.flatten(), **sampled,
                             **settings.only(OF_THE_LOSS)).view_as(mask_BA)
    if settings.gamma:
        logp_BA = token_logprob(logits_BAV.flatten(0, 1), drawn.answer_BA.flatten())[0].view_as(losses_BA)
        future_BA = future_cost(losses_BA, mask_BA, settings.gamma)
        losses_BA = losses_BA + future_BA * (logp_BA - logp_BA.detach())  # the bracket is 0, its gradient is not
    return losses_BA, logits_BAV


def sparse_head_will_do(teacher: Tensor | TeacherList, settings: DistillSettings) -> bool:
    """Whether K rows of the head decide the whole loss (see the kernel). On a CPU a small head is faster dense."""
    return (isinstance(teacher, TeacherList) and teacher.id_NK.is_cuda and settings.direction != "jsd"
            and settings.mode in (None, "renorm") and settings.renormalize and not settings.gamma
            and not settings.kl_start)


def counted(drawn: Rollout, settings: DistillSettings) -> Tensor:
    """The positions that count, [B, A]: those of the answer but for dropped answers and ignored tokens."""
    mask_BA = drawn.mask_BA
    if settings.ignore:
        mask_BA = mask_BA & ~torch.isin(drawn.answer_BA, torch.tensor(settings.ignore, device=mask_BA.device))
    return mask_BA & ~truncated(drawn, settings)[:, None] if settings.drop_truncated else mask_BA


def truncated(drawn: Rollout, settings: DistillSettings) -> Tensor:
    """Whether each answer came to the cap without a token that ends it: [B], bool."""
    stop_S = torch.tensor((END, *settings.stop_also), device=drawn.answer_BA.device)
    return ~(torch.isin(drawn.answer_BA, stop_S) & drawn.mask_BA).any(1)


def average(losses_BA: Tensor, mask_BA: Tensor, weighting: str) -> Tensor:
    """Mean over the counted tokens of the batch, or over answers of each one's mean. 0 where nothing counts."""
    if weighting == "token":
        return losses_BA.sum() / mask_BA.sum().clamp(min=1)
    tokens_B = mask_BA.sum(1)
    return (losses_BA.sum(1) / tokens_B.clamp(min=1)).sum() / (tokens_B > 0).sum().clamp(min=1)
