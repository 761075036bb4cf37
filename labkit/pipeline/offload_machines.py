"""Where an offload engine runs: a CPU that plays the device, with a link of a chosen speed, or a CUDA device.

    machine.copy(device_tensor, host_tensor, UP)       b bytes take b / bandwidth, in the lane that asks for them

Two copies in one direction share the link: the second begins when the first has ended. Up and down don't disturb each
other (PCIe is full duplex). A long copy goes in chunks, so that others find a gap; roundpipe 0.1.1 cuts above 256 MB.
On a CPU "device" memory is an own copy in the same RAM, and its bytes are counted. On CUDA the host's side is pinned,
copies are asynchronous, and a tensor that one stream made and another uses is recorded on that other: PyTorch's
allocator then gives its memory to nobody while the use is pending.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.pipeline.live_bytes import LiveBytes
from labkit.pipeline.offload_lanes import OPTIMIZER, OptimizerLane, StreamLane, ThreadLane

UP, DOWN = "up", "down"
CHUNK_BYTES = 256 << 20


class Link:
    """A bus of so many gigabytes (1e9 bytes) a second in each direction."""

    def __init__(self, gigabytes_per_second: float):
        if not gigabytes_per_second > 0:
            raise LabError(f"A link of {gigabytes_per_second} GB/s carries nothing.", "Give a speed above 0.")
        self.bytes_per_second = 1e9 * gigabytes_per_second
        self.free_at, self.lock = {UP: 0.0, DOWN: 0.0}, threading.Lock()

    def reserve(self, size: int, direction: str) -> float:
        """Take the next free stretch of the link; returns when it ends, in the seconds of time.perf_counter."""
        with self.lock:
            start = max(time.perf_counter(), self.free_at[direction])
            self.free_at[direction] = start + size / self.bytes_per_second
            return self.free_at[direction]


class Machine(Protocol):
    """What an engine asks of the place where it runs."""

    device: torch.device
    begin: float  # time.perf_counter() of 0 ms

    def lane(self, number: int) -> ThreadLane | StreamLane: ...

    def host_empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor: ...  # can be copied fast

    def device_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...

    def copy(self, target: Tensor, source: Tensor, direction: str) -> None: ...

    def lend(self, tensor: Tensor, lane: ThreadLane | StreamLane) -> None: ...  # another lane will use it, too

    def computing(self) -> contextlib.AbstractContextManager: ...  # round what makes device tensors

    def random_state(self) -> tuple[Tensor, ...]: ...

    def set_random_state(self, state: tuple[Tensor, ...]) -> None: ...

    def peak_bytes(self) -> int | None: ...

    def forget_peak(self) -> None: ...


class CpuMachine:
    """Threads in place of streams. link: None copies as fast as memory does."""

    def __init__(self, link: Link | None = None, *, chunk_bytes: int = CHUNK_BYTES, count_bytes: bool = True):
        self.device, self.begin = torch.device("cpu"), time.perf_counter()
        self.link, self.chunk_bytes = link, chunk_bytes
        self.live = LiveBytes() if count_bytes else None

    def lane(self, number: int) -> ThreadLane:
        return (OptimizerLane if number == OPTIMIZER else ThreadLane)(number, self.begin)

    def host_empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def device_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        with self.computing():
            return torch.empty(shape, dtype=dtype)

    def copy(self, target: Tensor, source: Tensor, direction: str) -> None:
        for part, of in chunks(target, source, self.chunk_bytes):
            end = self.link.reserve(of.nbytes, direction) if self.link else 0.0
            part.copy_(of)
            time.sleep(max(0.0, end - time.perf_counter()))

    def lend(self, tensor: Tensor, lane: ThreadLane | StreamLane) -> None:
        """References alone keep a CPU's tensors alive."""

    def computing(self) -> contextlib.AbstractContextManager:
        return self.live.counting() if self.live else contextlib.nullcontext()

    def random_state(self) -> tuple[Tensor, ...]:
        return (torch.get_rng_state(),)

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])

    def peak_bytes(self) -> int | None:
        return self.live.peak if self.live else None

    def forget_peak(self) -> None:
        if self.live:
            self.live.forget()


class CudaMachine:
    """Streams, events and pinned memory. cuda: torch.cuda but in tests."""

    def __init__(self, device: torch.device, *, chunk_bytes: int = CHUNK_BYTES, cuda: Any = torch.cuda):
        self.device, self.cuda, self.begin, self.chunk_bytes = device, cuda, time.perf_counter(), chunk_bytes
        self.base_bytes = 0
        self.forget_peak()

    def lane(self, number: int) -> ThreadLane | StreamLane:
        if number == OPTIMIZER:
            return OptimizerLane(number, self.begin)
        return StreamLane(number, self.begin, self.device, self.cuda)

    def host_empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def device_empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)  # from the pool of the current stream

    def copy(self, target: Tensor, source: Tensor, direction: str) -> None:
        for part, of in chunks(target, source, self.chunk_bytes):
            part.copy_(of, non_blocking=True)

    def lend(self, tensor: Tensor, lane: ThreadLane | StreamLane) -> None:
        tensor.record_stream(lane.stream)

    def computing(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def random_state(self) -> tuple[Tensor, ...]:
        return torch.get_rng_state(), self.cuda.get_rng_state(self.device)

    def set_random_state(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        self.cuda.set_rng_state(state[1], self.device)

    def peak_bytes(self) -> int:
        return self.cuda.max_memory_allocated(self.device) - self.base_bytes

    def forget_peak(self) -> None:
        self.cuda.reset_peak_memory_stats(self.device)
        self.base_bytes = self.base_bytes or self.cuda.memory_allocated(self.device)


def chunks(target: Tensor, source: Tensor, chunk_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(piece of the target, piece of the source), each of at most so many bytes; the whole where it is small."""
    if source.nbytes <= chunk_bytes:
        yield target, source
        return
    count = max(1, chunk_bytes // source.element_size())
    yield from zip(target.view(-1).split(count), source.contiguous().view(-1).split(count), strict=True)


@contextlib.contextmanager
def replayed(machine: Machine, state: tuple[Tensor, ...]) -> Iterator[None]:
    """Inside, random numbers are drawn from `state` on; afterwards as if nothing had been drawn."""
    before = machine.random_state()
    machine.set_random_state(state)
    try:
        yield
    finally:
        machine.set_random_state(before)


def machine_of(device: torch.device | str, link: Link | None, chunk_bytes: int, count_bytes: bool) -> Machine:
    """The machine of a device. Raises LabError for one that is not there."""
    device = torch.device(device)
    if device.type == "cpu":
        return CpuMachine(link, chunk_bytes=chunk_bytes, count_bytes=count_bytes)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise LabError(f"There is no device {device} to offload from.", "Use a CUDA device, or device='cpu'.")
    if link is not None:
        raise LabError("A GPU has a link of its own.", "Leave `link` out, or use device='cpu'.")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return CudaMachine(device, chunk_bytes=chunk_bytes)
