"""Many independent runs: every arm with every seed, on the cores there are.

On a CPU small models are too small for several threads each, so the runs go side by side, one thread a run. Where the
system can fork (Linux) each worker is a process: threads of one process would wait for each other, since a small model
spends half its time in Python, which only one of them may run. Elsewhere they are threads. On a GPU the runs go one
after the other. Every run depends on its own settings alone, so order, kind and number of workers change no result.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from labkit.allocator import keep_freed_memory
from labkit.errors import LabError
from labkit.progress import bar, hidden_bars

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
_runs: list[Callable[[], object]] = []  # what a forked worker finds in its copy of this process


def workers_for(device: torch.device) -> int:
    """One on a GPU, else one for each core that this process may use."""
    if device.type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_bar(run: Callable[[], Result]) -> Result:
    """Call one of many runs; the bar of the sweep stands for all of theirs."""
    with hidden_bars():
        return run()


def in_a_fork(place: int) -> bytes:
    """One run in a worker process; its result as bytes, which cost one copy and no shared memory for each tensor."""
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    torch.save(without_bar(_runs[place]), buffer)
    return buffer.getvalue()


def can_fork(device: torch.device) -> bool:
    """Linux without a GPU in use: a fork of a process that has spoken to CUDA cannot speak to it again."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.cuda.is_initialized()


@contextlib.contextmanager
def pool_of(runs: list[Callable[[], object]], workers: int,
            device: torch.device) -> Iterator[tuple[Executor, Callable[[int], Future]]]:
    """Workers, and how to hand them the run at a place. Forked workers find the runs where this process left them."""
    if workers == 1 or not can_fork(device):
        with ThreadPoolExecutor(workers) as pool:
            yield pool, lambda place: pool.submit(without_bar, runs[place])
        return
    _runs[:] = runs
    try:
        with warnings.catch_warnings(), ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            # Python 3.12 warns of any fork beside threads; the children run torch on one thread and touch no other
            warnings.simplefilter("ignore", DeprecationWarning)
            yield pool, lambda place: pool.submit(in_a_fork, place)
    finally:
        _runs.clear()


def result_of(future: Future) -> object:
    """What a run returned, by either kind of worker."""
    value = future.result()
    return torch.load(io.BytesIO(value), weights_only=False) if isinstance(value, bytes) else value


def run_all(runs: Mapping[Key, Callable[[], Result]], device: torch.device, *, workers: int | None = None,
            label: str = "runs") -> dict[Key, Result]:
    """Call every function and return the results by key, in the order of `runs`.

    `device` is where they compute. A run may change nothing outside itself: it may be in another process. The first
    exception, or Ctrl-C, stops what has not begun and is raised.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    workers = min(workers or workers_for(device), max(1, len(runs)))
    with (bar(len(runs), label, unit="run") as progress,
          pool_of(list(runs.values()), workers, device) as (pool, submit)):
        futures = {key: submit(place) for place, key in enumerate(runs)}
        try:
            for future in as_completed(futures.values()):
                future.result()
                progress.update(1)  # from this thread: a notebook's bar does not like others
        except BrokenProcessPool:
            raise LabError("A run was killed, probably because memory ran out.",
                           "Close other programs, or choose a smaller scale.") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return {key: result_of(future) for key, future in futures.items()}
