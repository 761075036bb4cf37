"""Many independent runs: every arm with every seed, on the cores there are.

On a CPU small models are too small for several threads each, so the runs go side by side, one thread a run; PyTorch
lets go of Python's lock while it computes, so threads of one process are enough and nothing has to be pickled. On a GPU
the runs go one after the other. Every run depends on its own settings alone, so order and number of workers change
no result.
"""

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from labkit.allocator import keep_freed_memory
from labkit.progress import bar, hidden_bars

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def workers_for(device: torch.device) -> int:
    """One on a GPU, else one for each core that this process may use."""
    if device.type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_bar(run: Callable[[], Result]) -> Result:
    """Call one of many runs; the bar of the sweep stands for all of theirs."""
    with hidden_bars():
        return run()


def run_all(runs: Mapping[Key, Callable[[], Result]], device: torch.device, *, workers: int | None = None,
            label: str = "runs") -> dict[Key, Result]:
    """Call every function and return the results by key, in the order of `runs`.

    `device` is where they compute. The first exception, or Ctrl-C, stops what has not begun and is raised.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    with bar(len(runs), label, unit="run") as progress, ThreadPoolExecutor(workers or workers_for(device)) as pool:
        futures = {key: pool.submit(without_bar, run) for key, run in runs.items()}
        try:
            for future in as_completed(futures.values()):
                future.result()
                progress.update(1)  # from this thread: a notebook's bar does not like others
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return {key: future.result() for key, future in futures.items()}
