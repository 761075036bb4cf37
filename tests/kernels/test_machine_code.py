"""The compiler as an instrument: it must see what is wrong with a kernel, and leave the process as it was."""

import importlib
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from labkit.errors import LabError
from labkit.files import REPOSITORY, write_json
from labkit.kernels import compiler_process, machine_code
from labkit.kernels.compiler_process import compile_source, compile_variants, source_of
from labkit.kernels.configs import arch_of, forced
from labkit.kernels.language import TRITON
from labkit.kernels.machine_code import Reading, readings_of, shipped_readings
from labkit.kernels.occupancy import limits, occupancy

pytestmark = [pytest.mark.compile, pytest.mark.skipif(not TRITON, reason="Triton is not installed")]
k2 = importlib.import_module("labkit.kernels.cross_entropy")

SOFTMAX = """
@triton.jit
def softmax(X, Y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    X += tl.program_id(0) * n
    Y += tl.program_id(0) * n
    x = tl.load(X + i, mask=i < n, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(Y + i, x / tl.sum(x, 0), mask=i < n)
"""
SCALE = """
@triton.jit
def scale(X, total, n, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0)
    tl.atomic_add(total, tl.sum(x * factor, 0))
"""
SQUARE = """
@triton.jit
def square(X, Y, D: tl.constexpr):
    i = tl.arange(0, D)
    x = tl.load(X + i[:, None] * D + i[None, :])
    tl.store(Y + i[:, None] * D + i[None, :], tl.dot(x, x))
"""
ROW = {"X": "*bf16", "Y": "*bf16", "n": "i32"}


def launch() -> None:
    """Cross-entropy's forward on meta tensors."""
    k2.launch_forward(torch.empty(64, 8192, dtype=torch.bfloat16, device="meta"),
                      torch.empty(64, 1, dtype=torch.int64, device="meta"), torch.empty(64, 1, device="meta"), 0.0)


def failure(source: str, kernel: str = "softmax", block: int = 1024) -> LabError:
    with pytest.raises(LabError) as caught:
        compile_source(source, kernel, ROW, {"BLOCK": block})
    return caught.value


