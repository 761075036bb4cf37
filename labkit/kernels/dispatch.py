"""Which implementation of an op runs, and why: the Triton kernel or its plain torch reference.

    impl="auto"       the kernel on a GPU, and in Triton's interpreter on CPU tensors; else the reference (also for
                      float64, and inside torch.func transforms, for which kernels have no rules)
    impl="triton"     the kernel, or an error that says what is missing
    impl="reference"  plain torch, on any device; differentiable twice, and open to torch.func
"""

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.language import TRITON, interpreting
from labkit.toolchain import c_compiler

C_COMPILER = c_compiler()  # looked up once, since torch.compile does not trace a search


class Choice(NamedTuple):
    """What runs ("triton" or "reference") and the reason, as a sentence."""

    name: str
    reason: str

    def __bool__(self) -> bool:
        return self.name == "triton"


def choose(impl: str, tensor: Tensor) -> Choice:
    """The implementation for inputs that live where `tensor` does. True in a condition where it is the kernel.

    Raises:
        LabError: an unknown `impl`, or "triton" where no kernel can run.
    """
    if impl not in ("auto", "triton", "reference"):
        raise LabError(f"There is no implementation {impl!r}.", 'Choose impl="auto", "triton" or "reference".')
    if impl == "reference":
        return Choice("reference", "The caller asked for it.")
    able, reason = can_launch(tensor)
    if impl == "auto" and able and tensor.dtype == torch.float64:
        return Choice("reference", "The kernels compute in fp32, and the tensors are float64.")
    if impl == "triton" and not able:
        raise LabError(f'impl="triton" cannot run here: {reason}', 'Use impl="auto" or "reference".')
    return Choice("triton" if able else "reference", reason)


def can_launch(tensor: Tensor) -> tuple[bool, str]:
    """Whether a kernel can run on `tensor`, and why."""
    if not TRITON:
        return False, "Triton is not installed."
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False, "The kernels have no rules for torch.func transforms (vmap, jvp)."
    if tensor.device.type == "cuda" and not C_COMPILER:
        return False, "Triton needs a C compiler to launch kernels, and there is no gcc or clang."
    if tensor.device.type == "cuda":
        return True, "The tensors are on a GPU."
    if tensor.device.type != "cpu":
        return False, f"The kernels do not run on device type {tensor.device.type!r}."
    if interpreting():
        return True, "The tensors are on the CPU and TRITON_INTERPRET is set."
    return False, "The tensors are on the CPU, and TRITON_INTERPRET=1 was not set before labkit was imported."
