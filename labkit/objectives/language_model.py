"""The loss of a language model: the mean surprise of the next token, in nats.

    L = sum_t m_t (logsumexp(z_t) - z_t[y_t]) / sum_t m_t
"""

from torch import Tensor

from labkit.kernels.cross_entropy import cross_entropy
from labkit.kernels.dispatch import choose

IGNORED = -100


def next_token_loss(logits_BTV: Tensor, target_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the positions where `mask_BT` is true (all without it); 0 where none is.

    On a GPU labkit.kernels.cross_entropy computes it. The lines for a CPU are written as those of `bag_cross_entropy`
    are, so that a bag of one token gives the same bits.

    Args:
        logits_BTV: position t predicts target t; shifting is the caller's business.
        target_BT: token ids.
        mask_BT: True where a position counts.
    """
    if choose("auto", logits_BTV):
        counted_BT = target_BT if mask_BT is None else target_BT.masked_fill(mask_BT == 0, IGNORED)
        return cross_entropy(logits_BTV.flatten(0, 1), counted_BT.flatten(), ignore_index=IGNORED)[0]
    logits_BTV = logits_BTV.float()
    loss_BT = logits_BTV.logsumexp(2) - logits_BTV.gather(2, target_BT[:, :, None]).squeeze(2)
    if mask_BT is None:
        return loss_BT.mean()
    return (loss_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
