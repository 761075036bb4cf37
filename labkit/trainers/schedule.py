"""The learning rate as a pure function of the step, as a fraction of its peak.

    warm-up   (step + 1) / warmup                              for the first `warmup` steps
    wsd       1, then linearly to 0 over the last `decay` part      (warm-up, stable, decay; arXiv 2404.06395)
    cosine    0.1 + 0.9 * (1 + cos(pi * progress)) / 2              (arXiv 1608.03983, ending at a tenth)
    constant  1

A function of the step alone needs no state, so a resumed run meets exactly the rates of an unbroken one.
"""

import math

from labkit.errors import LabError

SCHEDULES = ("wsd", "cosine", "constant")


def learning_rate_factor(step: int, steps: int, *, warmup: int, kind: str = "wsd", decay: float = 0.1) -> float:
    """The factor for 0-based `step` of `steps`. Raises LabError for an unknown kind."""
    if kind not in SCHEDULES:
        raise LabError(f"There is no schedule {kind!r}.", f"Choose one of {', '.join(SCHEDULES)}.")
    if step < warmup:
        return (step + 1) / warmup
    if kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
    if kind == "wsd" and decay > 0:
        return min(1.0, (steps - step) / (decay * steps))
    return 1.0
