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


SHAPES = {"linear": lambda u: u, "sine": lambda u: math.sin(math.pi * u / 2), "square": lambda u: u**2,
          "cube": lambda u: u**3}


def annealed(step: int, steps: int, start: float, end: float, shape: str = "linear") -> float:
    """start + (end - start) f(u), u = min(1, step / steps): an exponent or any other number that moves with time.

    f is u, sin(pi u / 2), u^2 or u^3. HölderPO (arXiv 2605.12058) anneals its exponent linearly from 2 to -2; its Table
    5 names the other three shapes, whose formulas we did not find.
    """
    if shape not in SHAPES:
        raise LabError(f"There is no shape {shape!r}.", f"Choose one of {', '.join(SHAPES)}.")
    return start + (end - start) * SHAPES[shape](min(1.0, step / steps))
