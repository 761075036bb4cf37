"""Triton's interpreter as a measuring instrument: bytes, FLOPs, order of programs, bounds and overflow, without a GPU.

TRITON_INTERPRET=1 makes Triton run a kernel with numpy, program after program. Every load, store and product then
passes through one class, `InterpreterBuilder`. Each instrument here replaces some of its methods for the length of a
`with` block, and puts them back. They can be nested in any order.

    with count_traffic() as traffic:        what the kernels asked of memory
        kernels.cross_entropy(logits_NV, target_N)
    print(traffic.loaded, traffic.distinct_loaded)

What it shows is what a kernel *requests*. A cache may serve a part of that; the distinct bytes remain even with a
perfect one. What it cannot show: time, bf16 arithmetic (the interpreter computes it wrongly), and what the compiler
makes of the kernel.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.language import interpreting, triton


@dataclasses.dataclass
class Traffic:
    """What the kernels in one block asked for. Bytes are those of active elements: a masked-off element costs nothing.

    `distinct_*` counts each address once over the whole block. (Tensors that were freed inside the block may share an
    address with later ones.) An atomic's bytes are counted once, under `atomic`.
    """

    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0
    flops: int = 0  # of tl.dot only: 2 M N K
    programs: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored + self.atomic


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what is loaded, stored and multiplied inside the block. `distinct_*` is ready when the block has ended."""
    traffic = Traffic()
    seen: dict[str, dict[int, list[np.ndarray]]] = {"loaded": {}, "stored": {}}

    def access(kind: str, addresses: np.ndarray, size: int) -> None:
        setattr(traffic, kind, getattr(traffic, kind) + addresses.size * size)
        place = "loaded" if kind == "loaded" else "stored"
        seen[place].setdefault(size, []).append(addresses)

    def dot(original, builder, a, b, *rest, **named):
        traffic.flops += 2 * a.data.size * b.data.shape[-1]  # [.., M, K] x [.., K, N]
        return original(builder, a, b, *rest, **named)

    def program(original, builder, *index):
        traffic.programs += 1
        return original(builder, *index)

    def launch(original, builder, *dims):
        traffic.launches += 1
        return original(builder, *dims)

    with _memory_hooks(access), _wrapped(_builder(), create_dot=dot, set_grid_idx=program, set_grid_dim=launch):
        yield traffic
    traffic.distinct_loaded, traffic.distinct_stored = (_distinct(seen[place]) for place in ("loaded", "stored"))


@contextlib.contextmanager
def program_order(order: str | int) -> Iterator[None]:
    """Run the programs of every launch in another order: "reversed", or a permutation drawn with this seed.

    The interpreter runs programs one after the other, so a program that reads what its predecessor wrote seems right.
    A GPU promises no order. A kernel whose results change with the order has a race.
    """
    if order != "reversed" and not isinstance(order, int):
        raise LabError(f"There is no program order {order!r}.", 'Use "reversed" or a whole number, the seed.')
    places: list[np.ndarray] = []

    def launch(original, builder, *dims):
        count = int(np.prod(dims))
        line = np.arange(count)[::-1] if order == "reversed" else np.random.default_rng(order).permutation(count)
        places[:] = [line]
        return original(builder, *dims)

    def program(original, builder, *index):
        place = places[0][np.ravel_multi_index(index, builder.grid_dim)]
        return original(builder, *(int(i) for i in np.unravel_index(place, builder.grid_dim)))

    with _wrapped(_builder(), set_grid_dim=launch, set_grid_idx=program):
        yield


@contextlib.contextmanager
def overflow_checks() -> Iterator[None]:
    """Raise where int32 arithmetic overflows, as row * stride does from 2^31 elements on; else it wraps in silence.

    Triton builds these checks into every int32 sum and product, but the interpreter evaluates them only in debug mode.
    """
    _builder()
    builder = triton.runtime.interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, debug=True, sanitize_overflow=True)
    try:
        yield
    finally:
        builder.options = before


