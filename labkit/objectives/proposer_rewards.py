"""What a proposer of questions is paid for: three published rewards, which do not want the same questions.

    G-Zero          max(delta, -5) - share - 0.03 max(0, length - 200) / 100       unreadable: -1 - share
    R-Zero          min(p, 1 - p) - share            p: share of the majority's answer      unreadable: -1 - share
    Absolute Zero   1 - s, but -0.5 where s = 0      s: share of right answers, by a verifier        unreadable: -1

`delta` is Hint-delta (labkit.objectives.preference), `share` that of near duplicates (labkit.objectives.duplicates),
`length` the hint's, in characters. G-Zero needs no answer that is right and no majority; Absolute Zero needs a
verifier. In Absolute Zero a question that is always solved earns 0 and one that is never solved counts as wrong.
Sources: the codes of G-Zero (arXiv 2605.09959) and R-Zero (2508.05004), and of Absolute Zero (2505.03335), as a
reader's notes give them; how the last treats s = 0 is our reading of them.
"""

import torch
from torch import Tensor

DELTA_FLOOR = -5.0


def length_penalty(length_N: Tensor, *, free: float = 200.0, rate: float = 0.03, unit: float = 100.0) -> Tensor:
    """rate * max(0, length - free) / unit: nothing for short hints, then a straight line."""
    return rate * (length_N - free).clamp(min=0) / unit


def g_zero_reward(delta_N: Tensor, valid_N: Tensor, share_N: Tensor, penalty_N: Tensor) -> Tensor:
    """The Challenger's reward. `penalty_N` is the `length_penalty` of the hints."""
    return torch.where(valid_N, delta_N.clamp(min=DELTA_FLOOR) - penalty_N, -1.0) - share_N


def r_zero_reward(majority_N: Tensor, valid_N: Tensor, share_N: Tensor) -> Tensor:
    """Largest where the solver's votes are split in half: uncertainty."""
    return torch.where(valid_N, torch.minimum(majority_N, 1 - majority_N), -1.0) - share_N


def absolute_zero_reward(solved_N: Tensor, valid_N: Tensor) -> Tensor:
    """Largest for what is solved rarely, but sometimes."""
    return torch.where(valid_N, torch.where(solved_N > 0, 1 - solved_N, -0.5), -1.0)


def majority_share(answer_NGL: Tensor) -> Tensor:
    """How many of the G answers to each question are the most frequent one, as a share: [N]."""
    same_NGG = (answer_NGL[:, :, None] == answer_NGL[:, None]).all(-1)
    return same_NGG.sum(2).amax(1) / answer_NGL.shape[1]
