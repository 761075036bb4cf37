"""How a kernel is launched: block sizes and warps, from a short table by GPU and by size.

A table is a list of rows (arch, largest, settings), read from the top; the first that fits is taken. Tables are short
because a kernel that is limited by memory is fast over a wide range; LABKIT_AUTOTUNE=1 times every row of a table once
for each GPU, kernel and size class, and keeps the fastest for the rest of the process.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

_forced: dict[str, dict[str, int]] = {}
_tuned: dict[tuple, dict[str, int]] = {}
_target: list[int] = []  # the compute capability that is compiled for, where that is not the device's own


class Row(NamedTuple):
    """Settings for `arch` ("sm_90", "sm_120", "any") and sizes up to `largest`."""

    arch: str
    largest: float
    settings: dict[str, int]


# For kernels that read rows of logits once, block after block. The last two rows are for LABKIT_AUTOTUNE only.
OVER_VOCABULARY = [
    Row("any", 1024, {"BLOCK_V": 1024, "num_warps": 4}),
    Row("any", math.inf, {"BLOCK_V": 4096, "num_warps": 8}),
    Row("any", math.inf, {"BLOCK_V": 2048, "num_warps": 4}),
    Row("any", math.inf, {"BLOCK_V": 8192, "num_warps": 16}),
]


def settings_for(kernel: str, table: list[Row], size: int, device: torch.device,
                 launch: Callable[[dict[str, int]], object] | None = None) -> dict[str, int]:
    """Launch keywords (BLOCK_V=4096, num_warps=8, ...) of `kernel` for an input of this size.

    `launch`, given settings, runs the kernel on its real inputs: with it, LABKIT_AUTOTUNE=1 can search the table. (Not
    for a kernel that overwrites its input.)
    """
    fitting = rows_for(table, arch_of(device))
    chosen = next(row.settings for row in fitting if size <= row.largest)
    if launch and device.type == "cuda" and os.environ.get("LABKIT_AUTOTUNE") == "1" and kernel not in _forced:
        key = (kernel, launch.__qualname__, torch.cuda.get_device_name(device), max(size, 1).bit_length())
        if key not in _tuned:
            _tuned[key] = fastest([row.settings for row in fitting], launch)
        chosen = _tuned[key]
    return chosen | _forced.get(kernel, {})


def rows_for(table: list[Row], arch: str) -> list[Row]:
    """The rows of this arch, or those for any where there are none."""
    return [row for row in table if row.arch == arch] or [row for row in table if row.arch == "any"]


def fastest(candidates: list[dict[str, int]], launch: Callable[[dict[str, int]], object]) -> dict[str, int]:
    """The candidate with the smallest median time; one that does not fit the GPU counts as infinitely slow."""
    return min(candidates, key=lambda settings: _milliseconds(lambda: launch(settings)))


def _milliseconds(call: Callable[[], object]) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(call, quantiles=[0.5])
    except OutOfResources:
        return math.inf


def arch_of(device: torch.device) -> str:
    """Like "sm_90": of the GPU, or of the target that is compiled for; "any" without either."""
    if _target:
        return f"sm_{_target[-1]}"
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextlib.contextmanager
def target_arch(capability: int) -> Iterator[None]:
    """Choose settings as on a GPU of this compute capability (90, 120): for compiling without one."""
    _target.append(capability)
    try:
        yield
    finally:
        _target.pop()


@contextlib.contextmanager
def forced(kernel: str, **settings: int) -> Iterator[None]:
    """Override some launch settings of one kernel: many blocks out of a small tensor, or a sweep in a notebook."""
    before = _forced.get(kernel)
    _forced[kernel] = (before or {}) | settings
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before
