"""Processes that wait for messages: started together, asked together, ended together.

Whatever goes wrong, the processes end: an error, an interrupt, a worker that dies or doesn't answer in time. A dead
worker closes its end of the pipe, so whoever waits for it knows at once; and workers end by themselves where the
process that holds them is killed (worker.py).
"""

import contextlib
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
import weakref
from multiprocessing import connection

from labkit.errors import LabError
from labkit.pipeline.processes_model import Blocks
from labkit.pipeline.worker import serve
from labkit.pipeline.worker_schedule import Store

END_S = 1.0  # what a worker gets to end by itself
PRELOAD = ["labkit.pipeline.worker", "torch.distributed.pipelining",
           "torch.fx.experimental.symbolic_shapes"]  # autograd imports it at its first need


class Workers:
    """N processes (labkit.pipeline.worker), warm. Use it in a `with` block, or call `close`."""

    def __init__(self, count: int, blocks: Blocks, slots: int, time_out_s: float):
        if min(count, slots, blocks.layers) < 1:
            raise LabError(f"{count} workers with {blocks.layers} layers and {slots} slots do nothing.",
                           "Use whole numbers of 1 or more.")
        self.count, self.blocks, self.slots, self.time_out_s = count, blocks, slots, time_out_s
        self.processes, self.connections = [], []
        start = time.perf_counter()
        self.folder = tempfile.mkdtemp(prefix="labkit-pipeline-")
        self.remove_folder = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        with self.ended_by_errors():
            self.start_workers()
            self.ask("warm_up")
        self.spawn_seconds = time.perf_counter() - start

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def start_workers(self) -> None:
        """On Linux one process imports torch and forks all workers, while it has no threads; elsewhere each imports."""
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(PRELOAD)
        self.store = Store.make(self.blocks, self.slots, self.count)
        self.bells = [context.Semaphore(0) for _ in range(self.count)]
        for number in range(self.count):
            here, there = context.Pipe()
            arguments = there, self.folder, number, self.count, self.blocks, self.store, self.bells
            process = context.Process(target=serve, args=arguments, daemon=True, name=f"pipeline worker {number}")
            process.start()
            there.close()  # else its end would stay open here, and a dead worker would look silent
            self.processes.append(process)
            self.connections.append(here)

    @contextlib.contextmanager
    def ended_by_errors(self):
        """No worker outlives an error or an interrupt: it may be in the middle of something."""
        try:
            yield
        except BaseException:
            self.close(at_once=True)
            raise

    def close(self, *, at_once: bool = False) -> None:
        """End the workers: by a message, or at once where they may not listen. Twice does no harm."""
        if not at_once:
            for each in self.connections:
                with contextlib.suppress(OSError):
                    each.send(("end",))
        for process in self.processes:
            process.join(0 if at_once else END_S)
            process.kill()
            process.join()
            process.close()
        for each in self.connections:
            each.close()
        self.processes, self.connections = [], []
        self.remove_folder()

    def ask(self, name: str, *values, during: str = "starting") -> list:
        """Send every worker one message and collect the answers. Raises LabError where a worker dies or is silent."""
        if not self.processes:
            raise LabError("The pipeline's processes have ended.", "Make a new PipelineProcesses.")
        deadline, answers = time.monotonic() + self.time_out_s, {}
        for worker, each in enumerate(self.connections):
            try:
                each.send((name, *values))
            except OSError:
                self.report_death(worker, during)
        while len(answers) < self.count:
            for worker in self.answering(set(range(self.count)) - set(answers), deadline, during):
                answers[worker] = self.answer(worker, during)
        return [answers[worker] for worker in range(self.count)]

    def answering(self, waiting: set[int], deadline: float, during: str) -> list[int]:
        """The first of the workers to answer, or to die."""
        ends = {self.connections[worker]: worker for worker in waiting}
        ready = connection.wait(list(ends), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise LabError(f"In {during} workers {sorted(waiting)} have not answered for {self.time_out_s:g} s.",
                           "Give fewer or shorter operations, or a longer time_out_s.")
        return [ends[each] for each in ready]

    def answer(self, worker: int, during: str):
        """What a worker has sent. Raises what it failed with."""
        try:
            state, value = self.connections[worker].recv()
        except (EOFError, OSError):
            self.report_death(worker, during)
        if state == "done":
            return value
        raise value if isinstance(value, LabError) else RuntimeError(f"Worker {worker} failed in {during}:\n{value}")

    def report_death(self, worker: int, during: str) -> None:
        """Name the worker and how it ended."""
        process = self.processes[worker]
        process.join(END_S)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else "ended"
        raise LabError(f"Worker {worker} (process {process.pid}) was {how} in {during}, exit code {code}; "
                       "the others have been ended.",
                       "Look whether memory ran out, then make a new PipelineProcesses.")
