"""Check a learner's kernel as an engineer would: bounds, numbers, nothing left out, and the bytes that it asks for.

An exercise gives a call that launches the kernel in Triton's interpreter, the tensor that it fills, the exact result
and the fewest bytes that can do it. A kernel that is right and reads its input twice is not accepted.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from labkit.kernels.interpreter import Traffic, count_traffic, guard_bounds

SLACK = 1.05  # of the fewest bytes


def grade(launch: Callable[[], object], out: Tensor, exact: Tensor, fewest: int) -> str | None:
    """None if the kernel is right, else what to look at first. `out` must come filled with NaN."""
    try:
        traffic = traffic_of(launch)
    except AssertionError as error:
        return f"{error} Which lanes have no element behind them, and does a mask switch them off?"
    left = out.isnan() & ~exact.isnan()
    if left.all():
        return "The kernel wrote nothing to its output, or only NaN."
    if left.any():
        first = left.nonzero()[0].tolist()
        return f"{int(left.sum())} of {out.numel()} elements are NaN or never written, first {first}."
    error = (out.double() - exact.double()).abs()
    if not torch.allclose(out.double(), exact.double(), rtol=1e-5, atol=1e-5):
        place = tuple(np.unravel_index(int(error.argmax()), tuple(out.shape)))
        at = ", ".join(map(str, place))
        return f"At [{at}] your kernel gives {float(out[place]):.6g}, and the reference {float(exact[place]):.6g}."
    if traffic.bytes > SLACK * fewest:
        return (f"The numbers are right, but the kernel asks for {traffic.bytes / fewest:.2f} times the {fewest:,} "
                "bytes that are needed. What does it load twice?")
    return None


def traffic_of(launch: Callable[[], object]) -> Traffic:
    """What the launch asks of memory; an access outside its tensors is an AssertionError."""
    with np.errstate(all="ignore"), count_traffic() as traffic, guard_bounds():
        launch()
    return traffic


def bytes_remark(launch: Callable[[], object], fewest: int) -> str:
    """The score, for a kernel that is right."""
    asked = traffic_of(launch).bytes
    return f"It asks for {asked:,} bytes; the fewest possible are {fewest:,}."
