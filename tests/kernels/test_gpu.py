"""Gate (c): every kernel on a GPU. Run: pytest -m gpu tests/kernels"""

import pytest
import torch
from gpu_cases import (
    BENCHMARKS,
    PAST_INT32,
    REPEATABLE,
    SIZES,
    captured_error,
    compiled_error,
    error,
    head_peaks,
    inputs_of,
    references_only,
    repeats,
    step,
    training_curve,
)

from labkit import kernels
from labkit.measure.correctness import largest_error
from labkit.measure.launches import resources
from labkit.measure.timing import waiting_forbidden

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
              pytest.mark.filterwarnings("default")]  # Inductor advises TF32 on every GPU, by a warning
GPU = torch.device("cuda")
each = pytest.mark.parametrize("op", SIZES)


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """No test sees the tensors of another."""
    yield
    torch.cuda.empty_cache()


def demand_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory, {free:.0f} are free")


def test_every_kernel_is_here():
    """A new kernel needs a row."""
    assert set(SIZES) == set(BENCHMARKS) == set(kernels.__all__)


@each
def test_bf16_against_float64(op):
    """Results and gradients within the rounding of bf16."""
    assert error(op, inputs_of(op, GPU)) <= BENCHMARKS[op].tolerance


@pytest.mark.parametrize("op", REPEATABLE)
def test_two_runs_give_equal_bits(op):
    """Also where many programs add to one row."""
    assert repeats(op, inputs_of(op, GPU))


@each
def test_inside_torch_compile(op):
    """The whole op in one graph, and the same numbers."""
    assert compiled_error(op, inputs_of(op, GPU)) <= 1e-3


@each
def test_inside_a_cuda_graph(op):
    """Captured once, replayed on other values: nothing of the first values was baked in."""
    assert captured_error(op, inputs_of(op, GPU)) <= 1e-3


@each
def test_the_host_never_waits(op):
    """No .item(), no copy to the CPU, forward or backward."""
    inputs = inputs_of(op, GPU)
    step(op, inputs)  # compiled now
    with waiting_forbidden():
        step(op, inputs)


def test_offsets_past_two_to_the_31():
    """14,208 rows of 151,936 logits: the first and the last rows are right, and so are their gradients."""
    demand_memory(14)
    benchmark = BENCHMARKS["cross_entropy"]
    assert PAST_INT32["N"] * PAST_INT32["V"] > 2**31
    assert largest_error(benchmark, inputs_of("cross_entropy", GPU, PAST_INT32)) <= benchmark.tolerance


def test_the_head_loss_needs_little_memory():
    """At most 15% of what eager torch holds, at 16,384 tokens."""
    demand_memory(20)
    ours, eager = head_peaks(GPU)
    assert ours <= 0.15 * eager, f"{ours / 1e9:.2f} GB of {eager / 1e9:.2f} GB"


def test_training_with_kernels_and_with_references_is_the_same():
    """The losses of a tiny decoder over 30 steps agree to 0.1%, and it learns."""
    assert resources(lambda: training_curve(GPU, 1))
    with references_only():
        assert not resources(lambda: training_curve(GPU, 1))
        reference = training_curve(GPU)
    kernel = training_curve(GPU)
    assert kernel == pytest.approx(reference, rel=1e-3)
    assert kernel[-1] < 0.8 * kernel[0]
