"""Tests of kernels: no interpreted test may pass through the reference, and numpy computes with inf as a GPU does."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def as_on_a_gpu(request):
    """Fail loudly where a test wants the interpreter and the process has none; no warnings for inf - inf or log 0."""
    if not any(request.node.get_closest_marker(name) for name in ("interp", "mutations")):
        yield
        return
    from labkit.kernels.language import TRITON, interpreting

    if not TRITON:
        pytest.skip("Triton is not installed: it has wheels for Linux only")
    if not interpreting():
        pytest.fail("labkit.kernels was imported without TRITON_INTERPRET=1. Run: pytest -m interp tests/kernels")
    with np.errstate(all="ignore"):
        yield