@contextlib.contextmanager
def guard_bounds(*also: Tensor) -> Iterator[None]:
    """Raise before a kernel touches memory that none of its arguments owns.

    What it may touch is the extent of each tensor it was launched with, from first to last element (so a view of a
    larger buffer gives no right to the rest), and of the tensors in `also`. The interpreter itself would return
    neighbours, or end the process. Elements in the gaps of a strided view are inside its extent.

    Raises:
        AssertionError: when the block ends, with the kernel's name and how far outside it went.
    """
    faults: list[str] = []
    owned: list[tuple[int, int]] = []
    names: list[str] = []

    def launch(original, executor, *args, **named):
        before = owned[:]
        owned[:] = [_extent(tensor) for tensor in (*also, *_tensors((*args, *named.values()))) if tensor.numel()]
        names.append(executor.fn.__name__)
        try:
            return original(executor, *args, **named)
        finally:
            owned[:] = before
            names.pop()

    def access(kind: str, addresses: np.ndarray, size: int) -> None:
        outside = _outside(addresses, size, owned)
        if outside:
            verb = {"loaded": "read", "stored": "wrote", "atomic": "updated"}[kind]
            faults.append(f"{names[-1]} {verb} {outside}")
            raise AssertionError(faults[-1])

    _builder()
    try:
        with _wrapped(triton.runtime.interpreter.GridExecutor, __call__=launch), _memory_hooks(access):
            yield
    except Exception as error:
        if faults:  # Triton has wrapped our exception in its own
            raise AssertionError(faults[0]) from error
        raise


def _outside(addresses: np.ndarray, size: int, owned: list[tuple[int, int]]) -> str:
    """Empty where every address lies in one of the extents; else how far the worst is from the nearest."""
    if not addresses.size:
        return ""
    low, high = int(addresses.min()), int(addresses.max()) + size
    if any(start <= low and high <= stop for start, stop in owned):
        return ""
    inside = np.zeros(addresses.shape, bool)
    for start, stop in owned:
        inside |= (addresses >= np.uint64(start)) & (addresses + np.uint64(size) <= np.uint64(stop))
    if inside.all():
        return ""
    wrong = [int(address) for address in addresses[~inside]]
    far = max(min((max(start - a, a + size - stop) for start, stop in owned), default=0) for a in wrong)
    return f"outside its tensors: {len(wrong)} of {addresses.size} elements, up to {far} bytes away."


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _tensors(args: tuple) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, also inside tuples and tensor descriptors."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif isinstance(arg, Tensor):
            yield arg
        elif isinstance(base := getattr(arg, "base", None), Tensor):
            yield base


@contextlib.contextmanager
def _memory_hooks(access: Callable[[str, np.ndarray, int], None]) -> Iterator[None]:
    """Call access("loaded" | "stored" | "atomic", active addresses, bytes an element) before each access."""

    def load(original, builder, pointers, mask, *rest, **named):
        access("loaded", *_active(pointers, mask))
        return original(builder, pointers, mask, *rest, **named)

    def store(original, builder, pointers, value, mask, *rest, **named):
        access("stored", *_active(pointers, mask))
        return original(builder, pointers, value, mask, *rest, **named)

    def rmw(original, builder, kind, pointers, value, mask, *rest, **named):
        access("atomic", *_active(pointers, mask))
        return original(builder, kind, pointers, value, mask, *rest, **named)

    def cas(original, builder, pointers, *rest, **named):
        access("atomic", *_active(pointers))
        return original(builder, pointers, *rest, **named)

    # a load or store without a mask, and those of tensor descriptors, arrive at the masked ones
    with _wrapped(_builder(), create_masked_load=load, create_masked_store=store, create_atomic_rmw=rmw,
                  create_atomic_cas=cas):
        yield


def _active(pointers: Any, mask: Any = None) -> tuple[np.ndarray, int]:
    """The addresses that the mask lets through, and the bytes of one element."""
    addresses = pointers.data
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    return addresses.ravel(), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _distinct(by_size: dict[int, list[np.ndarray]]) -> int:
    return sum(size * np.unique(np.concatenate(addresses)).size for size, addresses in by_size.items())


def _builder() -> type:
    """The class that all memory accesses of an interpreted kernel go through."""
    if not interpreting():
        raise LabError("Kernels are not interpreted in this process, so there is nothing to measure.",
                       "Set TRITON_INTERPRET=1 before labkit.kernels is imported: in a notebook, restart the kernel.")
    return triton.runtime.interpreter.InterpreterBuilder


@contextlib.contextmanager
def _wrapped(owner: type, **wrappers: Callable) -> Iterator[None]:
    """Replace methods of a class; a wrapper gets the original first, then what the method was called with."""
    originals = {name: getattr(owner, name) for name in wrappers}
    for name, wrapper in wrappers.items():
        setattr(owner, name, lambda *args, _w=wrapper, _o=originals[name], **named: _w(_o, *args, **named))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)
