"""A decoder as stages for the offload engine: the embedding is in the first of them, norm and head are in the last.

    stages = gpt_stages(model, [3, 3, 2])            blocks of each stage
    engine = OffloadEngine(stages, next_token_loss, ...)

The stages share the model's modules: training them trains the model. A tied head shares the embedding's matrix with the
first stage.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import Tensor, nn

from labkit.errors import LabError
from labkit.models import GPT


class GPTStage(nn.Module):
    """Blocks start ... end - 1; token ids in where it is the first stage, logits out where it is the last."""

    def __init__(self, model: GPT, start: int, end: int):
        super().__init__()
        self.blocks, self.attention = model.blocks[start:end], model.attention
        self.embedding = model.embedding if start == 0 else None
        self.norm = model.norm if end == len(model.blocks) else None
        if self.norm is not None:
            self.head = nn.Linear(model.config.width, model.config.vocab_size, bias=False, device="meta")
            self.head.weight = model.head_weight
        for name in ("cos_TK", "sin_TK"):
            self.register_buffer(name, getattr(model, name).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x_BTD = x if self.embedding is None else self.embedding(x)
        rope = self.cos_TK[: x_BTD.shape[1]], self.sin_TK[: x_BTD.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, self.attention, None, None)
        return x_BTD if self.norm is None else self.head(self.norm(x_BTD))


def gpt_stages(model: GPT, sizes: Sequence[int]) -> list[GPTStage]:
    """The model cut into stages of so many blocks.

    Raises LabError where the sizes don't add up to the model's blocks, or attention differs from block to block.
    """
    if sum(sizes) != len(model.blocks) or not len(sizes) or min(sizes) < 1:
        raise LabError(f"Stages of {list(sizes)} blocks don't make a model of {len(model.blocks)}.",
                       "Give sizes of 1 or more that add up to its blocks.")
    if not callable(model.attention):
        raise LabError("Stages share one attention function.", "Set model.attention to a single function.")
    return [GPTStage(model, start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
