"""What a kernel has to move and to compute: the numbers that its time is judged by.

    floor time = max((read + written) / copy bandwidth, flops / matmul rate)

`read` and `written` are what the kernel *requests*. The traffic test holds a kernel to 1.02 times that. Where a cache can
serve part of it, the docstring also gives the compulsory bytes: each input once in, each output once out.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes requested and FLOPs of one launch or of several together."""

    read: float
    written: float
    flops: float

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def floor_seconds(self, bandwidth: float, rate: float) -> float:
        """The shortest time at `bandwidth` bytes/s and `rate` FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / rate)

    def bound(self, bandwidth: float, rate: float) -> str:
        """Which of the two it is: "memory" or "compute"."""
        return "memory" if self.bytes / bandwidth >= self.flops / rate else "compute"

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.read + other.read, self.written + other.written, self.flops + other.flops)
