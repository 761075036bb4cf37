"""Which of the three scales runs here, and why.

quick: a laptop CPU, at most a minute a notebook. desk: a CPU, at most 20 minutes, five seeds or more.
workstation: one GPU. `LABKIT_SCALE` chooses; without it a CUDA device that can run the labs means workstation,
otherwise quick.
The choice comes together with its reason, and the reason is printed wherever the choice is used.
"""

import os
from dataclasses import dataclass

from labkit.course.system import why_unfit
from labkit.errors import LabError

SCALES = ("quick", "desk", "workstation")


@dataclass(frozen=True)
class Choice:
    """A scale and one clause that says why it was chosen."""

    name: str
    reason: str


def check_scale(name: str) -> str:
    """`name` if it is a scale, else a LabError that lists the three."""
    if name not in SCALES:
        raise LabError(f"There is no scale named {name!r}.", f"Use one of: {', '.join(SCALES)}.")
    return name


def has_device(name: str) -> bool:
    """Whether the runs of this scale go to a CUDA device; a LabError if they need one and there is none."""
    if name != "workstation":
        return False
    import torch

    if not torch.cuda.is_available():
        raise LabError("The workstation scale needs a CUDA device, and PyTorch finds none.",
                       "Use --scale desk (or LABKIT_SCALE=desk); `labkit doctor` says what is missing.")
    return True


def choose_scale() -> Choice:
    """The scale of this process: LABKIT_SCALE first, then the hardware."""
    wanted = os.environ.get("LABKIT_SCALE")
    if wanted:
        return Choice(check_scale(wanted), f"LABKIT_SCALE={wanted} says so")
    import torch  # only here: the command line asks for scales without waiting for torch

    if not torch.cuda.is_available():
        return Choice("quick", "no CUDA device was found")
    name, unfit = torch.cuda.get_device_name(), why_unfit(torch)
    if unfit:
        return Choice("quick", f"the {name} {unfit}")
    return Choice("workstation", f"a CUDA device was found ({name})")