def test_spills_of_a_row_that_is_too_long_for_one_block():
    """A softmax of 65,536 in one block of 32 warps spills; one of 4,096 in 8 warps does not."""
    long, short = compile_variants(SOFTMAX, "softmax", ROW, [{"BLOCK": 65_536, "num_warps": 32},
                                                             {"BLOCK": 4096, "num_warps": 8}], divisible=tuple(ROW))
    widths = re.findall(r"\b(?:STL|LDL)(?:\.LU)?(?:\.(\d+))?", long.sass)  # the log against the instructions themselves
    assert long.reading.spill_bytes == sum(int(width or 32) // 8 for width in widths) > 0
    assert short.reading.spill_bytes == 0 and "STL" not in short.sass
    assert short.reading.fp64_lines == short.reading.atomics == short.reading.wgmma == short.reading.mma == 0
    assert long.reading.settings == {"BLOCK": 65_536, "num_warps": 32, "num_stages": 3}
    assert long.reading.shared_bytes > 0 and short.reading.wide_loads == short.reading.loads > 0


def test_a_double_among_the_arguments_is_seen():
    """A factor passed as fp64 leaves .f64 in the PTX; the sum at the end is an atomic add."""
    types = {"X": "*fp32", "total": "*fp64", "n": "i32", "factor": "fp64"}
    reading, ptx, _ = compile_source(SCALE, "scale", types, {"BLOCK": 1024})
    assert reading.fp64_lines > 0 and ".f64" in ptx
    assert reading.atomics == 1


def test_no_wide_loads_without_divisibility():
    """The same kernel loads 16 bytes at a time only where address and length are known multiples of 16."""
    assert compile_source(SOFTMAX, "softmax", ROW, {"BLOCK": 4096}).reading.wide_loads == 0


@pytest.mark.parametrize(("arch", "wgmma"), [(90, True), (120, False)])
def test_tensor_cores(arch: int, wgmma: bool):
    """A product is HGMMA on Hopper and HMMA on the RTX 50 series."""
    reading = compile_source(SQUARE, "square", {"X": "*bf16", "Y": "*fp32"}, {"D": 64}, arch=arch,
                             divisible=("X", "Y")).reading
    assert reading.arch == f"sm_{arch}"
    assert (reading.wgmma > 0, reading.mma > 0) == (wgmma, not wgmma)


def test_one_reading_for_each_distinct_launch_and_target():
    """The same launch twice counts once; other blocks and another target are kernels of their own."""
    def call():
        launch()
        launch()
        with forced("cross_entropy", BLOCK_V=2048):
            launch()

    readings = readings_of(call, 90)
    assert [r.settings["BLOCK_V"] for r in readings] == [4096, 2048]
    assert [r.arch for r in readings_of(launch, 120)] == ["sm_120"]


def test_launch_settings_are_those_of_the_target():
    """While it compiles for 120, an op that asks for its settings is told sm_120; afterwards no target is set."""
    asked = []
    readings_of(lambda: asked.append(arch_of(torch.device("meta"))), 120)
    assert asked == ["sm_120"] and arch_of(torch.device("meta")) == "any"


def test_the_process_is_left_as_it_was(tmp_path, monkeypatch):
    """Driver, launch and knobs come back after a success and after a failure; the cache is neither read nor written."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile
    from triton.runtime import JITFunction, driver

    def state():
        return (driver._active, JITFunction.run, knobs.cache.dir, knobs.nvidia.dump_ptxas_log,
                os.environ.get("TRITON_CACHE_DIR"))

    def fail():
        raise ZeroDivisionError

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = k2._forward_kernel
    types = dict(zip(kernel.arg_names, ["*bf16", "*i64", "*fp32", "*fp32", "*fp32", "i32", "i32", "i32", "fp32"],
                     strict=False)) | {"BLOCK_V": "constexpr", "BLOCK_S": "constexpr"}
    triton_compile(ASTSource(fn=kernel, signature=types, constexprs={"BLOCK_V": 4096, "BLOCK_S": 1}),
                   target=GPUTarget("cuda", 90, 32))  # an ordinary compile, which fills the cache
    before, cached = state(), sorted(tmp_path.rglob("*"))
    first, second = (readings_of(launch, 90) for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        readings_of(fail, 90)
    assert cached and sorted(tmp_path.rglob("*")) == cached
    assert state() == before
    assert first[0].registers == second[0].registers > 0


def test_a_compile_error_is_one_sentence_with_its_line():
    """The compiler's message, the line of the source and its text; also for an error in a function that is called."""
    error = failure(SOFTMAX, block=1000)
    assert "BLOCK=1000" in error.problem and "line 4: arange's range must be a power of 2" in error.problem
    assert error.fix.endswith("i = tl.arange(0, BLOCK)") and len(str(error)) < 250
    helper = "@triton.jit\ndef half(x):\n    return x / hlaf\n\n"
    error = failure(helper + SOFTMAX.replace("x / tl.sum(x, 0)", "half(x)"))
    assert "line 3: NameError('hlaf is not defined')" in error.problem and "return x / hlaf" in error.fix
    error = failure(SOFTMAX.replace("i < n", "i <", 1))
    assert "line 7: invalid syntax" in error.problem
    assert "line 1: name 'y' is not defined" in failure("y\n" + SOFTMAX).problem


def test_errors_behind_the_compiler_s_front():
    """What the assembler refuses, and what makes the compiler's process abort, are sentences too."""
    asm = 'tl.inline_asm_elementwise("{}", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)'
    refused = failure(SOFTMAX.replace("x / tl.sum(x, 0)", asm.format("bogus.f32 $0, $1;")))
    assert "'bogus'" in refused.problem and len(str(refused)) < 300
    aborted = failure(SOFTMAX.replace("x / tl.sum(x, 0)", asm.format("mov.b32 $0, $9;")))
    assert "broke off on softmax (status -6): LLVM ERROR: Invalid $ operand" in aborted.problem


def test_wrong_names_are_refused():
    """A kernel that is not in the source, and types that are not its arguments."""
    assert "no kernel named sofmax" in failure(SOFTMAX, kernel="sofmax").problem
    with pytest.raises(LabError, match="Types were given for X, BLOCK, but softmax takes X, Y, n, BLOCK"):
        compile_source(SOFTMAX, "softmax", {"X": "*bf16"}, {"BLOCK": 1024})


def test_a_compile_without_end_is_ended(monkeypatch):
    """After the time a variant may take, the process is ended and the sentence says so."""
    monkeypatch.setattr(compiler_process, "SECONDS", 1)
    start = time.monotonic()
    assert "not compiled within 1 seconds" in failure("import time; time.sleep(60)\n" + SOFTMAX).problem
    assert time.monotonic() - start < 20


INTERPRETING = """
import importlib
from labkit.errors import LabError
from labkit.kernels.compiler_process import compile_source, source_of
from labkit.kernels.machine_code import readings_of
k2 = importlib.import_module("labkit.kernels.cross_entropy")
try:
    readings_of(lambda: None, 90)
except LabError as error:
    print(error)
types = dict(zip(k2._forward_kernel.arg_names, "*bf16 *i64 *fp32 *fp32 *fp32 i32 i32 i32 fp32".split()))
print(compile_source(source_of(k2._forward_kernel), "_forward_kernel", types, dict(BLOCK_V=4096, BLOCK_S=1)).reading)
"""


def test_a_process_that_interprets():
    """It is refused readings_of, and gets machine code of its own kernels by compile_source."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", INTERPRETING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, reading = done.stdout.splitlines()
    assert "so it cannot compile them" in refusal
    assert "arch='sm_90'" in reading and "'BLOCK_V': 4096" in reading


def test_source_of_joins_functions_and_kernels():
    """A jitted kernel and a plain function, each with its whole text."""
    text = source_of(k2._backward_kernel, launch)
    assert text.startswith("@triton.jit\ndef _backward_kernel(") and "\n\ndef launch(" in text


def reading(registers: int, shared: int, warps: int, arch: str = "sm_90") -> Reading:
    return Reading("k", arch, registers, 0, 0, shared, 0, 0, 0, 0, 0, 0, {"num_warps": warps})


@pytest.mark.parametrize(("registers", "shared", "warps", "arch", "share"), [
    (32, 0, 8, "sm_90", 1.0), (40, 0, 8, "sm_90", 48 / 64), (255, 0, 8, "sm_90", 8 / 64), (168, 0, 4, "sm_90", 12 / 64),
    (32, 98_304, 8, "sm_90", 16 / 64), (32, 232_448, 4, "sm_90", 4 / 64), (32, 232_449, 4, "sm_90", 0.0),
    (32, 0, 1, "sm_90", 32 / 64), (32, 0, 8, "sm_120", 1.0), (32, 101_376, 8, "sm_120", 8 / 48),
    (128, 0, 32, "sm_90", 0.0), (24, 0, 1, "sm_120", 24 / 48),
    (96, 0, 1, "sm_90", 20 / 64)])
def test_occupancy(registers: int, shared: int, warps: int, arch: str, share: float):
    """Limits by registers, shared memory, warps and blocks; worked by hand from NVIDIA's rules."""
    assert occupancy(reading(registers, shared, warps, arch)) == share


def test_limits_of_unknown_targets_are_refused():
    """By number or by name."""
    assert limits(120) is limits("sm_120")
    with pytest.raises(LabError, match="No limits are known for sm_55"):
        limits(55)


def test_shipped_readings_of_another_triton(tmp_path, monkeypatch):
    """Read back as readings; without a file for the installed version the sentence names those that are there."""
    monkeypatch.setattr(machine_code, "SHIPPED", tmp_path)
    write_json(tmp_path / "3.0.0.json", {"k forward": {"sm_90": [reading(9, 0, 4).as_dict()]}})
    assert shipped_readings("3.0.0")["k forward"]["sm_90"] == [reading(9, 0, 4)]
    with pytest.raises(LabError, match="there are some for: 3.0.0"):
        shipped_readings()
