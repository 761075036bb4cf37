"""The most memory a run has held, in gigabytes (1e9 bytes)."""

import sys

import torch


def peak_gigabytes(device: torch.device) -> float:
    """On a GPU the peak of PyTorch's allocator; on a CPU the peak resident size of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows, where the course runs inside WSL

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9  # macOS counts bytes, Linux kibibytes
