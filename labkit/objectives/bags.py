"""Losses whose target is a bag of S tokens, whose order does not count (token superposition, arXiv 2605.06546).

    L_MCE = logsumexp(z) - sum_j w_j z[y_j]          w_j = 1/S, or any weights that sum to one

This is the mean of S ordinary cross-entropies on the same logits, and, up to the constant entropy of w, the
KL divergence from the bag to softmax(z). One logsumexp and S gathers replace S passes over the vocabulary.
The alternatives below are those the paper reports to be no better; notebook 02 measures them.
Letters: B sequences, N bags in each, S tokens in a bag, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.cross_entropy import cross_entropy
from labkit.kernels.dispatch import choose


def split_into_bags(tokens_BL: Tensor, bag_size: int) -> tuple[Tensor, Tensor]:
    """Cut a text into bags: those to read, and for each the next one, to predict. Both [B, N, S].

    A text of (N + 1) * S tokens makes N + 1 bags that do not overlap; bag i is read at position i and bag i + 1 is
    its target. With S = 1 this is the usual shift by one token.

    Raises:
        LabError: the length is not a whole number of bags, or there are fewer than two.
    """
    length = tokens_BL.shape[1]
    if bag_size < 1 or length % bag_size or length < 2 * bag_size:
        raise LabError(f"{length} tokens do not make two or more whole bags of {bag_size}.",
                       f"Choose a bag size that divides the window: {bag_size} needs a length of "
                       f"{bag_size} x (context + 1).")
    bags_BNS = tokens_BL.unflatten(1, (-1, bag_size))
    return bags_BNS[:, :-1], bags_BNS[:, 1:]


def bag_cross_entropy(logits_BNV: Tensor, bag_BNS: Tensor, weight_S: Tensor | None = None) -> Tensor:
    """logsumexp(z) - sum_j w_j z[y_j], the mean over B and N (paper, section 3 and listing in appendix A).

    Args:
        logits_BNV: one distribution for each position.
        bag_BNS: the S tokens it should cover; a token that stands twice counts twice.
        weight_S: weights by place in the bag, summing to one; uniform without it.
    Returns:
        a scalar in nats. Its floor is log S for a bag of S different tokens.
    On a GPU labkit.kernels.cross_entropy computes it, which keeps no fp32 copy of the logits.
    """
    if choose("auto", logits_BNV):
        return cross_entropy(logits_BNV.flatten(0, 1), bag_BNS.flatten(0, 1), weight=weight_S)[0]
    logits_BNV = logits_BNV.float()  # a bf16 logsumexp over a large vocabulary loses the digits that matter
    covered_BNS = logits_BNV.gather(2, bag_BNS)
    score_BN = covered_BNS.mean(2) if weight_S is None else (covered_BNS * weight_S).sum(2)
    return (logits_BNV.logsumexp(2) - score_BN).mean()


def bag_any_cross_entropy(logits_BNV: Tensor, bag_BNS: Tensor) -> Tensor:
    """-log sum_{y in bag} p(y): any token of the bag will do (the paper's MCEAlt). A repeated token counts once."""
    logits_BNV = logits_BNV.float()
    in_bag_BNV = torch.zeros_like(logits_BNV, dtype=torch.bool).scatter(2, bag_BNS, True)
    return (logits_BNV.logsumexp(2) - logits_BNV.masked_fill(~in_bag_BNV, float("-inf")).logsumexp(2)).mean()


def bag_binary_cross_entropy(logits_BNV: Tensor, bag_BNS: Tensor) -> Tensor:
    """V independent yes-or-no questions, summed over the vocabulary and divided by S: the scale of one token."""
    logits_BNV = logits_BNV.float()
    in_bag_BNV = torch.zeros_like(logits_BNV).scatter(2, bag_BNS, 1.0)
    loss_BN = F.binary_cross_entropy_with_logits(logits_BNV, in_bag_BNV, reduction="none").sum(2)
    return loss_BN.mean() / bag_BNS.shape[2]


def bag_margin_loss(logits_BNV: Tensor, bag_BNS: Tensor) -> Tensor:
    """Hinge: every token of the bag should lead every other token by one logit; the mean of max(0, 1 - lead).

    The paper names a hinge loss without its formula; this is the usual one for several labels (torch's
    `multilabel_margin_loss`).
    """
    flat_NV, vocabulary = logits_BNV.float().flatten(0, 1), logits_BNV.shape[2]
    bag_NS = bag_BNS.flatten(0, 1).sort(dim=1).values
    first_NS = F.pad(bag_NS[:, 1:] != bag_NS[:, :-1], (1, 0), value=True)
    # torch wants each label once, the list ended by -1 and as wide as the vocabulary
    label_NS = bag_NS.masked_fill(~first_NS, -1).sort(dim=1, descending=True).values
    label_NV = F.pad(label_NS, (0, vocabulary - bag_BNS.shape[2]), value=-1)
    return F.multilabel_margin_loss(flat_NV, label_NV)
