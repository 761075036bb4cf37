"""Gate (a) of every op: the kernel in Triton's interpreter, under all guards, against float64 on the same values.

    gate.check(kernels.rms_norm, {"x_ND": x, "weight_D": w}, {"eps": 1e-6}, wrt=["x_ND"], dtype=torch.float16)

runs the op three times (programs in natural, reversed and mixed order; equal bits demanded) with
- inputs that lie in the middle of buffers full of NaN, and must come out of it unchanged,
- outputs that start as NaN of a pattern that no arithmetic makes, between guard bytes that must survive,
- bounds of every load and store, and overflow of every int32 sum and product, checked;
then compares outputs and gradients with those of the reference in float64.
"""

import contextlib
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.errors import LabError
from labkit.kernels.cost import Cost
from labkit.kernels.interpreter import Traffic, count_traffic, guard_bounds, overflow_checks, program_order

PAD = 64  # guard elements on each side: a multiple of 16 bytes for every dtype, so alignment stays
LARGEST = 2**30  # bytes: the surroundings of a larger view are not copied, only checked by guard_bounds
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# (norm of the error over norm of the result, worst element over its size). fp32: 2e-6 is 30 roundings of 6e-8, and one
# element may be ten times worse than the norm. fp16: the rounding of the output alone is 2.8e-4 in the norm and 4.9e-4
# in an element; the rest is for gradients so small that fp16's absolute step of 6e-8 shows. bf16 is for GPUs.
TOLERANCES = {torch.float32: (2e-6, 2e-5), torch.float16: (1e-3, 1e-2), torch.bfloat16: (4e-3, 4e-2)}


# ---- inputs


def guarded(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Same values, shape and strides, in the middle of a buffer of NaN (integers: of an id far out of any range).

    Floats are converted to `dtype`. Gaps between the elements of a strided view are filled too.
    """
    dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
    length = _extent(tensor)
    if length * tensor.element_size() > LARGEST:
        return tensor.detach()
    buffer = torch.full((length + 2 * PAD,), _guard_value(dtype), dtype=dtype)
    view = _view(buffer, PAD, tensor.shape, tensor.stride())
    if tensor.numel():
        once = tuple(slice(None if stride else 1) for stride in tensor.stride())  # an expanded value is written once
        view[once] = tensor.detach()[once].to(dtype)
    return view


def _guard_value(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 2


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last, gaps included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _view(buffer: Tensor, offset: int, shape: Iterable[int], stride: Iterable[int]) -> Tensor:
    """A tensor in this storage that autograd does not take for a view."""
    empty = torch.tensor([], dtype=buffer.dtype)
    return empty.set_(buffer.untyped_storage(), offset, torch.Size(shape), tuple(stride))


def _storage_bits(tensor: Tensor) -> Tensor:
    """Everything in the storage, also around the tensor, as bytes."""
    storage = tensor.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def huge_rows(rows: int, columns: int, dtype: torch.dtype, row_stride: int) -> Tensor:
    """[rows, columns] of zeros whose row stride takes the last row past 2^31 elements, at the cost of the rows alone.

    The memory between the rows is reserved but never touched, so it takes none. An op that copies its input to make it
    contiguous does not touch it either.
    """
    assert (rows - 1) * row_stride + columns > 2**31, "not past 2^31 elements: the test would prove nothing"
    size = ((rows - 1) * row_stride + columns) * dtype.itemsize
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has no name for it; torch.empty would ask for all
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (row_stride, 1))


# ---- outputs


@contextlib.contextmanager
def poisoned(variant: int = 0) -> Iterator[None]:
    """Every torch.empty, empty_like, empty_strided and new_empty inside is filled with a pattern, between guards.

    The guards are verified at the end. The functions themselves are replaced: a torch dispatch mode does not see what
    the body of a custom_op allocates. `variant` (0 to 15) changes the pattern, so that outputs that were not written
    differ between runs.
    """
    buffers: list[tuple[Tensor, Tensor]] = []

    def poison(allocate: Callable) -> Callable:
        def allocate_poisoned(*args: Any, **named: Any) -> Tensor:
            plain = allocate(*args, **named)
            if type(plain) is not Tensor or plain.device.type != "cpu" or not plain.numel():
                return plain
            buffer = torch.full((_extent(plain) + 2 * PAD,), _pattern(plain.dtype, variant), dtype=_bits(plain.dtype))
            buffer = buffer.view(plain.dtype)
            view = _view(buffer, PAD, plain.shape, plain.stride())
            buffers.append((buffer, view))
            return view.requires_grad_(plain.requires_grad)

        return allocate_poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")),
                             (Tensor, ("new_empty", "new_empty_strided"))):
            for name in names:
                patch.setattr(owner, name, poison(getattr(owner, name)))
        yield
    for buffer, view in buffers:
        pattern = _pattern(view.dtype, variant)
        outside = torch.cat([buffer[:PAD], buffer[-PAD:]]).view(_bits(view.dtype))
        written = int((outside != pattern).sum())
        assert not written, f"{written} elements just outside an output of shape {list(view.shape)} were written"


def assert_written(tensor: Tensor, what: str = "the output") -> None:
    """No element still holds the poison. (Types of one byte have no pattern to spare; `run` compares them by runs.)"""
    if tensor.element_size() == 1 or not tensor.numel():
        return
    left = tensor.detach().contiguous().view(_bits(tensor.dtype)) & ~15 == _pattern(tensor.dtype, 0)
    assert not left.any(), (f"{int(left.sum())} of {tensor.numel()} elements of {what} were never written, or computed "
                            f"from memory that never was; the first at {left.nonzero()[0].tolist()}")


def _bits(dtype: torch.dtype) -> torch.dtype:
    return BITS[dtype.itemsize]


def _pattern(dtype: torch.dtype, variant: int) -> int:
    """Bits of a NaN with an odd payload; for integers, of a large number."""
    if dtype == torch.bool:
        return variant % 2
    floats = {torch.float16: 0x7E50, torch.bfloat16: 0x7FD0, torch.float32: 0x7FD5AA50,
              torch.float64: 0x7FF8DEADBEEF5A50}
    return floats.get(dtype, {1: 0x50, 2: 0x5A50, 4: 0x5AD5AA50, 8: 0x5AD5AA505AD5AA50}[dtype.itemsize]) + variant


@contextlib.contextmanager
def largest_allocation() -> Iterator[Callable[[], int]]:
    """Bytes of the largest piece of memory that torch allocates on the CPU inside, also within a custom_op."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True,
                                acc_events=True) as profile:
        yield lambda: max(event.nbytes() for event in profile.profiler.kineto_results.events()  # events() sums by op
                          if event.name() == "[memory]")


