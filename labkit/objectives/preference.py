"""Preferences: learning from pairs of answers, and how far a hint moves a model.

    rho(a)  = (1/|a|) sum_t [log pi(a_t | x, a_<t) - log pi_ref(a_t | x, a_<t)]        without 1/|a| if summed
    loss    = -log sigmoid(beta (rho(chosen) - rho(rejected)))                         a mean over pairs
    delta   = (1/n) sum_t [log pi(a_t | q, a_<t) - log pi(a_t | q, hint, a_<t)]        a ~ pi(. | q), n = |a|

delta is G-Zero's Hint-delta. For an answer that is drawn at temperature 1, n * delta is one sample of
KL(pi(. | q), pi(. | q, hint)) over whole answers: never negative on average, 0 for a hint that changes nothing, and
blind to whether the answer becomes better or worse.
Sources: DPO, arXiv 2305.18290; the length-normalised form, SimPO, 2405.14734, here with a reference, as in the code of
G-Zero, 2605.09959, where beta is 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.checks import check_shape


def answer_log_ratio(logp_BT: Tensor, reference_logp_BT: Tensor, mask_BT: Tensor, *,
                     length_normalized: bool = True) -> Tensor:
    """rho of each answer, [B]: the mean (or the sum) of logp - reference_logp over the tokens that count.

    An answer without a token has 0. What stands where the mask is false may be NaN.
    """
    check_shape("logp_BT", logp_BT, (None, None), "[B, T]")
    for name, tensor in (("reference_logp_BT", reference_logp_BT), ("mask_BT", mask_BT)):
        check_shape(name, tensor, tuple(logp_BT.shape), "the shape of logp_BT")
    counts_BT = mask_BT != 0
    difference_BT = torch.where(counts_BT, logp_BT - reference_logp_BT, 0.0)
    sum_B = difference_BT.sum(1)
    return sum_B / counts_BT.sum(1).clamp(min=1) if length_normalized else sum_B


def hint_delta(plain_logp_BT: Tensor, hinted_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Hint-delta of each answer, [B], in nats a token: the same tokens, scored without and with the hint.

    Args:
        plain_logp_BT: log-probabilities at temperature 1 of answers that were drawn *without* the hint.
        hinted_logp_BT: of the same tokens behind the question with the hint.
        mask_BT: the answer's tokens, END included. An empty answer gives 0, as in the code.
    """
    return answer_log_ratio(plain_logp_BT, hinted_logp_BT, mask_BT)


def dpo_loss(chosen_logp_BT: Tensor, rejected_logp_BS: Tensor, reference_chosen_logp_BT: Tensor,
             reference_rejected_logp_BS: Tensor, chosen_mask_BT: Tensor, rejected_mask_BS: Tensor, *,
             beta: float = 2.0, length_normalized: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation: the loss to descend, and what to watch.

    Args:
        chosen_logp_BT, rejected_logp_BS: log-probabilities of both answers' tokens under the policy, which alone gets a
            gradient. The two may differ in width.
        reference_...: the same under the reference.
        ..._mask: true where a token counts: the answer with its END.
        beta: above 0. 2.0 is for means over tokens; for sums 0.1 is common.
        length_normalized: means over tokens instead of sums. Then a long answer weighs no more than a short one.
    Returns:
        (loss, stats). stats, detached: margin, mean of beta (rho_chosen - rho_rejected); accuracy, share of pairs with
        a margin above 0; chosen and rejected, mean rho of each.
    Raises:
        LabError: shapes that do not fit, or a beta that is not above 0.
    """
    if not beta > 0:
        raise LabError(f"beta={beta} would prefer nothing, or the rejected answers.", "Use a beta above 0.")
    if len(chosen_logp_BT) != len(rejected_logp_BS):
        raise LabError(f"{len(chosen_logp_BT)} chosen and {len(rejected_logp_BS)} rejected answers are no pairs.",
                       "Give one of each a pair.")
    chosen_B, rejected_B = (
        answer_log_ratio(*both, length_normalized=length_normalized)
        for both in ((chosen_logp_BT, reference_chosen_logp_BT.detach(), chosen_mask_BT),
                     (rejected_logp_BS, reference_rejected_logp_BS.detach(), rejected_mask_BS)))
    margin_B = beta * (chosen_B - rejected_B)
    pairs = max(len(margin_B), 1)
    stats = {"margin": margin_B.sum() / pairs, "accuracy": (margin_B > 0).to(margin_B.dtype).sum() / pairs,
             "chosen": chosen_B.sum() / pairs, "rejected": rejected_B.sum() / pairs}
    return -F.logsigmoid(margin_B).sum() / pairs, {name: value.detach() for name, value in stats.items()}
