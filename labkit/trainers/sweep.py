"""Many independent runs: every arm with every seed, on the cores there are.

On a CPU small models are too small for several threads each, so the runs go side by side, one thread a run. Each worker
is a process: threads of one process would wait for each other, since a small model spends half its time in Python,
which only one of them may run. loky starts the workers afresh and keeps them for the next sweep. (Forks of the running
process start at once, but take over whatever locks its other threads hold: a notebook's kernel has several, and two
forked sweeps in some hundreds hung.) On a GPU the runs go one after the other. Every run depends on its own settings
alone, so order and number of workers change no result.
"""

import ctypes
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import as_completed
from typing import TypeVar

import torch

from labkit.allocator import keep_freed_memory
from labkit.errors import LabError
from labkit.measure import memory
from labkit.progress import bar, hidden_bars

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
IDLE_SECONDS = 60  # then a worker ends; the next sweep starts it again, which takes about three seconds


def workers_for(device: torch.device) -> int:
    """One on a GPU, else one for each core that this process may use."""
    if device.type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_worker() -> None:
    """What every worker process does first."""
    if sys.platform == "linux":  # else a killed notebook leaves it computing for nobody
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    torch.set_num_threads(1)
    keep_freed_memory()


def in_worker(run: Callable[[], Result]) -> tuple[Result, float]:
    """One run, and the most memory that this worker has held. The bar of the sweep stands for that of the run."""
    with hidden_bars():
        return run(), memory.peak_gigabytes(torch.device("cpu"))


def one_by_one(runs: Mapping[Key, Callable[[], Result]]) -> Iterator[tuple[Key, Result]]:
    """Each run in this process."""
    for key, run in runs.items():
        with hidden_bars():
            result = run()
        yield key, result


def side_by_side(runs: Mapping[Key, Callable[[], Result]], workers: int) -> Iterator[tuple[Key, Result]]:
    """Each run in one of `workers` processes, as they finish."""
    import loky  # not on a bare GPU server, where the runs go one by one

    # A worker whose memory has grown is replaced between two runs, which changes nothing and needs no warning.
    warnings.filterwarnings("ignore", message="A worker (stopped|was restarted) while some jobs")
    executor = loky.get_reusable_executor(workers, timeout=IDLE_SECONDS, initializer=prepare_worker)
    keys = {executor.submit(in_worker, run): key for key, run in runs.items()}
    unfinished = True
    try:
        for future in as_completed(keys):
            result, peak = future.result()
            memory.held_by_worker(peak)
            yield keys[future], result
        unfinished = False
    except loky.BrokenProcessPool:
        raise LabError("A run was killed, probably because memory ran out.",
                       "Close other programs, or choose a smaller scale.") from None
    except pickle.PicklingError as error:
        reason = str(error.__cause__ or error).strip('"\n').splitlines()[-1]  # the cause is another thread's traceback
        raise LabError(f"A run cannot be sent to another process: {reason}.",
                       "Give it settings, tensors and models, and let it make the rest itself.") from None
    finally:
        if unfinished:
            executor.shutdown(kill_workers=True)


def run_all(runs: Mapping[Key, Callable[[], Result]], device: torch.device, *, workers: int | None = None,
            label: str = "runs") -> dict[Key, Result]:
    """Call every function and return the results by key, in the order of `runs`.

    `device` is where they compute. A run may change nothing outside itself: it may be in another process. The first
    exception, or Ctrl-C, stops the others and is raised.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    workers = min(workers or workers_for(device), max(1, len(runs)))
    finished = side_by_side(runs, workers) if workers > 1 and device.type == "cpu" else one_by_one(runs)
    results = {}
    with bar(len(runs), label, unit="run") as progress:
        for key, result in finished:
            results[key] = result
            progress.update(1)
    return {key: results[key] for key in runs}
