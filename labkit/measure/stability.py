"""How stable training is across learning rates, in numbers that one can compare.

    sensitivity = mean over rates of  min(loss(rate), loss_at_start) - min over rates of loss       nats
    stable up to = the largest rate whose final loss is below `slack` times the best
    a spike at step n: the loss is more than `size` above the median of the `window` steps before
Sensitivity: Wortsman et al., "Small-scale proxies" (arXiv 2309.14322), section 2; a diverged run counts as untrained.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from labkit.errors import LabError


def rate_sensitivity(loss_by_rate: Mapping[float, float], start: float) -> float:
    """Mean regret over the rates, a loss that is not a number or above `start` counting as `start`."""
    if not loss_by_rate:
        raise LabError("There is no learning rate to be sensitive to.", "Give at least one {rate: loss}.")
    loss_R = np.array([float(loss) for loss in loss_by_rate.values()])
    loss_R = np.minimum(np.where(np.isfinite(loss_R), loss_R, start), start)
    return float((loss_R - loss_R.min()).mean())


def stable_up_to(loss_by_rate: Mapping[float, float], slack: float = 1.1) -> float:
    """The largest rate with a loss of at most `slack` times the best over the rates; nan if no loss is a number."""
    finite = {rate: loss for rate, loss in loss_by_rate.items() if np.isfinite(loss)}
    if not finite:
        return float("nan")
    return max(rate for rate, loss in finite.items() if loss <= slack * min(finite.values()))


def spikes(loss_N: Sequence[float], *, size: float = 0.3, window: int = 10) -> np.ndarray:
    """Whether each step is a spike, [N] bool. The first `window` steps are none; a loss that is no number is one."""
    loss_N = np.asarray(loss_N, dtype=float)
    found = np.zeros(len(loss_N), dtype=bool)
    for step in range(window, len(loss_N)):
        recent = loss_N[step - window : step]
        recent = recent[np.isfinite(recent)]
        found[step] = not len(recent) or not loss_N[step] <= np.median(recent) + size
    return found
