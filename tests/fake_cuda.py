"""CUDA's streams and events on a CPU, with a detector of races: a wait that is missing fails, though values are right.

Work runs at once, in the order in which it is launched. What may overlap on a GPU is told by vector clocks: an agent is
a stream or a thread of the host; an operation knows those of others that came before it for sure, by events, waits and
launches. Every operation of ATen is looked at: a tensor is read only behind its last write, written only behind its
last write and all reads. A tensor's memory is given back to the stream that made it: uses by other streams must lie
behind it by then, or have been recorded (`record_stream`), as PyTorch's caching allocator has it.
"""

import contextlib
import itertools
import threading
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.pipeline.offload_lanes import OPTIMIZER, OptimizerLane
from labkit.pipeline.offload_machines import CudaMachine


class Clock(dict):
    """agent -> how many of its operations lie before."""

    def join(self, other):
        for agent, count in other.items():
            self[agent] = max(self.get(agent, 0), count)


class FakeCuda:
    """Stands for the module torch.cuda."""

    def __init__(self):
        self.names, self.local, self.races, self.lock = itertools.count(), threading.local(), [], threading.RLock()
        self.storages = {}  # key -> Uses
        self.random = torch.zeros(1)

    def host(self):
        """The clock of this thread."""
        if not hasattr(self.local, "clock"):
            self.local.clock, self.local.agent, self.local.streams = Clock(), f"host {next(self.names)}", []
        return self.local.clock

    def agent(self):
        """(name, clock) of who launches now; a stream knows what the launching thread knows."""
        host = self.host()
        if not self.local.streams:
            return self.local.agent, host
        stream = self.local.streams[-1]
        stream.clock.join(host)
        return stream.name, stream.clock

    # ---- what StreamLane and CudaMachine call

    def Stream(self, device=None):
        return Stream(self)

    def Event(self, enable_timing=False):
        return Event(self)

    @contextlib.contextmanager
    def stream(self, stream):
        self.host()
        self.local.streams.append(stream)
        try:
            yield
        finally:
            self.local.streams.pop()

    def get_rng_state(self, device):
        return self.random

    def set_rng_state(self, state, device):
        self.random = state

    def memory_allocated(self, device):
        return 100

    def max_memory_allocated(self, device):
        return 350

    def reset_peak_memory_stats(self, device):
        pass


class Stream:
    def __init__(self, cuda):
        self.cuda, self.name, self.clock = cuda, f"stream {next(cuda.names)}", Clock()

    def wait_event(self, event):
        self.clock.join(self.cuda.host())
        self.clock.join(event.clock)

    def synchronize(self):
        self.cuda.host().join(self.clock)


class Event:
    def __init__(self, cuda):
        self.cuda, self.clock, self.time = cuda, Clock(), None

    def record(self, stream):
        self.clock, self.time = Clock(stream.clock), time.perf_counter()

    def synchronize(self):
        assert self.time is not None, "an event that was never recorded"
        self.cuda.host().join(self.clock)

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Uses:
    """Who touched a storage, and when."""

    def __init__(self, maker, pinned):
        self.maker, self.pinned, self.write, self.reads, self.lent = maker, pinned, None, {}, set()


class Detector(TorchDispatchMode):
    """Looks at every operation of this thread, whichever stream it is launched on."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)]
        schema = func._schema.arguments
        written = [value for argument, value in zip(schema, args, strict=False)
                   if argument.alias_info is not None and argument.alias_info.is_write and torch.is_tensor(value)]
        if not func.is_view:
            for each in given:
                self.touch(each, func, any(each is other for other in written))
        made = func(*args, **(kwargs or {}))
        known = {each.untyped_storage()._cdata for each in given}
        for each in tree_leaves(made):
            if torch.is_tensor(each) and each.untyped_storage()._cdata not in known:
                self.touch(each, func, True)
        return made

    def touch(self, tensor, func, write):
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return
        with self.cuda.lock:
            name, clock = self.cuda.agent()
            uses = self.uses(storage, name)
            before = [uses.write] if uses.write else []
            before += list(uses.reads.items()) if write else []
            for agent, count in before:
                if clock.get(agent, 0) < count:
                    self.cuda.races.append(f"{name} {'writes' if write else 'reads'} in {func} beside {agent}")
            clock[name] = clock.get(name, 0) + 1
            if write:
                uses.write, uses.reads = (name, clock[name]), {}
            else:
                uses.reads[name] = clock[name]

    def uses(self, storage, name):
        key = storage._cdata
        if key not in self.cuda.storages:
            self.cuda.storages[key] = Uses(name, getattr(self.cuda.local, "pinning", False))
            weakref.finalize(storage, self.freed, key).atexit = False
        return self.cuda.storages[key]

    def freed(self, key):
        """The memory goes to the stream that made it."""
        with self.cuda.lock:
            uses = self.cuda.storages.pop(key)
            if uses.pinned or uses.maker.startswith("host"):
                return
            clock = Clock(self.cuda.host())
            for agent, count in [*([uses.write] if uses.write else []), *uses.reads.items()]:
                if agent != uses.maker and agent not in uses.lent and clock.get(agent, 0) < count:
                    self.cuda.races.append(f"memory of {uses.maker} is given back beside {agent}")


class Mark:
    """A thread's mark that also tells the waiting thread what lies before."""

    def __init__(self, cuda, future, after):
        self.cuda, self.future, self.clock = cuda, future, after

    def result(self):
        self.future.result()
        self.cuda.host().join(self.clock)


class FakeOptimizerLane(OptimizerLane):
    """The optimizer's thread, under the detector."""

    def __init__(self, number, begin, cuda):
        super().__init__(number, begin)
        self.cuda = cuda

    def submit(self, label, work, after=()):
        before, behind = Clock(self.cuda.host()), Clock()
        after = tuple(after)

        def watched():
            self.cuda.host().join(before)
            with Detector(self.cuda):
                work()
            behind.join(self.cuda.host())

        return Mark(self.cuda, super().submit(label, watched, after), behind)


class FakeMachine(CudaMachine):
    """CudaMachine over the fake, with the three calls that need a driver replaced."""

    def __init__(self, **more):
        super().__init__(torch.device("cpu"), cuda=FakeCuda(), **more)

    def lane(self, number):
        return FakeOptimizerLane(number, self.begin, self.cuda) if number == OPTIMIZER else super().lane(number)

    def host_empty(self, shape, dtype):
        self.cuda.local.pinning = True
        try:
            return torch.empty(shape, dtype=dtype)
        finally:
            self.cuda.local.pinning = False

    def lend(self, tensor, lane):
        with self.cuda.lock:
            self.cuda.storages[tensor.untyped_storage()._cdata].lent.add(lane.stream.name)
