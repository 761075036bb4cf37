"""Triton, or a stand-in under which the kernels' files still import.

Triton has wheels for Linux only, and a CPU build of torch does not bring it. labkit has to import and run without it,
on the torch references; so `triton.jit` becomes the identity there, and kernels stay plain functions that nobody calls.

The variable TRITON_INTERPRET=1 makes Triton run kernels with numpy, on CPU tensors. Triton reads it when a kernel is
defined, so it must be set before `labkit.kernels` is first imported.
"""

import os
from types import SimpleNamespace

# Triton 3.9 announces another default and warns at every compile; this is the one that all versions had so far.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    TRITON = True
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function, next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length())
    tl = SimpleNamespace(constexpr=object)
    TRITON = False


def interpreting() -> bool:
    """True where Triton was told, before the kernels were defined, to run them in its interpreter."""
    return TRITON and not isinstance(_probe, triton.runtime.JITFunction)


@triton.jit
def _probe():
    pass
