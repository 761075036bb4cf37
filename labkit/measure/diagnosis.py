"""What is wrong with a distillation run? Four ways to fail, told apart by numbers, before a step is trained.

    menu        the teacher's likely tokens are not the student's: what it says falls where the student never goes
    no news     the menus agree and the divergence is small: there is nothing left in the teacher for this student
    loops       answers run into the cap or repeat themselves, and the tokens of loops have the better advantage
    signal      a few tokens, like an end marker with another id, carry the cost (a fake disagreement)
    coherence   large gradients at single positions that do not add up over positions
    horizon     the teacher helps from the start of an answer, and no longer from the student's own later prefixes

(Menu and no news are the two sides of one question, whether this teacher fits; coherence and horizon the two that the
literature left open.) Everything is measured at the student's own answers. The limits are `Limits`: they come from the
small worlds of labs 09 to 12 and say where to look, not what is so.
Sources: arXiv 2604.13016 (menu, coherence, horizon), 2604.08527 (loops), 2603.25562 (signal).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape
from labkit.kernels.token_logprob import token_logprob
from labkit.measure.coherence import head_coherence, logit_gradient
from labkit.measure.decoders import Decoder, decoder_for
from labkit.measure.diagnosis_findings import Finding, Limits, findings
from labkit.measure.menu import menu_overlap, nucleus_overlap
from labkit.measure.repetition import advantage_by_repetition, periodic_tail
from labkit.tasks.alphabet import END

LOGITS_AT_ONCE = 2**26  # positions times vocabulary in the coherence: half a gigabyte in float64


@dataclass(frozen=True)
class Diagnosis:
    """Numbers by name, and what they say."""

    numbers: dict[str, float]
    findings: tuple[Finding, ...]
    cuts: dict[int, tuple[float, float]]  # cut -> right answers of the teacher and of the student from there

    def table(self) -> list[dict[str, object]]:
        """The findings as rows for lab.table."""
        answer = {True: "yes", False: "no", None: "not measured"}
        return [{"what fails": each.mode, "found": answer[each.found], "why": each.sentence} for each in self.findings]


@torch.no_grad()
def diagnose_distillation(student, teacher, prompts: Tensor, *, max_new_tokens: int,
                          stop_tokens: Sequence[int] = (END,), k: int = 16, samples: int = 4, seed: int = 0,
                          shown: Tensor | None = None,
                          verify: Callable[[Tensor, Tensor], Tensor] | None = None, cuts: Sequence[int] = (),
                          limits: Limits | None = None) -> Diagnosis:
    """Draw the student's answers, ask the teacher at every token, and say which failures the numbers show.

    Args:
        student, teacher: two labkit GPTs, or two transformers models with one tokenizer.
        prompts: token ids [N, T]; shorter prompts stand at the right end, with `shown` [N, T] False in front of them
            (a Hugging Face tokenizer with padding_side="left" gives both).
        max_new_tokens, stop_tokens: of the answers.
        k: of the menus; well below the vocabulary.
        samples: answers a prompt.
        verify: (prompts [B, T], answers [B, A]) -> right, [B]: for the horizon. Without it, or without cuts, that is
            not measured.
        cuts: numbers of answer tokens after which teacher and student go on, each from the same prefix.
        limits: where a number begins to speak.
    Memory: the logits of all answers, N * samples * max_new_tokens * V * 8 bytes for two models.
    Raises:
        LabError: vocabularies that differ, no prompts, cuts beyond the answers.
    """
    limits, asked = limits or Limits(), (decoder_for(student), decoder_for(teacher))
    prompts, shown = _checked(asked, prompts, shown, max_new_tokens, cuts)
    generator = torch.Generator(prompts.device).manual_seed(seed)
    stops = tuple(stop_tokens)
    answer_BA = asked[0].draw(prompts, shown, max_new_tokens, stops, samples, generator)
    prompt_BT, shown_BT = prompts.repeat_interleave(samples, 0), shown.repeat_interleave(samples, 0)
    mask_BA, ended_B = _until_stop(answer_BA, stops)
    (hidden_BAD, student_BAV), (_, teacher_BAV) = (each.states(prompt_BT, shown_BT, answer_BA) for each in asked)
    numbers = {"answers": float(len(answer_BA)), "length": float(mask_BA.sum(1).double().mean()),
               "truncated": float((~ended_B).double().mean())}
    numbers |= _menus(student_BAV[mask_BA], teacher_BAV[mask_BA], k)
    numbers |= _costs(student_BAV, teacher_BAV, answer_BA, mask_BA, ended_B)
    numbers |= _coherence(student_BAV[mask_BA], teacher_BAV[mask_BA], hidden_BAD[mask_BA], generator)
    curve = {}
    if verify is not None and cuts:
        cut_from = (prompt_BT, shown_BT, answer_BA, mask_BA)
        curve = {cut: _from_cut(asked, *cut_from, cut, stops, verify, generator) for cut in sorted(cuts)}
    return Diagnosis(numbers, findings(numbers, curve, limits), curve)


def _menus(student_NV: Tensor, teacher_NV: Tensor, k: int) -> dict[str, float]:
    top = menu_overlap(student_NV, teacher_NV, min(k, student_NV.shape[1]))
    nucleus = nucleus_overlap(student_NV, teacher_NV)
    columns = {"overlap": top.ratio_N, "overlap_mass": top.student_mass_N, "overlap_advantage": top.advantage_N,
               "nucleus_jaccard": nucleus.jaccard_N, "shared_mass": nucleus.student_cross_mass_N,
               "entropy_gap": top.entropy_gap_N, "absolute_entropy_gap": top.absolute_entropy_gap_N, "kl": top.kl_N}
    return {name: float(column_N.nanmean()) for name, column_N in columns.items()} | {"chance": top.chance}


def _costs(student_BAV: Tensor, teacher_BAV: Tensor, answer_BA: Tensor, mask_BA: Tensor,
           ended_B: Tensor) -> dict[str, float]:
    """The advantage log p(y) - log q(y) inside and outside of loops, and the token id that carries most of its size."""
    log_q_BA, log_p_BA = (token_logprob(logits.flatten(0, 1), answer_BA.flatten())[0].double().view(answer_BA.shape)
                          for logits in (student_BAV, teacher_BAV))
    advantage_BA = log_p_BA - log_q_BA
    last_BA = mask_BA & (mask_BA.cumsum(1) == mask_BA.sum(1, keepdim=True)) & ended_B[:, None]
    plain_BA = torch.where(mask_BA & ~last_BA, answer_BA + END + 1, END)  # so that END alone ends, whatever the stops
    looped_BA = periodic_tail(plain_BA).looped_NA
    split = advantage_by_repetition(advantage_BA, mask_BA, looped_BA)
    size_M, token_M = advantage_BA[mask_BA].abs(), answer_BA[mask_BA]
    by_token_V = size_M.new_zeros(student_BAV.shape[2]).index_add(0, token_M, size_M)
    worst = int(by_token_V.argmax())
    return {"looped": split.looped_share, "advantage_looped": split.looped, "advantage_other": split.other,
            "worst_token": float(worst), "worst_token_share": float(by_token_V[worst] / size_M.sum().clamp(min=1e-12)),
            "worst_token_advantage": float(advantage_BA[mask_BA & (answer_BA == worst)].mean())}


def _coherence(student_NV: Tensor, teacher_NV: Tensor, hidden_ND: Tensor,
               generator: torch.Generator) -> dict[str, float]:
    """R, rms and norm of the head's gradients, exactly, at as many positions as fit (drawn at random)."""
    N, V = student_NV.shape
    order_N = torch.randperm(N, generator=generator, device=student_NV.device)[: max(1, LOGITS_AT_ONCE // V)]
    ell_NV = logit_gradient(student_NV[order_N], teacher_NV[order_N])
    add = head_coherence(ell_NV, hidden_ND[order_N])
    common = (add.amplification - 1) / (add.positions - 1) if add.positions > 1 else math.nan
    return {"amplification": add.amplification, "common_share": common, "positions": float(add.positions),
            "rms_gradient": add.rms, "mean_gradient": add.norm,
            "rms_logit_gradient": float(ell_NV.square().sum(1).mean().sqrt())}


def _from_cut(asked: tuple[Decoder, Decoder], prompt_BT: Tensor, shown_BT: Tensor, answer_BA: Tensor, mask_BA: Tensor,
              cut: int, stops: tuple[int, ...], verify: Callable, generator: torch.Generator) -> tuple[float, float]:
    """Right answers of teacher and student that go on from the student's first `cut` tokens; ended answers are out."""
    going_B = mask_BA[:, : cut + 1].sum(1) > cut
    if not going_B.any():
        return math.nan, math.nan
    prompt_MT, prefix_ML = prompt_BT[going_B], answer_BA[going_B, :cut]
    text_MT = torch.cat((prompt_MT, prefix_ML), 1)
    shown_MT = torch.cat((shown_BT[going_B], torch.ones_like(prefix_ML, dtype=torch.bool)), 1)
    right = []
    for each in reversed(asked):
        tail_MR = each.draw(text_MT, shown_MT, answer_BA.shape[1] - cut, stops, 1, generator)
        right.append(float(verify(prompt_MT, torch.cat((prefix_ML, tail_MR), 1)).double().mean()))
    return right[0], right[1]


def _until_stop(answer_BA: Tensor, stops: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The tokens up to each answer's first stop, that included, and whether there is one."""
    stop_BA = torch.isin(answer_BA, torch.tensor(stops, device=answer_BA.device))
    return (stop_BA.cumsum(1) - stop_BA.long()) == 0, stop_BA.any(1)


def _checked(asked: tuple[Decoder, Decoder], prompts: Tensor, shown: Tensor | None, new: int,
             cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    check_shape("prompts", prompts, (None, None), "[N, T]")
    if not len(prompts):
        raise LabError("There is no prompt to answer.", "Give at least one; a few dozen make the numbers steady.")
    if asked[0].vocabulary != asked[1].vocabulary:
        raise LabError(f"The student has {asked[0].vocabulary} tokens, the teacher {asked[1].vocabulary}.",
                       "Compare models with one tokenizer.")
    if not all(0 <= cut < new for cut in cuts):
        raise LabError(f"Answers of {new} tokens cannot be cut at {list(cuts)}.", f"Cut at 0 to {new - 1}.")
    shown = torch.ones_like(prompts, dtype=torch.bool) if shown is None else shown != 0
    check_shape("shown", shown, tuple(prompts.shape), "the shape of the prompts")
    return prompts, shown
