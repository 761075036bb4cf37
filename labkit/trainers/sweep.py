"""Many independent runs: every arm with every seed, on the cores there are.

On a CPU small models are too small for several threads each, so the runs go side by side, one thread a run. Where the
system can fork (Linux) each worker is a process: threads of one process would wait for each other, since a small model
spends half its time in Python, which only one of them may run. Elsewhere they are threads. On a GPU the runs go one
after the other. Every run depends on its own settings alone, so order, kind and number of workers change no result.
"""

import ctypes
import io
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from labkit.allocator import keep_freed_memory
from labkit.errors import LabError
from labkit.progress import bar, hidden_bars

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def workers_for(device: torch.device) -> int:
    """One on a GPU, else one for each core that this process may use."""
    if device.type == "cuda":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def without_bar(run: Callable[[], Result]) -> Result:
    """Call one of many runs; the bar of the sweep stands for all of theirs."""
    with hidden_bars():
        return run()


def can_fork(device: torch.device) -> bool:
    """Linux without a GPU in use: a fork of a process that has spoken to CUDA cannot speak to it again."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.cuda.is_initialized()


def in_a_fork(run: Callable[[], object], pipe: Connection) -> None:
    """One run in a process of its own: what it returns or raises goes back as bytes, in one copy."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # else a killed notebook leaves it computing for nobody
    torch.set_num_threads(1)
    try:
        outcome = True, without_bar(run)
    except Exception as error:
        outcome = False, error
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    pipe.send_bytes(buffer.getvalue())


def start_fork(run: Callable[[], object]) -> tuple[Connection, multiprocessing.Process]:
    """A child that computes `run`, and the pipe on which its outcome will come."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=in_a_fork, args=(run, theirs))
    with warnings.catch_warnings():  # Python 3.12 warns of any fork beside threads; the child touches none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()  # the child has the only other copy, so its death closes the pipe
    return ours, process


def outcome_of(pipe: Connection, process: multiprocessing.Process) -> object:
    """What a child returned; what it raised is raised here."""
    try:
        data = pipe.recv_bytes()
    except EOFError:
        raise LabError("A run was killed, probably because memory ran out.",
                       "Close other programs, or choose a smaller scale.") from None
    finally:
        pipe.close()
        process.join()
    returned, value = torch.load(io.BytesIO(data), weights_only=False)
    if not returned:
        raise value
    return value


def forked(runs: Mapping[Key, Callable[[], Result]], workers: int) -> Iterator[tuple[Key, Result]]:
    """Each run in a fork, `workers` at a time, as they finish. (Python's process pool shares locks among its workers;
    with forks and an early end it has been seen to hang.)"""
    waiting, running = list(reversed(runs.items())), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                key, run = waiting.pop()
                pipe, process = start_fork(run)
                running[pipe] = key, process
            for pipe in wait(list(running)):
                key, process = running.pop(pipe)
                yield key, outcome_of(pipe, process)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def threaded(runs: Mapping[Key, Callable[[], Result]], workers: int) -> Iterator[tuple[Key, Result]]:
    """The same in threads of this process."""
    with ThreadPoolExecutor(workers) as pool:
        keys = {pool.submit(without_bar, run): key for key, run in runs.items()}
        try:
            for future in as_completed(keys):
                yield keys[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_all(runs: Mapping[Key, Callable[[], Result]], device: torch.device, *, workers: int | None = None,
            label: str = "runs") -> dict[Key, Result]:
    """Call every function and return the results by key, in the order of `runs`.

    `device` is where they compute. A run may change nothing outside itself: it may be in another process. The first
    exception, or Ctrl-C, stops what has not begun and is raised.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    workers = min(workers or workers_for(device), max(1, len(runs)))
    finished = forked if workers > 1 and can_fork(device) else threaded
    results = {}
    with bar(len(runs), label, unit="run") as progress:
        for key, result in finished(runs, workers):
            results[key] = result
            progress.update(1)  # from this thread: a notebook's bar does not like others
    return {key: results[key] for key in runs}