# ---- closeness


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype | None = None, what: str = "", *, factor: float = 1.0,
          scale: float | None = None) -> None:
    """`ours` is `exact` up to the rounding of `dtype` (default: that of `ours`), with inf and NaN in the same places.

    Three conditions: norm of the error <= norm bound x norm of the result; each element's error <= element bound x
    max(its size, RMS of the result); equal places of NaN, inf and -inf. `factor` widens both bounds; say why where it
    is used. A result that cancels to zero has no size of its own: `scale` is then the RMS to judge it by.
    """
    assert ours.shape == exact.shape, f"{what}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    a, b = ours.detach().double(), exact.detach().double()
    if not a.numel():
        return
    for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(a) != test(b)
        assert not differ.any(), (f"{what}: {name} in other places: {int(test(a).sum())} of ours, {int(test(b).sum())} "
                                  f"expected; first difference at {differ.nonzero()[0].tolist()}")
    a, b = (torch.where(b.isfinite(), x, 0.0) for x in (a, b))
    norm_bound, element_bound = (factor * bound for bound in TOLERANCES[dtype or ours.dtype])
    error, rms = (a - b).abs(), scale or float(b.square().mean().sqrt())
    norm = _ratio(float(error.square().mean().sqrt()), rms)
    size = b.abs().clamp(min=rms)
    worst = float(torch.where(error > 0, error / size, 0.0).max())
    assert norm <= norm_bound and worst <= element_bound, (
        f"{what}: error {norm:.2e} in the norm (bound {norm_bound:.1e}), {worst:.2e} in the worst element (bound "
        f"{element_bound:.1e}), RMS of the exact result {rms:.3e}; worst at "
        f"{[int(i) for i in np.unravel_index(int((error / size).nan_to_num(0).argmax()), tuple(b.shape))]}")


def _ratio(error: float, size: float) -> float:
    return error / size if size else (float("inf") if error else 0.0)


# ---- running an op


