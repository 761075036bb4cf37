"""What a kernel has to move and to compute: the numbers that its time is judged by.

    floor time = max((read - cached + written) / copy bandwidth, flops / matmul rate)

`read` and `written` are what the kernel *requests*. The traffic test holds a kernel to 1.02 times that. Where a cache
can serve part of it, the docstring also gives the compulsory bytes: each input once in, each output once out.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes requested and FLOPs of one launch or of several together.

    `cached` is the part of `read` that was read shortly before and is small enough for a cache, such as a weight that
    every program loads: it is requested, so the traffic test sees it, but it is no part of the floor.
    """

    read: float
    written: float
    flops: float
    cached: float = 0.0

    @property
    def bytes(self) -> float:
        return self.read + self.written

    @property
    def memory_bytes(self) -> float:
        """What has to pass between memory and chip even with a cache."""
        return self.bytes - self.cached

    def floor_seconds(self, bandwidth: float, rate: float) -> float:
        """The shortest time at `bandwidth` bytes/s and `rate` FLOP/s."""
        return max(self.memory_bytes / bandwidth, self.flops / rate)

    def bound(self, bandwidth: float, rate: float) -> str:
        """Which of the two it is: "memory" or "compute"."""
        return "memory" if self.memory_bytes / bandwidth >= self.flops / rate else "compute"

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(mine + others for mine, others in zip(self, other, strict=True)))
