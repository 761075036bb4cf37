"""The most memory a run has held, in gigabytes (1e9 bytes)."""

import sys

import torch

_workers = [0.0]


def held_by_worker(gigabytes: float) -> None:
    """Note the peak of another process that computed for this one: a worker of a sweep."""
    _workers[0] = max(_workers[0], gigabytes)


def peak_gigabytes(device: torch.device) -> float:
    """On a GPU the peak of PyTorch's allocator; on a CPU the peak resident size of this process since its start, plus
    that of the largest worker it has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows, where the course runs inside WSL

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return peak * unit / 1e9 + _workers[0]
