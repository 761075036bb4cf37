"""Check a learner's kernel as an engineer would: bounds, numbers, order of programs, and the bytes that it asks for.

An exercise gives a call that launches the kernel in Triton's interpreter, the tensor that it fills, the exact result
and the fewest bytes that can do it. A kernel that is right and reads its input twice is not accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from labkit.kernels.interpreter import Traffic, count_traffic, guard_bounds, program_order

SLACK = 1.05  # of the fewest bytes
UNWRITTEN = -1.2345e30


@dataclass(frozen=True)
class Puzzle:
    """A launch on small tensors of odd size, what it has to write, and the fewest bytes that it can ask for."""

    launch: Callable[[], object]
    out: Tensor
    exact: Tensor
    fewest: int

    def run(self) -> Traffic:
        """Launch once into an output that nobody has written to; an access outside the tensors is an AssertionError."""
        self.out.fill_(UNWRITTEN)
        with np.errstate(all="ignore"), count_traffic() as traffic, guard_bounds():
            self.launch()
        return traffic


def grade(puzzle: Puzzle) -> str | None:
    """None if the kernel is right, else what to look at first."""
    try:
        traffic = puzzle.run()
    except AssertionError as error:
        return f"{error} Which lanes have no element behind them, and does a mask switch them off?"
    except Exception as error:
        if "pointer<" in str(error):
            return "The arguments are addresses, not arrays: tl.load what stands there before you compute with it."
        raise
    problem = wrong_numbers(puzzle.out, puzzle.exact)
    if problem:
        return problem
    with program_order("reversed"):
        puzzle.run()
    if wrong_numbers(puzzle.out, puzzle.exact):
        return ("The numbers are right only while programs run in order, which a GPU does not promise. Do two of them "
                "write the same element?")
    if traffic.bytes > SLACK * puzzle.fewest:
        return (f"The numbers are right, but the kernel asks for {traffic.bytes / puzzle.fewest:.2f} times the "
                f"{puzzle.fewest:,} bytes that are needed. What does it load or store twice?")
    return None


def wrong_numbers(out: Tensor, exact: Tensor) -> str | None:
    """What is wrong with a result, most basic fault first; None for a right one."""
    unwritten = out == torch.tensor(UNWRITTEN, dtype=out.dtype)
    if unwritten.all():
        return "The kernel wrote nothing to its output."
    if unwritten.any():
        first = unwritten.nonzero()[0].tolist()
        return f"{int(unwritten.sum())} of {out.numel()} elements were never written, first {first}."
    if out.isnan().any():
        return (f"{int(out.isnan().sum())} of {out.numel()} results are NaN. Look for -inf - (-inf) and for 0 * -inf: "
                "in masked lanes, and in the first block, where the maximum so far is -inf.")
    error = (out.double() - exact.double()).abs()
    if torch.allclose(out.double(), exact.double(), rtol=1e-5, atol=1e-5):
        return None
    if error.max() < 1e-3 * exact.double().abs().max():
        return ("Nearly: the formula is right, but digits are lost between large numbers. Subtract the maximum before "
                "you multiply or add.")
    place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), tuple(out.shape)))
    at = ", ".join(map(str, place))
    return f"At [{at}] your kernel gives {float(out[place]):.6g}, and the reference {float(exact[place]):.6g}."


def bytes_remark(puzzle: Puzzle) -> str:
    """The score, for a kernel that is right."""
    return f"It asks for {puzzle.run().bytes:,} bytes; the fewest possible are {puzzle.fewest:,}."
