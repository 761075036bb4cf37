"""On-policy distillation: the student draws answers, and the teacher says at each token what it would have done.

    y ~ pi(. | x);    L = sum_t D(pi(. | x, y_<t), pi_T(. | x, y_<t)) / number of answer tokens in the batch

D is the reverse KL over the whole vocabulary unless the settings say otherwise (labkit.objectives.distill_loss has the
supports, menus, modes and directions). The answers are drawn afresh at every step and no gradient flows through drawing
them: what a token does to later states is not counted, unless gamma says how much of it is. There is no task reward;
the verifier only keeps the books. Two stabilisers of arXiv 2604.08527 can be added:

    L + gold * (cross-entropy of one written solution a prompt) + kl_start * KL(pi, pi at the start) on the same states

Sources: GKD, arXiv 2306.13649; MiniLLM, 2306.08543; K. Lu and Thinking Machines, On-Policy Distillation (2025).
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.models import GPT, answer_logits
from labkit.objectives import TeacherList, distill_loss, next_token_loss, top_list
from labkit.tasks import World
from labkit.trainers.checkpoint import fingerprint
from labkit.trainers.distill_losses import average, counted, position_losses, truncated
from labkit.trainers.distill_settings import DistillSettings
from labkit.trainers.loop import History, append_row, train
from labkit.trainers.rollout import Rollout, roll_out, written

Teacher = GPT | Callable[[Tensor, Tensor], Tensor | TeacherList]
Weigh = Callable[[Rollout, Tensor], Tensor]


def distill(student: GPT, teacher: Teacher, world: World, settings: DistillSettings, *, weigh: Weigh | None = None,
            after_step: Callable[[GPT, int], None] | None = None, checkpoint: Path | None = None,
            label: str = "distillation") -> History:
    """Train `student` in place towards `teacher` on the student's own answers to a world's training problems.

    Args:
        teacher: a model with the student's vocabulary, or a function of (prompt_BT, answer_BA) that returns what it
            says at each answer token: logits [B, A, V], or a TeacherList of B * A rows.
        weigh: a function of the rollout and the detached losses [B, A] that returns a weight for each position, for
            example to keep the first third of each answer. The mean divides by the number of positions all the same.
        checkpoint: see train. A teacher that is a function has no fingerprint: resume with the same one.
    Returns:
        a History; `rollouts` has a row a step: reward (never used in the loss), answer tokens that count, mean length
        in tokens, share of truncated answers, and kl, the mean loss of a counted position before weights.
    Raises:
        LabError: the answers do not fit into the context, or the vocabularies differ.
    """
    if isinstance(teacher, GPT) and teacher.config.vocab_size != student.config.vocab_size:
        raise LabError(f"The teacher has {teacher.config.vocab_size} tokens, the student {student.config.vocab_size}.",
                       "Distil between models with one vocabulary; id_map exchanges ids within it.")
    history = History()
    start = copy.deepcopy(student).requires_grad_(False) if settings.kl_start else None
    ask = _asker(teacher, settings)

    def loss_at(student: GPT, step: int) -> Tensor:
        drawn = _answers(student, world, settings, step)
        mask_BA = counted(drawn, settings)
        losses_BA, logits_BAV = position_losses(student, drawn, ask(drawn), mask_BA, settings)
        value_BA = losses_BA.detach()
        append_row(history.rollouts, step=step, **_row(drawn, mask_BA, value_BA, settings))
        losses_BA = losses_BA if weigh is None else losses_BA * weigh(drawn, value_BA)
        loss = average(losses_BA, mask_BA, settings.weighting)
        if start is not None:
            loss = loss + settings.kl_start * average(leash(logits_BAV, start, drawn, mask_BA), mask_BA,
                                                      settings.weighting)
        return loss + settings.gold * gold_loss(student, world, settings, step) if settings.gold else loss

    names = f"{fingerprint(student)} {fingerprint(teacher) if isinstance(teacher, GPT) else 'a function'}"
    return train(student, loss_at, settings.training(), after_step=after_step, history=history, checkpoint=checkpoint,
                 label=label, identity=f"{settings} {world.name} {names}")


def leash(student_BAV: Tensor, start: GPT, drawn: Rollout, mask_BA: Tensor) -> Tensor:
    """KL(student, start) over all tokens at each counted position, [B, A]."""
    with torch.no_grad():
        start_BAV = answer_logits(start, drawn.prompt_BT, drawn.answer_BA)
    return distill_loss(student_BAV.flatten(0, 1), start_BAV.flatten(0, 1), mask_N=mask_BA.flatten()).view_as(mask_BA)


def gold_loss(student: GPT, world: World, settings: DistillSettings, step: int) -> Tensor:
    """Cross-entropy of one written solution for each prompt of the step, per token."""
    gold = written(world, prompts=settings.prompts, seed=settings.seed, step=step, dialect=settings.gold_dialect,
                   device=student.embedding.weight.device)
    return next_token_loss(answer_logits(student, gold.prompt_BT, gold.answer_BA), gold.answer_BA, gold.mask_BA)


def _answers(student: GPT, world: World, settings: DistillSettings, step: int) -> Rollout:
    """The student's own answers of a step, or, in the share that is not on-policy, written solutions."""
    places = {"prompts": settings.prompts, "seed": settings.seed, "step": step}
    # the k-th step is the student's where the sum of the shares passes a whole number: no dice, and evenly spread
    if int((step + 1) * settings.on_policy + 1e-9) == int(step * settings.on_policy + 1e-9):
        return written(world, **places, samples=settings.samples, dialect=settings.gold_dialect,
                       device=student.embedding.weight.device)
    return roll_out(student, world, **places, samples=settings.samples, temperature=settings.temperature,
                    top_p=settings.top_p, stop_also=settings.stop_also)


def _asker(teacher: Teacher, settings: DistillSettings) -> Callable[[Rollout], Tensor | TeacherList]:
    """A function that gets the teacher's logits (or list) at the positions of a rollout, in the student's numbering."""
    if not isinstance(teacher, GPT):
        return lambda drawn: teacher(drawn.prompt_BT, drawn.answer_BA)
    renumber_V = torch.arange(teacher.config.vocab_size, device=teacher.embedding.weight.device)
    for own, others in settings.id_map:
        renumber_V[own], renumber_V[others] = others, own

    def ask(drawn: Rollout) -> Tensor | TeacherList:
        logits_BAV = answer_logits(teacher, renumber_V[drawn.prompt_BT], renumber_V[drawn.answer_BA])
        if settings.id_map:  # only then: it copies all logits
            logits_BAV = logits_BAV[..., renumber_V]
        if settings.support == "topk" and settings.menu == "teacher":  # a list is all that is needed of it
            return top_list(logits_BAV.flatten(0, 1), settings.k)
        return logits_BAV

    return torch.no_grad()(ask)


def _row(drawn: Rollout, mask_BA: Tensor, value_BA: Tensor, settings: DistillSettings) -> dict[str, float]:
    tokens = mask_BA.sum()
    columns = {"reward": drawn.reward_B.mean(), "tokens": tokens, "length": drawn.mask_BA.sum(1).float().mean(),
               "truncated": truncated(drawn, settings).float().mean(), "kl": value_BA.sum() / tokens.clamp(min=1)}
    return dict(zip(columns, torch.stack([column.float() for column in columns.values()]).tolist(), strict=True))
