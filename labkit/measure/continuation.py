"""What a teacher is worth as the one who goes on: it and the student continue the same prefixes of the student.

    delta(L) = acc_T(L) - acc_S(L)                                 after the first L tokens of the student's answers
    delta = pi_ok delta_ok + (1 - pi_ok) delta_broken              pi_ok: the share of prefixes without an error

delta falls with L for two reasons. Doom: pi_ok falls, and on a broken prefix nobody can be right any more.
Unreliability: on error-free prefixes of the student the teacher is worse than on its own of equal length. Only the
second is a flaw of what the teacher says at such prefixes, and delta alone does not tell the two apart.
Source: the continuation advantage of arXiv 2604.13016, section 6.1 and figure 11b; the split by errors is ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.models import GPT, generate
from labkit.tasks import World, answer_lengths
from labkit.tasks.alphabet import END


@dataclass(frozen=True)
class ContinuationPoint:
    """All at one cut. A mean over no prefixes is NaN."""

    cut: int  # L, the tokens of the prefix
    rollouts: int  # how many prefixes, N
    ended: float  # the share of them that already had their END
    teacher: float  # acc_T on the student's prefixes
    student: float  # acc_S on the same
    advantage: float  # delta
    standard_error: float  # of delta, over prefixes
    clean_share: float  # pi_ok
    advantage_clean: float  # delta_ok
    advantage_broken: float  # delta_broken
    teacher_clean: float  # acc_T on the student's error-free prefixes
    teacher_own: float  # acc_T on prefixes of its own of L tokens
    teacher_own_clean: float  # the same on those without an error


def continue_prefixes(model: GPT, world: World, prompt_NT: Tensor, prefix_NL: Tensor, *, samples: int,
                      generator: torch.Generator | None, cap: int | None = None, temperature: float = 1.0,
                      top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The share of right answers among `samples` continuations of each prefix, [N], float64.

    Prefix and continuation have at most `cap` tokens (the world's answer_length by default). A prefix that holds END is
    an answer already: nothing is drawn for it and the verifier judges it as it is.
    """
    (N, L), cap = prefix_NL.shape, world.answer_length if cap is None else cap
    going_N = ~answer_lengths(prefix_NL)[1]
    tail_NSR = prefix_NL.new_full((N, samples, cap - L), END)
    if going_N.any():
        text_MT = torch.cat((prompt_NT, prefix_NL), 1)[going_N]
        drawn = generate(model, text_MT, max_new_tokens=cap - L, temperature=temperature, top_k=top_k, top_p=top_p,
                         stop_tokens=(END,), generator=generator, samples=samples)
        tail_NSR[going_N] = drawn.tokens_BT.view(-1, samples, cap - L)
    answer_BA = torch.cat((prefix_NL[:, None].expand(N, samples, L), tail_NSR), 2).flatten(0, 1)
    correct_B = world.verify(prompt_NT.repeat_interleave(samples, 0), answer_BA)
    return correct_B.double().view(N, samples).mean(1)


def continuation_advantage(student: GPT, teacher: GPT, world: World, prompt_NT: Tensor, *, cuts: Sequence[int],
                           samples: int, generator: torch.Generator | None,
                           clean: Callable[[Tensor, Tensor], Tensor], cap: int | None = None, temperature: float = 1.0,
                           top_k: int | None = None, top_p: float | None = None,
                           select: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[ContinuationPoint]:
    """The continuation advantage at each cut, with its split.

    The student answers each prompt once; at every cut both models continue the same prefixes, `samples` times each,
    with the same sampler and the same cap of the whole answer. The student's side is drawn anew, not its own first
    ending. For the control the teacher answers each prompt once too, and continues prefixes of these.

    Args:
        cuts: tokens of the prefix, each from 0 to cap - 1.
        clean: (prompt, prefix) -> how many tokens stand before the first error, [N], as RunningSum.clean_steps; a
            prefix of L tokens is free of errors where that is L or more.
        cap: the most tokens of an answer, the prefix included; the world's answer_length by default.
        select: (prompt, answer) -> which of the student's rollouts count, [N] bool, at all cuts alike. The paper kept
            long ones, `lambda prompt, answer: answer_lengths(answer)[0] > 16`, which selects failing ones as well. The
            teacher's own rollouts are not selected. By default all count.
    An answer that ended before a cut stays in the means, the same for both, so it adds 0 to delta: as L grows, delta
    goes to 0 for this reason as well. `ended` says how many they are; `select` on long answers leaves them out.
    Raises LabError for cuts outside of the answer, no samples, and no rollouts.
    """
    cap = world.answer_length if cap is None else cap
    if samples < 1 or not all(0 <= cut < cap for cut in cuts):
        raise LabError(f"Cuts at {list(cuts)} with {samples} continuations each make no curve.",
                       f"Cut at 0 to {cap - 1} tokens, and draw one continuation or more.")
    check_shape("prompt_NT", prompt_NT, (None, world.prompt_length), "[N, T]")
    sampler = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    answers = [generate(model, prompt_NT, max_new_tokens=cap, stop_tokens=(END,), generator=generator,
                        **sampler).tokens_BT for model in (student, teacher)]
    chosen_N = torch.ones(len(prompt_NT), dtype=torch.bool, device=prompt_NT.device)
    if select is not None:
        chosen_N = select(prompt_NT, answers[0])
    if not chosen_N.any():
        raise LabError("No rollout of the student is left to cut.", "Give more prompts, or select less.")
    prompt_MT, answer_MA, points = prompt_NT[chosen_N], answers[0][chosen_N], []
    settings = {"samples": samples, "generator": generator, "cap": cap, **sampler}
    for cut in cuts:
        prefix_ML, own_NL = answer_MA[:, :cut], answers[1][:, :cut]
        teacher_M, student_M = (continue_prefixes(model, world, prompt_MT, prefix_ML, **settings)
                                for model in (teacher, student))
        own_N = continue_prefixes(teacher, world, prompt_NT, own_NL, **settings)
        clean_M, own_clean_N = clean(prompt_MT, prefix_ML) >= cut, clean(prompt_NT, own_NL) >= cut
        points.append(_point(cut, answer_lengths(prefix_ML)[1], teacher_M, student_M, clean_M, own_N, own_clean_N))
    return points


def _point(cut: int, ended_M: Tensor, teacher_M: Tensor, student_M: Tensor, clean_M: Tensor, own_N: Tensor,
           own_clean_N: Tensor) -> ContinuationPoint:
    delta_M, M = teacher_M - student_M, len(teacher_M)
    means = [float(part.double().mean()) for part in (
        ended_M, teacher_M, student_M, delta_M, clean_M, delta_M[clean_M], delta_M[~clean_M], teacher_M[clean_M], own_N,
        own_N[own_clean_N])]
    error = float(delta_M.std()) / math.sqrt(M) if M > 1 else math.nan
    return ContinuationPoint(cut, M, *means[:4], error, *means[4:])
