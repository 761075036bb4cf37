"""The most memory a run has held, in gigabytes (1e9 bytes)."""

import sys

import torch


def peak_gigabytes(device: torch.device) -> float:
    """On a GPU the peak of PyTorch's allocator; on a CPU the peak resident size of this process since its start, plus
    that of its largest child: the runs of a sweep are forks, which share the parent's pages and add their own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows, where the course runs inside WSL

    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux kibibytes
