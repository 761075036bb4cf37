"""What a worker process does: wait for a message, do it, answer. It ends when told, or when nobody is there to tell it.

The answer is ("done", value) or ("failed", the exception or its text). An interrupt from the keyboard goes to the whole
group of processes; workers leave it to the process that started them, which ends them.
"""

import os
import shutil
import signal
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path

import torch

from labkit.errors import LabError
from labkit.pipeline.processes_job import Job
from labkit.pipeline.processes_model import Blocks
from labkit.pipeline.worker_peer import Peer
from labkit.pipeline.worker_schedule import Executor, Store, rest
from labkit.trainers.sweep import prepare_worker


@dataclass
class Worker:
    """The methods are the messages that `serve` takes."""

    meeting: str  # a file where the process group of the peer meets
    number: int
    workers: int
    blocks: Blocks
    store: Store
    bells: list
    ready: object = None  # has `repeat`
    model: object = field(init=False)

    def __post_init__(self):
        self.model = self.blocks.model()

    def warm_up(self) -> None:
        """The first backward of a process takes long; the first with a gradient given imports for a second more."""
        self.blocks.gradients(2)
        one = torch.ones(1, requires_grad=True)
        torch.autograd.backward([2 * one], [torch.ones(1)])

    def prepare(self, job: Job) -> None:
        self.ready = Executor(self.blocks, self.model, self.store, self.bells, self.number, job)

    def prepare_peer(self, job: Job, schedule: str) -> None:
        self.ready = Peer(self.blocks, self.model, self.number, self.workers, job, schedule, self.meeting)

    def repeat(self, start: float) -> list:
        """Start at one moment of the shared clock; the events as they ran."""
        rest(start)
        return self.ready.repeat()

    def gradients(self) -> dict:
        """Of the last repeat: this worker's share."""
        return {name: each.grad.numpy() for name, each in self.model.named_parameters() if each.grad is not None}


def end_with_parent(folder: Path) -> None:
    """Wait until the process that started this one has died, and follow at once, whatever is going on."""
    parent_process().join()
    shutil.rmtree(folder, ignore_errors=True)  # nobody else is left to do it
    os._exit(1)


def serve(connection, folder: str, *arguments) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=[Path(folder)], daemon=True).start()
    prepare_worker()
    worker = Worker(str(Path(folder, "meeting")), *arguments)
    while True:
        try:
            name, *values = connection.recv()
        except (EOFError, OSError):  # whoever held the other end is gone, and the thread above may come too late
            shutil.rmtree(folder, ignore_errors=True)
            return
        if name == "end":
            return
        try:
            answer = "done", getattr(worker, name)(*values)
        except LabError as error:
            answer = "failed", error
        except Exception:
            answer = "failed", traceback.format_exc()
        connection.send(answer)
