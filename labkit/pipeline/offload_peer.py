"""The authors' own engine beside ours: the package `roundpipe` (LGPL-3.0), on a GPU where it is installed.

    problem = roundpipe_problem()            None, or why it cannot run: no GPU, not installed, or its import's error
    peer = RoundPipePeer(stages, head_loss, optimizer=...)          the same two methods as OffloadEngine

It is looked for with importlib, and imported only after a GPU was seen: on import it lists the GPUs, and fails where
there are none. Its weights are pinned in place, so give it modules of its own. Written against version 0.1.1
(roundpipe.py: forward_backward, step, synchronize; run_config.py).
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import LabError


def roundpipe_problem() -> str | None:
    """Why the package cannot run here, in a sentence; None where it can."""
    if not torch.cuda.is_available():
        return "roundpipe needs a GPU: without one its import fails."
    if importlib.util.find_spec("roundpipe") is None:
        return "roundpipe is not installed: pip install roundpipe"
    try:
        importlib.import_module("roundpipe")
    except Exception as error:  # a foreign package may fail in any way
        return f"roundpipe cannot be imported: {type(error).__name__}: {error}"
    return None


class RoundPipePeer:
    """One model in training by roundpipe; arguments as those of OffloadEngine. Raises LabError where it cannot run."""

    def __init__(self, stages: Sequence[nn.Module], head_loss: Callable[[Tensor, Tensor], Tensor], *,
                 optimizer: Callable[[list[nn.Parameter]], Any], staleness: int = 0):
        problem = roundpipe_problem()
        if problem:
            raise LabError(problem, "Leave this peer out.")
        self.package, self.head_loss, self.staleness = importlib.import_module("roundpipe"), head_loss, staleness
        self.model = self.package.RoundPipe(nn.Sequential(*stages), optim_dtype=torch.float32)
        self.optimizer = optimizer(list(self.model.optim_parameters()))

    def step(self, micro_batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One iteration; returns the mean loss of the micro-batches."""
        count = len(micro_batches)
        settings = self.package.RoundPipeRunConfig(
            num_microbatch=count, split_input=lambda args, named, n: ([(x,) for x, _ in micro_batches], [{}] * n),
            split_label=lambda label, n: [target for _, target in micro_batches])
        loss = self.model.forward_backward(
            input_args=(micro_batches[0][0],), label=micro_batches[0][1], run_config=settings,
            loss_fn=lambda y, target: self.head_loss(y, target) / count)
        self.model.step(self.update, is_async=bool(self.staleness))
        return float(loss)

    def update(self) -> None:
        """The optimizer's step, in the package's thread."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Wait, and write the newest weights into the modules."""
        self.model.synchronize()
