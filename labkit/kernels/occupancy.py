"""How many warps of a kernel a multiprocessor can hold at once: a prediction from its registers and shared memory.

    occupancy = blocks x warps a block / warps a multiprocessor holds

`blocks` is limited by whichever runs out first: places for warps or blocks, shared memory (1 KiB more a block than the
kernel asked for), or registers (given to a warp 256 at a time, from four files of 16,384).

High occupancy hides the latency of memory; it is not a goal in itself. A matrix product is often fastest at a quarter.

Source: CUDA C++ Programming Guide, "Compute Capabilities".
"""

from typing import NamedTuple

from labkit.errors import LabError
from labkit.kernels.machine_code import Reading


class Limits(NamedTuple):
    """What a block may have and a multiprocessor holds; bytes and counts."""

    shared_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65536
    registers_thread: int = 255


LIMITS = {
    "sm_80": Limits(166_912, 167_936, 64, 32),
    "sm_86": Limits(101_376, 102_400, 48, 16),
    "sm_89": Limits(101_376, 102_400, 48, 24),
    "sm_90": Limits(232_448, 233_472, 64, 32),
    "sm_100": Limits(232_448, 233_472, 64, 32),
    "sm_120": Limits(101_376, 102_400, 48, 24),
}


def limits(arch: int | str) -> Limits:
    """Limits of 90 or "sm_90". The compiler does not hold a kernel to its shared memory; the launch would fail.

    Raises:
        LabError: an arch that is not in the table.
    """
    name = arch if isinstance(arch, str) else f"sm_{arch}"
    if name not in LIMITS:
        raise LabError(f"No limits are known for {name}.", f"Choose one of {', '.join(LIMITS)}.")
    return LIMITS[name]


def occupancy(reading: Reading) -> float:
    """Share of the warps of a multiprocessor that can be resident, 0 where not even one block fits."""
    has, warps = limits(reading.arch), reading.settings["num_warps"]
    registers_warp = max(256, -(-reading.registers * 32 // 256) * 256)
    warps_by_registers = 4 * (has.registers // 4 // registers_warp)
    by_shared = has.shared // (-(-reading.shared_bytes // 128) * 128 + 1024)
    if reading.shared_bytes > has.shared_block:
        by_shared = 0
    return min(has.blocks, has.warps // warps, warps_by_registers // warps, by_shared) * warps / has.warps
