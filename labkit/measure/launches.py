"""What a call costs beside its time: memory, launches, and what was compiled for it. On a GPU only.

peak memory    the most that the allocator held during the call, above what was there before it
launches       kernels, fills and copies that the profiler saw on the GPU, and the sum of their times
resources      registers, spills and shared memory of each Triton kernel, from the binary that ran
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch

from labkit.kernels.language import TRITON


class Launches(NamedTuple):
    """Operations on the GPU in one call, and the seconds that they ran."""

    count: int
    seconds: float


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes above the inputs. What the call returns counts, as long as it lives during the call."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def launches(call: Callable[[], object], device: torch.device) -> Launches:
    """What the profiler sees of one call."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    return counted(profiler.events())


def counted(events: Any) -> Launches:
    """Those of the profiler's events that ran on the GPU; names given by the user to a span of time are none."""
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA
              and not getattr(event, "is_user_annotation", False)]
    return Launches(len(on_gpu), sum(event.time_range.elapsed_us() for event in on_gpu) * 1e-6)


def resources(call: Callable[[], object]) -> list[dict[str, Any]]:
    """{kernel, registers, spills, shared_bytes, settings} of each distinct Triton kernel that the call launches."""
    if not TRITON:
        return []
    from triton.runtime import JITFunction

    launch, seen = JITFunction.run, {}

    def run(self: Any, *args: Any, **named: Any) -> Any:
        kernel = launch(self, *args, **named)
        if kernel is not None:
            seen[id(kernel)] = (self, kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", run):
        call()
    return [_resources(function, kernel) for function, kernel in seen.values()]


def _resources(function: Any, kernel: Any) -> dict[str, Any]:
    constants = {function.arg_names[i]: value for (i, *_), value in getattr(kernel.src, "constants", {}).items()
                 if i in function.constexprs}
    settings = {name: value for name, value in constants.items() if isinstance(value, int | float | None)}
    return {"kernel": kernel.metadata.name, "registers": getattr(kernel, "n_regs", None),
            "spills": getattr(kernel, "n_spills", None), "shared_bytes": kernel.metadata.shared,
            "settings": settings | {"num_warps": kernel.metadata.num_warps, "num_stages": kernel.metadata.num_stages}}
