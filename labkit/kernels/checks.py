"""Bad input is refused before a launch, with a sentence. A kernel given a wrong shape reads other people's memory.

Shapes, types and devices are checked always; they cost no wait. The *values* of ids are checked on the CPU only,
since on a GPU that would make the host wait for the device at every call. There a bad id is masked in the kernel and
makes its row NaN, so that it cannot go unnoticed.
"""

import math

import torch
from torch import Tensor

from labkit.errors import LabError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
IDS = (torch.int32, torch.int64)


def check_float(name: str, tensor: Tensor, *, also: tuple[torch.dtype, ...] = (torch.float64,)) -> None:
    """`tensor` holds fp16, bf16 or fp32 (and float64, which only the references take)."""
    if tensor.dtype not in FLOATS + also:
        raise LabError(f"{name} has dtype {_short(tensor.dtype)}, not a floating type.",
                       f"Convert it: {name}.float(), .half() or .bfloat16().")


def check_ids(name: str, ids: Tensor, size: int, *, skip: int | None = None) -> None:
    """Whole numbers in [0, size), or equal to `skip`. Values are looked at on the CPU only."""
    if ids.dtype not in IDS:
        raise LabError(f"{name} has dtype {_short(ids.dtype)}, but ids are whole numbers.", f"Use {name}.long().")
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or not ids.numel():
        return
    wrong = (ids < 0) | (ids >= size)
    if skip is not None:
        wrong &= ids != skip
    if wrong.any():
        example = ids[wrong][0].item()
        allowed = f"0 to {size - 1}" + (f", or {skip} for none" if skip is not None else "")
        raise LabError(f"{name} holds the id {example}, but ids go from {allowed}.",
                       "Check that the ids come from the tokenizer that the model was trained with.")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], means: str) -> None:
    """`tensor` has this shape; None stands for any length. `means` is the shape in letters, like "[N, V]"."""
    if len(shape) != tensor.ndim or any(
            want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)):
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise LabError(f"{name} has shape {list(tensor.shape)}, but {means} here is [{want}].",
                       f"Reshape {name}, or check which tensor was passed.")


def check_devices(**tensors: Tensor | None) -> None:
    """All on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise LabError(f"The tensors are on different devices: {where}.", "Move them to one device with .to(device).")


def check_finite(name: str, value: float) -> None:
    """A setting that is a plain number must be one."""
    if not math.isfinite(value):
        raise LabError(f"{name} is {value}, which is not a finite number.", f"Give {name} a finite value.")


def check_head(hidden_NH: Tensor, weight_VH: Tensor, chunk: int | None) -> None:
    """Hidden states [N, H] and a head [V, H] of one dtype, and a chunk of at least one row."""
    check_shape("hidden_NH", hidden_NH, (None, None), "[N, H]")
    check_shape("weight_VH", weight_VH, (None, hidden_NH.shape[1]), "[V, H]")
    if hidden_NH.dtype != weight_VH.dtype:
        raise LabError(f"hidden_NH is {hidden_NH.dtype} and weight_VH is {weight_VH.dtype}.", "Give both one dtype.")
    if chunk is not None and chunk < 1:
        raise LabError(f"A chunk of {chunk} rows holds nothing.", "Use a chunk of 1 or more.")


def check_temperature(temperature: float) -> None:
    """A finite number of 1e-6 or more: below that, logits divided by it leave fp32."""
    check_finite("temperature", temperature)
    if temperature < 1e-6:
        raise LabError(f"A temperature of {temperature} is not above 0 far enough.",
                       "Use a small one such as 0.01 for nearly greedy probabilities.")


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """A kernel takes fp16, bf16 and fp32; float64 is for references."""
    if tensor.dtype not in FLOATS:
        raise LabError(f"The kernel does not take {name} in {_short(tensor.dtype)}.",
                       'Use fp16, bf16 or fp32, or impl="reference".')


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
