"""Many independent runs: every arm with every seed, on the cores there are.

On a CPU small models are too small for several threads each, so the runs go side by side, one thread a run; PyTorch
lets go of Python's lock while it computes, so threads of one process are enough and nothing has to be pickled. On a GPU
the runs go one after the other. Every run depends on its own settings alone, so order and number of workers change
no result.
"""

import os
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from labkit.allocator import keep_freed_memory
from labkit.progress import bar, hidden_bars

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def default_workers() -> int:
    """One on a GPU, else one a core that this process may use."""
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_bar(run: Callable[[], Result]) -> Result:
    """Call one of many runs; the bar of the sweep stands for all of theirs."""
    with hidden_bars():
        return run()


def run_all(runs: Mapping[Key, Callable[[], Result]], *, workers: int | None = None,
            label: str = "runs") -> dict[Key, Result]:
    """Call every function and return the results by key, in the order of `runs`.

    The first exception stops what has not begun and is raised.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    with bar(len(runs), label, unit="run") as progress, ThreadPoolExecutor(workers or default_workers()) as pool:
        futures = {key: pool.submit(without_bar, run) for key, run in runs.items()}
        for future in futures.values():
            future.add_done_callback(lambda _: progress.update(1))
        _, waiting = wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        return {key: future.result() for key, future in futures.items()}