def run(op: Callable, tensors: dict[str, Tensor | None], settings: dict[str, Any] | None = None,
        wrt: Iterable[str] = (), seed: int = 0, *, dtype: torch.dtype | None = None, repeatable: bool = True,
        overwrites: Iterable[str] = (), upstream: list[Tensor | None] | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of op(**tensors, **settings) under all guards: {"out0": ..., "grad_logits_NV": ...}.

    Args:
        wrt: names of the tensors to differentiate.
        dtype: floating inputs are converted to it.
        repeatable: equal bits demanded in three orders of the programs; False where an op promises closeness only.
        overwrites: inputs that the op may write to.
        upstream: gradients that arrive at the differentiable outputs, in order; default drawn with `seed`.
    """
    runs = [_once(op, tensors, settings or {}, list(wrt), seed, dtype, set(overwrites), upstream, order, variant)
            for variant, order in enumerate((None, "reversed", 1))]
    for order, other in zip(("reversed", "mixed"), runs[1:], strict=True):
        for name, first in runs[0].items():
            if repeatable or not first.is_floating_point():
                same = torch.equal(*(x.contiguous().view(_bits(x.dtype)) for x in (first, other[name])))
                assert same, f"{name} changes when the programs run in {order} order, or part of it was never written"
            else:
                close(other[name], first, what=f"{name} in {order} order")
    return runs[0]


def _once(op, tensors, settings, wrt, seed, dtype, overwrites, upstream, order, variant) -> dict[str, Tensor]:
    inputs = {name: None if tensor is None else guarded(tensor, dtype) for name, tensor in tensors.items()}
    before = {name: _storage_bits(tensor).clone() for name, tensor in inputs.items()
              if tensor is not None and name not in overwrites and tensor.untyped_storage().nbytes() < LARGEST}
    for name in wrt:
        inputs[name].requires_grad_()
    with contextlib.ExitStack() as guards:
        if order is not None:
            guards.enter_context(program_order(order))
        for guard in (np.errstate(all="ignore"), poisoned(variant), guard_bounds(), overflow_checks()):
            guards.enter_context(guard)
        results = _differentiate(op, inputs, settings, wrt, upstream, seed, guarded)
    for name, bits in before.items():
        assert torch.equal(_storage_bits(inputs[name]), bits), f"the op wrote to its input {name}, or right beside it"
    for name, result in results.items():
        assert_written(result, name)
    return {name: result.detach().clone() for name, result in results.items()}


def _differentiate(op, inputs, settings, wrt, upstream, seed, prepare) -> dict[str, Tensor]:
    """Outputs, and gradients of `wrt` for the upstream gradients; a gradient that autograd omits is zero."""
    outputs = op(**inputs, **settings)
    outputs = [outputs] if isinstance(outputs, Tensor) else [out for out in outputs if isinstance(out, Tensor)]
    results = {f"out{place}": out for place, out in enumerate(outputs)}
    if wrt:
        open_ended = [out for out in outputs if out.requires_grad]
        arriving = upstream or upstream_for(open_ended, seed)
        arriving = [prepare(gradient.to(out.dtype)) for gradient, out in zip(arriving, open_ended, strict=True)]
        gradients = torch.autograd.grad(open_ended, [inputs[name] for name in wrt], arriving, allow_unused=True)
        for name, gradient in zip(wrt, gradients, strict=True):
            results[f"grad_{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return results


def upstream_for(outputs: list[Tensor], seed: int) -> list[Tensor]:
    """Normal numbers that fp16 can hold, so that runs of the same seed in any dtype get the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator).half().to(out.dtype) for out in outputs]


def check(op: Callable, tensors: dict[str, Tensor | None], settings: dict[str, Any] | None = None,
          wrt: Iterable[str] = (), *, dtype: torch.dtype | None = None, exact: Callable | None = None, seed: int = 0,
          factor: float | dict[str, float] = 1.0, scale: dict[str, float] | None = None, repeatable: bool = True,
          overwrites: Iterable[str] = (), upstream: list[Tensor | None] | None = None) -> dict[str, Tensor]:
    """`run`, and every output and gradient close to `exact` in float64 on the same (rounded) values.

    `exact` is called like the op; the default is the op itself with impl="reference". Each result is judged by its own
    dtype: an fp32 loss of fp16 logits has to be right in fp32. `factor` and `scale`: see `close`; by name, or for all.
    """
    settings = settings or {}
    ours = run(op, tensors, settings, wrt, seed, dtype=dtype, repeatable=repeatable, overwrites=overwrites,
               upstream=upstream)
    same = {name: _double(tensor, dtype, name in wrt) for name, tensor in tensors.items()}
    reference = settings if exact else {**settings, "impl": "reference"}
    expected = _differentiate(exact or op, same, reference, list(wrt), upstream, seed, lambda gradient: gradient)
    assert list(ours) == list(expected), f"the kernel returns {list(ours)}, the reference {list(expected)}"
    for name, result in ours.items():
        if result.is_floating_point():
            wide = factor.get(name, 1.0) if isinstance(factor, dict) else factor
            close(result, expected[name], what=name, factor=wide, scale=(scale or {}).get(name))
        else:
            assert torch.equal(result, expected[name].to(result.dtype)), f"{name} differs from the reference"
    return ours


def _double(tensor: Tensor | None, dtype: torch.dtype | None, differentiate: bool) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype).double().requires_grad_(differentiate)


def check_traffic(call: Callable[[], Any], cost: Cost, slack: float = 1.02, at_least: float = 0.9) -> Traffic:
    """What the kernels in `call` request is what the printed formula says: loads and stores each, to within `slack`.

    An atomic counts as a store. `at_least` keeps the formula honest from the other side; lower it where a kernel skips
    work that the formula counts.
    """
    with np.errstate(all="ignore"), count_traffic() as traffic:
        call()
    stored, distinct = traffic.stored + traffic.atomic, traffic.distinct_stored
    for kind, requested, once, formula in (("loads", traffic.loaded, traffic.distinct_loaded, cost.read),
                                           ("stores", stored, distinct, cost.written)):
        assert at_least * formula <= requested <= slack * formula, (
            f"{kind}: {requested:,} bytes requested, {once:,} distinct, formula {formula:,.0f} "
            f"(ratio {_ratio(requested, formula):.3f}, allowed {at_least} to {slack})")
    return traffic


def expect_error(match: str, call: Callable[[], Any]) -> None:
    """`call` raises a LabError that contains `match` as it stands."""
    with pytest.raises(LabError, match=re.escape(match)):
        call()
