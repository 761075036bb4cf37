"""Triton's compiler as an instrument: what a kernel becomes on a GPU that is not there.

Triton carries NVIDIA's assembler and disassembler, so real machine code for Hopper (sm_90) and for the RTX 50 series
(sm_120) is made on any Linux machine, without a driver. A `Reading` says what came out: registers, spills, shared
memory, 16-byte loads, tensor-core instructions.

    readings_of(call, 90)   every kernel that `call` launches on meta tensors, at any size; nothing is launched
    shipped_readings()      what the test gate found in labkit's own kernels (data/results/compile)

Beside it: compiler_process compiles a kernel from its text, for a notebook that interprets; occupancy reads from a
reading how many warps fit on a multiprocessor.

Every reading comes from a fresh compile in a temporary cache: Triton's cache keeps binaries, but not the assembler's
log, which alone tells of spills. It takes 0.2 s, less than the 0.4 s of disassembly.

Source: Triton's support for hosts that only compile, triton pull request 3362.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from labkit.errors import LabError
from labkit.files import DATA

SHIPPED = DATA / "results" / "compile"
_devices = itertools.count(1000)


@dataclasses.dataclass(frozen=True)
class Reading:
    """One kernel, compiled for one target. Counts are of instructions in the machine code, bytes are for one thread
    (spill, stack) or one block (shared)."""

    kernel: str
    arch: str  # like "sm_90"
    registers: int  # a thread
    spill_bytes: int  # stored to and loaded from memory because registers ran out
    stack_bytes: int
    shared_bytes: int
    loads: int  # from global memory
    wide_loads: int  # those of 16 bytes a thread
    wgmma: int  # HGMMA: Hopper's matrix product of four warps
    mma: int  # HMMA: the matrix product of one warp
    atomics: int  # on global memory
    fp64_lines: int  # lines of PTX with float64: a Python float that was passed on as a double, mostly
    settings: dict[str, Any]  # constexprs, num_warps, num_stages
    seconds: float | None = None  # processor time of the compile, the assembler's included

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Compiled(NamedTuple):
    """A reading with the two texts that it was read from."""

    reading: Reading
    ptx: str
    sass: str


def readings_of(call: Callable[[], object], arch: int) -> list[Reading]:
    """One reading for each distinct kernel that `call` launches, in that order, with the launch settings of `arch`.

    Args:
        call: runs launches on meta tensors (any size, no memory), like `lambda: launch_forward(logits, ...)`. Triton
            takes a meta tensor's address for a multiple of 16, also that of a slice.
        arch: compute capability: 90, 120.
    Raises:
        LabError: Triton is absent, or this process interprets its kernels.
    """
    from labkit.kernels.configs import target_arch
    from labkit.kernels.language import interpreting

    demand_triton()
    if interpreting():
        raise LabError("This process runs kernels in Triton's interpreter, so it cannot compile them.",
                       "Start a process without TRITON_INTERPRET, or use compile_source, which does that.")
    with target_arch(arch), _launches_compile(arch) as compiled:
        call()
        return [each.reading for each in compiled]


def shipped_readings(version: str | None = None) -> dict[str, dict[str, list[Reading]]]:
    """{case: {arch: readings}} of labkit's kernels, as compiled by that version of Triton (the installed one).

    Raises:
        LabError: no readings are kept for it; the sentence names the versions that are there.
    """
    kept = sorted(path.stem for path in SHIPPED.glob("*.json"))
    try:
        version = version or importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version not in kept:
        raise LabError(f"No compiled readings are kept for Triton {version}; there are some for: {', '.join(kept)}.",
                       "Ask for one of these versions, or write them: python -m tests.kernels.compile_cases")
    table = json.loads((SHIPPED / f"{version}.json").read_text(encoding="utf-8"))
    return {case: {arch: [Reading(**each) for each in readings] for arch, readings in by_arch.items()}
            for case, by_arch in table.items()}


def demand_triton() -> None:
    if not importlib.util.find_spec("triton"):
        raise LabError("Triton is not installed, so nothing can be compiled.", "On Linux: pip install triton.")


class _Driver:
    """The three things that the JIT asks a GPU's driver. It caches by device number, so each use has a new one."""

    def __init__(self, arch: int):
        self.arch, self.device = arch, next(_devices)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def fresh_compile() -> Iterator[io.StringIO]:
    """Inside, Triton compiles with an empty cache, and the assembler's log goes to the stream."""
    from triton import knobs

    with contextlib.ExitStack() as stack:
        for group in (knobs.cache, knobs.nvidia):
            stack.enter_context(group.scope())
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-compile-"))
        knobs.nvidia.dump_ptxas_log = True
        yield stack.enter_context(contextlib.redirect_stdout(io.StringIO()))


@contextlib.contextmanager
def _launches_compile(arch: int) -> Iterator[list[Compiled]]:
    """Inside, a launch compiles for `arch` and adds to the list; afterwards all is as it was."""
    from triton.runtime import JITFunction, driver

    launch, compiled, seen = JITFunction.run, [], set()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        start = processor_seconds()
        with fresh_compile() as log:
            kernel = launch(self, *args, grid=grid, warmup=True, **keywords)
        if id(kernel) not in seen:  # the JIT keeps it, so the id stays its own
            seen.add(id(kernel))
            compiled.append(compiled_from(kernel, log.getvalue(), processor_seconds() - start))
        return kernel

    # not through `driver.active`: reading that looks for a GPU, and raises where there is none
    with mock.patch.object(driver, "_active", _Driver(arch)), mock.patch.object(JITFunction, "run", run):
        yield compiled


def processor_seconds() -> float:
    return sum(os.times()[:4])  # user and system, of this process and of the assemblers that it waited for


def compiled_from(kernel: Any, log: str, seconds: float) -> Compiled:
    ptx, sass = kernel.asm["ptx"], _disassembled(kernel.asm["cubin"])
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))  # a frame for each function
    reading = Reading(
        kernel=kernel.metadata.name, arch=f"sm_{kernel.metadata.target.arch}",
        registers=max(int(number) for number in re.findall(r"Used (\d+) registers", log)),
        spill_bytes=stores + loads, stack_bytes=stack, shared_bytes=kernel.metadata.shared,
        loads=_count(r"\bLDG(STS)?\b", sass), wide_loads=_count(r"\bLDG(STS)?\.\S*\b128\b", sass),
        wgmma=_count(r"\bHGMMA\b", sass), mma=_count(r"\bHMMA\b", sass), atomics=_count(r"\b(REDG?|ATOMG?)\b", sass),
        fp64_lines=_count(r"^.*\.f64.*$", ptx), settings=_settings(kernel), seconds=round(seconds, 3))
    return Compiled(reading, ptx, sass)


def _disassembled(cubin: bytes) -> str:
    """An address and an instruction a line. Triton's own asm["sass"] stops where an address gets its fifth digit."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True,
                                 check=True).stdout
    return "\n".join(f"{at}  {line}" for at, line in re.findall(r"^\s*/\*(\w{4,})\*/\s*(.*?;)", listing, re.MULTILINE))


def _count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text, re.MULTILINE))


def _settings(kernel: Any) -> dict[str, Any]:
    """Declared constexprs (an argument that is 1 or None becomes one too, but is no setting), warps and stages."""
    function, values = kernel.src.fn, kernel.src.constants
    named = {function.arg_names[i]: values[(i,)] for i in function.constexprs if (i,) in values}
    plain = {name: value if isinstance(value, int | float | None) else str(value) for name, value in named.items()}
    return plain | {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}
