"""Checkpoints: one safetensors file with weights, optimizer state, history and the number of the next step.

The file is written beside its place and renamed, so that a kill at any moment leaves the old one or the new one.
safetensors holds plain numbers and no code. A checkpoint remembers which run made it and refuses others.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.files import whole_file
from labkit.models import GPT, GPTConfig


def save_checkpoint(path: Path, model: nn.Module, optimizer, history, identity: str, next_step: int) -> None:
    """Write the whole state of a run. `identity` says which run it is; only the same run may continue from it."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    for table in ("train", "evaluations", "rollouts"):
        tensors |= {f"history.{table}.{key}": as_column(value) for key, value in getattr(history, table).items()}
    metadata = {"next_step": str(next_step), "identity": identity}
    with whole_file(path) as temporary:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, temporary, metadata)


def load_checkpoint(path: Path, model: nn.Module, optimizer, history, identity: str) -> int:
    """Put a saved state into model, optimizer and history; return the number of the next step (0 without a file)."""
    if not Path(path).exists():
        return 0
    tensors, metadata = read_tensors(path)
    if metadata.get("identity") != identity:
        raise LabError(f"The checkpoint {path} belongs to another run: its settings, method, model or text differ.",
                       "Repeat that run exactly, or delete the file to start anew.")
    parts = {prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
             for prefix in ("model.", "optimizer.", "history.")}
    model.load_state_dict(parts["model."])
    for name, parameter in model.named_parameters():
        state = {key.removeprefix(f"{name}."): value for key, value in parts["optimizer."].items()
                 if key.rpartition(".")[0] == name}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    for name, value in parts["history."].items():
        table, column = name.split(".")
        getattr(history, table)[column] = value.tolist()
    return int(metadata["next_step"])


def as_column(values: list[float]) -> Tensor:
    """A column of the history as float64, in which a step number is exact."""
    return torch.tensor(values, dtype=torch.float64)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises LabError where it is damaged or missing."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise LabError(f"The file {path} is missing.",
                       "If it belongs to the course: `git checkout -- data/checkpoints`.") from None
    except (SafetensorError, OSError, ValueError) as error:
        fix = "Delete it to start anew; if it belongs to the course: `git checkout -- data/checkpoints`."
        raise LabError(f"The file {path} is damaged ({error}).", fix) from None


def fingerprint(model: GPT) -> str:
    """Shape and weights of a model as a short text, so that a run knows the models it began with."""
    digest = hashlib.sha256(str(model.config).encode())
    for weight in model.state_dict().values():
        digest.update(weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(path: Path, model: GPT, **notes: str) -> None:
    """Write a model's weights with its shape and notes (how it was made) in the metadata."""
    metadata = {"config": json.dumps(dataclasses.asdict(model.config)), **notes}
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_model(path: Path, device: torch.device | str = "cpu") -> GPT:
    """The model that `save_model` wrote. Raises LabError where the file is damaged, missing or of another shape."""
    tensors, metadata = read_tensors(path)
    if "config" not in metadata:
        raise LabError(f"The file {path} does not say which model it holds.", "Write it with `save_model`.")
    try:
        model = GPT(GPTConfig(**json.loads(metadata["config"])))
        model.load_state_dict({name: value.float() for name, value in tensors.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        raise LabError(f"The weights in {path} do not fit the shape it states ({error}).",
                       "Write it anew with `save_model`.") from None
    return model.to(device)
