"""Gate (b): every kernel of the course as it is launched in training, on meta tensors, which have a size and no memory.

A case is a launch in bf16 at a real size. To add one, write what launches it:

    k1 = importlib.import_module("labkit.kernels.rms_norm")
    CASES["rms_norm forward"] = Case(lambda: k1.launch_forward(bf16(N, D), bf16(D), 1e-6))

and keep what the compiler makes of it (data/results/compile/<triton version>.json):

    python -m tests.kernels.compile_cases
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.files import write_json
from labkit.kernels.machine_code import SHIPPED, Reading, readings_of

ARCHES = (90, 120)
N, V, S = 8192, 151_936, 8  # tokens, a vocabulary of today, ids a bag


class Case(NamedTuple):
    """A launch, and what its machine code has to show. It may launch several kernels."""

    launch: Callable[[], object]
    memory_bound: bool = True  # a 16-byte load in each kernel
    has_dot: bool = False  # tensor-core instructions in each kernel
    apart: tuple[str, ...] = ()  # kernels that both do not hold for; say why beside the case


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def fp32(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


CASES: dict[str, Case] = {}

k2 = importlib.import_module("labkit.kernels.cross_entropy")
for name, bag in (("cross_entropy", 1), ("cross_entropy bag", S)):
    CASES[f"{name} forward"] = Case(lambda bag=bag: k2.launch_forward(bf16(N, V), ids(N, bag), fp32(N, bag), 1e-4))
    CASES[f"{name} backward"] = Case(lambda bag=bag: k2.launch_backward(
        fp32(N), fp32(N), bf16(N, V), ids(N, bag), fp32(N, bag), fp32(N), 1e-4, bf16(N, V)))


def kept(readings: list[Reading]) -> list[dict]:
    """What of them is kept: all but the seconds, which differ from run to run."""
    return [{name: value for name, value in reading.as_dict().items() if name != "seconds"} for reading in readings]


def main() -> None:
    """Compile all cases and write the whole file."""
    table = {name: {f"sm_{arch}": kept(readings_of(case.launch, arch)) for arch in ARCHES}
             for name, case in sorted(CASES.items())}
    path = SHIPPED / f"{importlib.metadata.version('triton')}.json"
    write_json(path, table)
    print(f"{len(table)} cases written to {path}")


if __name__ == "__main__":
    main()
