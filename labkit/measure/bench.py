"""`labkit bench` on a GPU: ceilings first, then each op and direction against its peers, as one report.

    run_bench(["rms_norm"], torch.device("cuda"))  ->  {header, rows, skipped}       a row is one implementation

A row's `fraction_of_floor` is floor / median time, with the floor from the ceilings of this very run. `ratio_vs` is the
time of a peer over ours (above 1 ours is faster) with its interval; the entry "ours" is the noise floor. An op that
fails is a row with `error`, and the others go on.
"""

import contextlib
import gc
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch

from labkit import __version__
from labkit.errors import LabError
from labkit.measure.benchmarks import BENCHMARKS, Benchmark
from labkit.measure.ceilings import measure_ceilings
from labkit.measure.contest import OURS, ROW, Contest, Plan, sentence
from labkit.measure.peers import version
from labkit.progress import bar

DEFINITIONS = {
    "fraction_of_floor": "floor_ms / time_ms.p50; floor: bytes over the copy rate or FLOPs over the matmul rate of "
                         "this run, whichever is longer",
    "ratio_vs": "median over rounds of the peer's time over ours, with a 95% bootstrap interval; above 1 ours is "
                "faster; the entry 'ours' is the same implementation entered twice",
    "noise": "no ratio nearer to 1 than this is a finding",
}


def check_ops(ops: list[str]) -> list[str]:
    """The ops that are named, or all.

    Raises:
        LabError: an unknown name.
    """
    unknown = [op for op in ops if op not in BENCHMARKS]
    if unknown:
        raise LabError(f"There is no benchmark of {', '.join(unknown)}.", f"Choose from: {', '.join(BENCHMARKS)}.")
    return list(dict.fromkeys(ops)) or list(BENCHMARKS)


def run_bench(ops: list[str], device: torch.device, *, seconds: float = 240.0, quick: bool = False, size: str = "sizes",
              commit: str = "unknown", save: Callable[[dict], None] | None = None) -> dict[str, Any]:
    """Measure the named ops (all without a name) in about `seconds` of timing and some minutes of compiling.

    Args:
        quick: without torch.compile; for a first look.
        size: "small" is for tests on a CPU, where times say nothing about kernels.
        save: called with the report after each op, so that a run that is stopped leaves what it has.
    """
    chosen = [BENCHMARKS[op] for op in check_ops(ops)]
    contests = sum(len(benchmark.directions) for benchmark in chosen)
    with fresh_caches(), bar(contests, "benchmarks", "direction") as progress:
        progress.set_postfix_str("ceilings")
        ceilings = measure_ceilings(device, None if device.type == "cuda" else 0.1)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        plan = Plan(device, dtype, arch_name(device), ceilings, seconds / contests, size, quick)
        report = {"header": header(plan, commit), "rows": [], "skipped": []}
        for benchmark in chosen:
            progress.set_postfix_str(benchmark.op)
            measure_op(benchmark, plan, report, progress.update)
            report["header"]["complete"] = benchmark is chosen[-1]
            if save:
                save(report)
    return report


def measure_op(benchmark: Benchmark, plan: Plan, report: dict[str, Any], done: Callable[[int], object]) -> None:
    """Add an op's rows; what raises becomes a row with `error`."""
    contest = Contest(benchmark, plan)
    try:
        contest.prepare()
        for direction in benchmark.directions:
            contest.run(direction)
            done(1)
    except Exception as error:  # a failing kernel must not take the others' results with it
        contest.rows.append(failed_row(benchmark, plan, error))
    report["rows"] += contest.rows
    report["skipped"] += contest.skipped
    del contest  # its tensors fill the GPU
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    if not plan.quick:
        torch._dynamo.reset()  # each op is compiled as if it were the first


def failed_row(benchmark: Benchmark, plan: Plan, error: Exception) -> dict[str, Any]:
    """The row of an op that could not be measured."""
    shape = getattr(benchmark, plan.size)
    return dict.fromkeys(ROW) | {"op": benchmark.op, "impl": OURS, "shape": shape, "arch": plan.arch,
                                 "ratio_vs": {}, "targets": [], "error": sentence(error), "note": "failed"}


def failures(report: dict[str, Any]) -> list[str]:
    """Ops that have a row with an error."""
    return [row["op"] for row in report["rows"] if row.get("error")]


def header(plan: Plan, commit: str) -> dict[str, Any]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_properties(plan.device) if plan.device.type == "cuda" else None
    rates = {"copy_TBps": plan.ceilings.copy.median / 1e12, "gemm_TFLOPs": plan.ceilings.matmul.median / 1e12}
    return {"timed": gpu is not None, "complete": False, "device": plan.ceilings.device, "arch": plan.arch,
            "sm_count": gpu and gpu.multi_processor_count, "l2_bytes": gpu and gpu.L2_cache_size,
            "memory_bytes": gpu and gpu.total_memory, **driver_state(gpu is not None), "torch": torch.__version__,
            "triton": version("triton"), "cuda": torch.version.cuda, "python": platform.python_version(),
            "labkit": __version__, "commit": commit, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "ceilings": rates, "seed": plan.seed, "quick": plan.quick, "definitions": DEFINITIONS}


def driver_state(there: bool) -> dict[str, Any]:
    """Driver, and the clocks and power limit as they are: read, never set."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    answer: list[str] = []
    if there:
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            answer = done.stdout.splitlines()[0].split(", ")
    found = dict(zip(fields, answer, strict=False))
    return {"driver": found.pop("driver_version", None), "clocks": found}


def arch_name(device: torch.device) -> str:
    """Like "sm_90"; "cpu" on a CPU."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Inside, Triton and Inductor find nothing compiled before, so that a first call's time is that of compiling."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="labkit-bench-", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: os.path.join(folder, name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

