"""The two ceilings of the machine at hand, measured: how fast it copies memory and how fast it multiplies matrices.

    copy bandwidth = 2 * buffer bytes / seconds       every byte is read once and written once
    matmul rate    = 2 n^3 / seconds                  for [n, n] @ [n, n]

Three habits keep the numbers honest. The buffer is several times the last-level cache, or one measures the cache.
The matrices are random: a GPU runs zeros faster, because they take less power (894 against 769 to 798 TFLOP/s on an
H200). Each figure is the median of repeats, with the 20th and 80th percentile beside it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

MIB = 2**20
MATMUL_SIZES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Rate:
    """Work per second over the repeats of one measurement, and the size that was used."""

    median: float
    p20: float
    p80: float
    repeats: int
    size: int  # bytes of the buffer, or n of the matrices


@dataclass(frozen=True)
class Ceilings:
    """A machine's roofline. `copy` in bytes/s, `matmul` in FLOP/s."""

    device: str
    dtype: str
    threads: int
    copy: Rate
    matmul: Rate

    @property
    def ridge(self) -> float:
        """FLOP per byte where the two ceilings meet."""
        return self.matmul.median / self.copy.median


def measure_ceilings(device: str | torch.device = "cpu", seconds: float | None = None) -> Ceilings:
    """Measure both ceilings in about `seconds` (default: 1.5 on a CPU, 6 on a GPU), half of it for each.

    fp32 on a CPU with torch's current number of threads; bf16 on a GPU. The matmul ceiling is the best of the sizes in
    MATMUL_SIZES, since none of them is the fastest everywhere.
    """
    device = torch.device(device)
    budget = (6.0 if device.type == "cuda" else 1.5) if seconds is None else seconds
    dtype, sizes = (torch.bfloat16 if device.type == "cuda" else torch.float32), MATMUL_SIZES[device.type]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rates = [matmul_rate(n, device, dtype, budget / 2 / len(sizes)) for n in sizes]
    return Ceilings(name, str(dtype).removeprefix("torch."), torch.get_num_threads(),
                    copy=copy_rate(device, budget / 2), matmul=max(rates, key=lambda each: each.median))


def copy_rate(device: str | torch.device, seconds: float = 1.0, buffer_bytes: int | None = None) -> Rate:
    """Bytes/s, read plus written, of copying one buffer onto another.

    A CPU may also read a line before it overwrites it; that traffic is not counted, as in the STREAM benchmark.
    """
    device = torch.device(device)
    size = buffer_bytes or copy_buffer_bytes(device)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)  # written now, so that page faults are not timed
    return rate(lambda: target.copy_(source), 2.0 * size, device, seconds, size)


def matmul_rate(n: int, device: str | torch.device, dtype: torch.dtype, seconds: float = 1.0, *,
                zeros: bool = False, seed: int = 0) -> Rate:
    """FLOP/s of [n, n] @ [n, n] on random numbers from `seed` (or on zeros, to see how much that flatters)."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    if zeros:
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    product = torch.empty_like(a)
    return rate(lambda: torch.mm(a, b, out=product), 2.0 * n**3, device, seconds, n)


def copy_buffer_bytes(device: torch.device) -> int:
    """Four times the last-level cache, at least 128 MiB (CPU) or 512 MiB (GPU)."""
    if device.type == "cuda":
        return max(512 * MIB, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return min(max(128 * MIB, 4 * last_level_cache_bytes()), 2048 * MIB)


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The largest cache that Linux reports for the first core; 32 MiB where it says nothing (other systems)."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [file.read_text().strip() for file in folder.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 * MIB)


def rate(call: Callable[[], object], work: float, device: str | torch.device, seconds: float, size: int = 0) -> Rate:
    """`work` per second of `call`, repeated until the time is up (5 times at least).

    A short call is timed in groups of at least 2 ms, so that neither the clock nor one kernel launch is measured.
    """
    clock = _gpu_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    clock(call, 2)  # warm-up: allocation, clock frequency, library initialisation
    calls = max(1, round(0.002 / max(clock(call, 3), 1e-9)))
    end, times = time.perf_counter() + seconds, []
    while len(times) < 5 or time.perf_counter() < end:
        times.append(clock(call, calls))
    p20, median, p80 = np.quantile(work / np.array(times), (0.2, 0.5, 0.8)).tolist()
    return Rate(median, p20, p80, len(times), size)


def _cpu_seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _gpu_seconds(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls
