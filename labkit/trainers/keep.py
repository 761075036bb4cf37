"""Keep every k-th checkpoint of a run, in memory or on disk: the path that training took through weight space."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from labkit.errors import LabError
from labkit.files import whole_file
from labkit.trainers.checkpoint import read_tensors


class Keep:
    """Give it to a trainer as `after_step`; then `keep.steps` and `keep[i]` are the checkpoints.

    Args:
        every: steps between two checkpoints.
        folder: where to write them, one safetensors file each; without it they stay in memory, on the CPU.
        dtype: torch.bfloat16 halves them; None keeps the model's.
    """

    def __init__(self, every: int = 1, folder: Path | None = None, dtype: torch.dtype | None = None):
        if every < 1:
            raise LabError(f"A checkpoint every {every} steps cannot be kept.", "Use 1 or more.")
        self.every, self.folder, self.dtype = every, folder, dtype
        self.steps: list[int] = []
        self._states: list[dict[str, Tensor] | Path] = []

    def __call__(self, model: nn.Module, step: int) -> None:
        if step % self.every:
            return
        if not self.steps and step > self.every:
            self._find_earlier(step)
        state = {name: weight.detach().to("cpu", self.dtype or weight.dtype, copy=True)
                 for name, weight in model.state_dict().items()}
        path = self._path(step)
        if path is not None:
            with whole_file(path) as temporary:
                save_file(state, temporary)
            state = path
        self.steps.append(step)
        self._states.append(state)

    def _find_earlier(self, step: int) -> None:
        """A run that goes on where it was interrupted: its earlier checkpoints are in the folder, or are lost."""
        steps = list(range(self.every, step, self.every))
        paths = [self._path(earlier) for earlier in steps]
        if not all(path is not None and path.exists() for path in paths):
            raise LabError(f"The run goes on at step {step}, and its checkpoints before that were not kept.",
                           "Keep them in a folder, or start the run anew.")
        self.steps, self._states = steps, paths

    def _path(self, step: int) -> Path | None:
        return None if self.folder is None else Path(self.folder) / f"step-{step:06d}.safetensors"

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        state = self._states[place]
        return read_tensors(state)[0] if isinstance(state, Path) else state

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[place] for place in range(len(self)))
