"""The longest sequence that trains within so much device memory: with offload, and in two ways without it.

    plain        weights, gradients, optimizer state and all activations on the device
    checkpoint   the same, but of each stage only the input is kept, and its forward is computed again: the fair
                 control, since offload recomputes as well
    offload      OffloadEngine, staleness 0

A length fits if two training steps of it hold no more than the limit; the second has the optimizer's state from its
start. On a CPU the bytes of all tensors on the "device" are counted (live_bytes.py), with offload those of a bad
timing (offload_worst_case.py); on CUDA the allocator's peak is read, and a step that runs out of memory does not fit.
The search believes nothing that it did not run: the answer ran, and
one step of length more ran and did not fit. It does believe that longer sequences need more.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from labkit.errors import LabError
from labkit.pipeline.live_bytes import LiveBytes
from labkit.pipeline.offload import OffloadEngine
from labkit.pipeline.offload_worst_case import WorstCase

METHODS = ("plain", "checkpoint", "offload")
STRAIGHT = 6  # probes that follow a straight line; memory that is far from one is found by halving
Made = tuple[list[nn.Module], Callable[[Tensor, Tensor], Tensor], list[tuple[Tensor, Tensor]]]


class Longest(NamedTuple):
    """tokens: the longest length that fits, 0 where none does; its peak; length -> peak of every probe."""

    tokens: int
    peak_bytes: int
    tried: dict[int, float]


def adamw(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that needs no memory beside its state."""
    return torch.optim.AdamW(weights, fused=True)


def longest_sequence(make_stages: Callable[[int], Made], memory_bytes: float, *, method: str = "offload",
                     device: str | torch.device = "cpu", grain: int = 16, most: int = 1 << 20,
                     optimizer: Callable[[list[nn.Parameter]], Any] = adamw) -> Longest:
    """The longest sequence within the limit, in multiples of `grain`.

    Args:
        make_stages: tokens -> (stages, head_loss, micro_batches) as OffloadEngine takes them.
        most: where to stop looking.
    Raises:
        LabError: an unknown method.
    """
    if method not in METHODS or not 1 <= grain <= most:
        raise LabError(f"There is no search by {method!r} in steps of {grain} up to {most}.",
                       f"Choose among {', '.join(METHODS)}, and 1 <= grain <= most.")
    tried: dict[int, float] = {}
    low, high, guess = 0, most // grain + 1, 1  # in grains: `low` fits, `high` does not
    while high - low > 1:
        tried[guess] = peak_bytes(make_stages(guess * grain), method, torch.device(device), optimizer)
        low, high = (guess, high) if tried[guess] <= memory_bytes else (low, guess)
        guess = next_guess(tried, memory_bytes, low, high)
    return Longest(low * grain, int(tried.get(low, 0)), {length * grain: size for length, size in tried.items()})


def next_guess(tried: dict[int, float], memory_bytes: float, low: int, high: int) -> int:
    """Where a straight line through the two longest probes meets the limit; the middle where it does not help."""
    measured = sorted(length for length, size in tried.items() if size < float("inf"))[-2:]
    if len(measured) < 2:
        return max(low + 1, min(4 * low, (low + high) // 2))
    first, second = measured
    slope = (tried[second] - tried[first]) / (second - first)
    if slope <= 0 or len(tried) > STRAIGHT:
        return (low + high) // 2
    straight = second + int((memory_bytes - tried[second]) // slope)
    return min(max(straight, low + 1), high - 1, max(8 * low, low + 1))


def peak_bytes(made: Made, method: str, device: torch.device, optimizer: Callable) -> float:
    """The most that two training steps hold on the device; infinite where it runs out of memory."""
    run = offloaded if method == "offload" else resident
    if device.type != "cuda":
        return run(made, method, device, optimizer)
    try:
        return run(made, method, device, optimizer)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        torch.cuda.empty_cache()


def offloaded(made: Made, method: str, device: torch.device, optimizer: Callable) -> int:
    """Through the engine."""
    stages, head_loss, micro_batches = made
    place = WorstCase() if device.type == "cpu" else device
    engine = OffloadEngine(stages, head_loss, optimizer=optimizer, device=place)
    for _ in range(2):
        engine.step(micro_batches)
    engine.finish()
    engine.close()
    return engine.report.peak_device_bytes


def resident(made: Made, method: str, device: torch.device, optimizer: Callable) -> int:
    """With everything on the device."""
    live = LiveBytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with live.counting() if device.type == "cpu" else contextlib.nullcontext():
        train_resident(made, method == "checkpoint", device, optimizer)
    return live.peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - before


def train_resident(made: Made, recompute: bool, device: torch.device, optimizer: Callable) -> None:
    """Two steps of ordinary training on copies of the stages."""
    model = nn.Module()
    model.stages, model.head_loss = nn.ModuleList(made[0]), made[1]
    model = copy.deepcopy(model).to(device)  # one copy of both, so that shared weights stay shared
    updates = optimizer([weight for weight in model.parameters() if weight.requires_grad])
    for _ in range(2):
        for pair in made[2]:
            x, target = (tensor.to(device, copy=True) for tensor in pair)
            for stage in model.stages[:-1]:
                x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
            (model.head_loss(model.stages[-1](x), target) / len(made[2])).backward()
        updates.step()
        updates.zero_grad(set_to_none=True)
