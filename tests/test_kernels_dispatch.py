"""What surrounds the kernels and needs none of them: choice, checks, launch settings, costs, life without Triton."""

import contextlib
import math
import subprocess
import sys

import pytest
import torch

from labkit import kernels
from labkit.errors import LabError
from labkit.kernels import checks, configs, dispatch
from labkit.kernels.configs import Row, forced, settings_for, target_arch
from labkit.kernels.cost import Cost

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TABLE = [
    Row("sm_90", 1000, {"BLOCK": 1, "num_warps": 1}),
    Row("sm_90", math.inf, {"BLOCK": 2, "num_warps": 2}),
    Row("any", 1000, {"BLOCK": 3, "num_warps": 4}),
    Row("any", math.inf, {"BLOCK": 4, "num_warps": 8}),
]


@contextlib.contextmanager
def refused(fix: str):
    """A LabError whose sentence holds `fix`."""
    with pytest.raises(LabError) as caught:
        yield
    assert fix in str(caught.value)


# ---- the choice


def on(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that says it is on this device, which need not exist."""
    with torch._subclasses.FakeTensorMode():
        return torch.empty(2, dtype=dtype, device=device)


@pytest.mark.parametrize("impl, device, interpreted, dtype, name, reason", [
    ("reference", "cuda", True, torch.float32, "reference", "The caller asked for it."),
    ("auto", "cuda", False, torch.float32, "triton", "The tensors are on a GPU."),
    ("triton", "cuda", False, torch.float32, "triton", "The tensors are on a GPU."),
    ("auto", "cuda", False, torch.float64, "reference", "the tensors are float64"),
    ("auto", "cpu", True, torch.float32, "triton", "TRITON_INTERPRET is set"),
    ("auto", "cpu", False, torch.float32, "reference", "TRITON_INTERPRET=1 was not set before labkit was imported"),
    ("auto", "mps", True, torch.float32, "reference", "do not run on device type 'mps'"),
])
def test_choice_and_its_reason(monkeypatch, impl, device, interpreted, dtype, name, reason):
    """Kernel or reference, with a sentence that says why; true in a condition where it is the kernel."""
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(dispatch, "C_COMPILER", "gcc")
    monkeypatch.setattr(dispatch, "interpreting", lambda: interpreted)
    choice = dispatch.choose(impl, on(device, dtype))
    assert choice.name == name and reason in choice.reason and bool(choice) == (name == "triton")


def test_choice_without_triton(monkeypatch):
    """On a GPU, but without Triton: the reference, or an error for who insists."""
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert dispatch.choose("auto", on("cuda")) == ("reference", "Triton is not installed.")
    with refused('impl="triton" cannot run here: Triton is not installed. Use impl="auto" or "reference".'):
        dispatch.choose("triton", on("cuda"))


def test_choice_without_a_c_compiler(monkeypatch):
    """A bare GPU server may have none: the reference, with the reason, and not Triton's error at the first launch."""
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(dispatch, "C_COMPILER", None)
    choice = dispatch.choose("auto", on("cuda"))
    assert choice.name == "reference" and "no gcc or clang" in choice.reason
    with refused('Use impl="auto" or "reference".'):
        dispatch.choose("triton", on("cuda"))


def test_errors_of_the_choice(monkeypatch):
    """An unknown implementation, and a kernel asked for where none can run, are refused."""
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with refused('Choose impl="auto", "triton" or "reference".'):
        dispatch.choose("cuda", torch.ones(1))
    with refused('Use impl="auto" or "reference".'):
        dispatch.choose("triton", torch.ones(1))


def test_under_torch_func_the_reference_runs(monkeypatch):
    """vmap and jvp have no rule for a kernel."""
    monkeypatch.setattr(dispatch, "TRITON", True)
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    seen = []
    torch.func.vmap(lambda x: seen.append(dispatch.choose("auto", x)) or x)(torch.ones(2, 2))
    assert seen[0].name == "reference" and "torch.func" in seen[0].reason


def test_without_triton_everything_imports_and_the_references_run():
    """Where Triton cannot be imported, each op computes and differentiates, and says why no kernel runs."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from labkit import kernels
from labkit.errors import LabError
from labkit.kernels.language import TRITON, interpreting
assert not TRITON and not interpreting()
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
ids = torch.tensor([1, 2, -100])
losses = [kernels.cross_entropy(hidden @ head.T, ids)[0], kernels.linear_cross_entropy(hidden, head, ids),
          sum(x.sum() for x in kernels.token_logprob(hidden @ head.T, ids))]
sum(losses).backward()
assert torch.allclose(losses[0], losses[1]) and head.grad.isfinite().all() and hidden.grad[:2].abs().min() > 0
kernels.linear_token_logprob(hidden, head, ids)
try:
    kernels.cross_entropy(hidden @ head.T, ids, impl="triton")
except LabError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'impl="triton" cannot run here: Triton is not installed. Use impl="auto" or "reference".\n'


def test_references_are_differentiable_twice():
    """Float64 references pass torch's own checks of first and second derivatives."""
    target, generator = torch.tensor([[1, 1, 3], [-100, 2, 0]]), torch.Generator().manual_seed(0)
    logits, hidden, head = (torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
                            for shape in ((2, 5), (2, 3), (5, 3)))
    weight = torch.tensor([1.0, 2.0, 4.0])
    ops = {
        "cross_entropy": (lambda x: kernels.cross_entropy(x, target, weight=weight, z_loss=0.1, impl="reference"),
                          [logits]),
        "linear_cross_entropy": (lambda h, w: kernels.linear_cross_entropy(h, w, target, impl="reference"),
                                 [hidden, head]),
        "token_logprob": (lambda x: kernels.token_logprob(x, target[:, 1], temperature=0.7, impl="reference"),
                          [logits]),
    }
    for op, inputs in ops.values():
        torch.autograd.gradcheck(op, inputs)
        torch.autograd.gradgradcheck(op, inputs)


# ---- launch settings


@pytest.mark.parametrize("arch, size, block", [(90, 1000, 1), (90, 1001, 2), (120, 1000, 3), (120, 10**9, 4),
                                               (None, 0, 3)])
def test_the_first_row_that_fits_is_taken(arch, size, block):
    """Rows of the arch come first, sizes are up to and including `largest`; without a GPU, the rows for any."""
    with target_arch(arch) if arch else contextlib.nullcontext():
        assert settings_for("k", TABLE, size, CPU)["BLOCK"] == block


def test_forced_overrides_one_kernel_for_a_block():
    """It nests, leaves other settings and other kernels alone, and is gone afterwards, also after an error."""
    plain = settings_for("k", TABLE, 1, CPU)
    with pytest.raises(ZeroDivisionError), forced("k", BLOCK=64):
        with forced("k", num_warps=2):
            assert settings_for("k", TABLE, 1, CPU) == {"BLOCK": 64, "num_warps": 2}
        assert settings_for("k", TABLE, 1, CPU) == plain | {"BLOCK": 64}
        assert settings_for("other", TABLE, 1, CPU) == plain
        raise ZeroDivisionError
    assert settings_for("k", TABLE, 1, CPU) == plain and not configs._forced


def test_the_fastest_is_the_smallest_median_that_fits(monkeypatch):
    """A candidate that does not fit the GPU is never taken; every candidate is launched with its own settings."""
    testing, errors = pytest.importorskip("triton.testing"), pytest.importorskip("triton.runtime.errors")
    launched, times = [], {1: 3.0, 2: 2.0}

    def do_bench(call, quantiles):
        call()
        if launched[-1] not in times:
            raise errors.OutOfResources(1, 0, "shared memory")
        return times[launched[-1]]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    candidates = [{"BLOCK": block} for block in (0, 1, 2)]
    assert configs.fastest(candidates, lambda settings: launched.append(settings["BLOCK"])) == {"BLOCK": 2}
    assert launched == [0, 1, 2]


def test_autotune_searches_once_a_size_class(monkeypatch):
    """LABKIT_AUTOTUNE=1 on a GPU: all rows of the arch are tried, once for 513 to 1023; a forced setting is final."""
    searched = []
    monkeypatch.setattr(configs, "fastest", lambda rows, launch: searched.append(rows) or rows[-1])
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def chosen(size, device=CUDA, launch=print):
        return settings_for("k", TABLE, size, device, launch)["BLOCK"]

    assert chosen(600) == 1 and not searched
    monkeypatch.setenv("LABKIT_AUTOTUNE", "1")
    assert [chosen(size) for size in (600, 1000, 1023)] == [2, 2, 2]
    assert searched == [[{"BLOCK": 1, "num_warps": 1}, {"BLOCK": 2, "num_warps": 2}]]
    assert chosen(1024) == 2 and len(searched) == 2
    with forced("k", num_warps=4):
        assert settings_for("k", TABLE, 600, CUDA, print) == {"BLOCK": 1, "num_warps": 4}
    assert chosen(600, launch=None) == 1 and chosen(600, device=CPU) == 3 and len(searched) == 2


# ---- costs


def test_cost():
    """Bytes, floor and bound by hand: 300 bytes at 100 a second against 50 FLOPs at 10 a second."""
    cost = Cost(read=200, written=100, flops=50)
    assert cost.bytes == cost.memory_bytes == 300
    assert cost.floor_seconds(100, 10) == 5 and cost.bound(100, 10) == "compute"
    assert cost.floor_seconds(10, 100) == 30 and cost.bound(10, 100) == "memory"
    assert cost._replace(cached=150).memory_bytes == 150 and cost._replace(cached=150).bytes == 300
    assert cost.plus(Cost(1, 2, 3, 4)) == Cost(201, 102, 53, 4)


# ---- checks


@pytest.mark.parametrize("call, fix", [
    (lambda: checks.check_float("x", torch.ones(2, dtype=torch.int64)), "x.float()"),
    (lambda: checks.check_float("x", torch.ones(2, dtype=torch.float64), also=()), "x.float()"),
    (lambda: checks.check_kernel_dtype("x", torch.ones(2, dtype=torch.float64)), 'impl="reference"'),
    (lambda: checks.check_ids("ids", torch.ones(2), 3), "ids.long()"),
    (lambda: checks.check_ids("ids", torch.tensor([0, 3]), 3), "holds the id 3, but ids go from 0 to 2."),
    (lambda: checks.check_ids("ids", torch.tensor([0, -1]), 3, skip=-100), "0 to 2, or -100 for none"),
    (lambda: checks.check_shape("x", torch.ones(2, 3), (2, 4), "[N, V]"), "[2, 3], but [N, V] here is [2, 4]"),
    (lambda: checks.check_shape("x", torch.ones(2), (2, None), "[N, V]"), "[N, V] here is [2, any]"),
    (lambda: checks.check_devices(x=torch.ones(1), y=torch.ones(1, device="meta")), "x on cpu, y on meta"),
    (lambda: checks.check_finite("beta", math.inf), "Give beta a finite value"),
])
def test_checks_refuse(call, fix):
    """Each check names the tensor, what it has and what it should have."""
    with refused(fix):
        call()


def test_checks_let_pass():
    """Right tensors, ids that are skipped, empty ids, and ids on another device, whose values nobody waits for."""
    checks.check_ids("ids", torch.tensor([0, 2, -100], dtype=torch.int32), 3, skip=-100)
    checks.check_ids("ids", torch.zeros(0, dtype=torch.int64), 3)
    checks.check_ids("ids", torch.zeros(2, dtype=torch.int64, device="meta"), 3)
    checks.check_shape("x", torch.ones(2, 3), (None, 3), "[N, V]")
    checks.check_devices(x=torch.ones(1), y=None)
    checks.check_float("x", torch.ones(1, dtype=torch.float64))
    checks.check_finite("beta", 0.0)
