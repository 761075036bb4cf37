"""Rollouts: answers that a policy draws for problems of a world, and what the verifier says of them.

Each prompt is computed once and answered `samples` times (a group). What a round draws depends on the weights, the seed
and the number of the round alone, so an interrupted run meets the same problems and the same dice again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.data import generator_for
from labkit.models import GPT, generate
from labkit.tasks import World, answer_mask
from labkit.tasks.alphabet import END

DICE, INK = 3, 4  # streams of their own: World.problems draws from 0, 1 and 2, one for each side


@dataclass
class Rollout:
    """B = N * G answers, the G of one prompt next to each other."""

    prompt_BT: Tensor
    answer_BA: Tensor
    mask_BA: Tensor  # True from the first answer token to the one it stops with; all of a truncated answer
    sampled_logp_BA: Tensor  # under the policy that drew them, in the precision of sampling
    reward_B: Tensor  # 1 where the verifier says so, else 0


@torch.no_grad()
def roll_out(model: GPT, world: World, *, prompts: int, samples: int, seed: int, step: int, split: str = "train",
             temperature: float = 1.0, top_p: float | None = None, stop_also: tuple[int, ...] = ()) -> Rollout:
    """Draw `samples` answers for each of `prompts` problems of one side, on the model's device.

    An answer also ends with a token of `stop_also`, which the verifier reads as END.
    """
    device = model.embedding.weight.device
    prompt_NT = world.problems(prompts, split=split, seed=seed, step=step).to(device)
    drawn = generate(model, prompt_NT, max_new_tokens=world.answer_length, temperature=temperature, top_p=top_p,
                     stop_tokens=(END, *stop_also), generator=generator_for(seed, step, DICE, device=device),
                     samples=samples)
    prompt_BT = prompt_NT.repeat_interleave(samples, 0)
    mask_BA = torch.arange(drawn.tokens_BT.shape[1], device=device) < drawn.length_B[:, None]
    ends_BA = torch.isin(drawn.tokens_BT, torch.tensor(stop_also, dtype=torch.long, device=device))
    reward_B = world.verify(prompt_BT, drawn.tokens_BT.masked_fill(ends_BA, END)).float()
    return Rollout(prompt_BT, drawn.tokens_BT, mask_BA, drawn.logprob_BT, reward_B)


def accuracy(model: GPT, world: World, *, problems: int = 1000, split: str = "test", temperature: float = 1.0,
             seed: int = 0) -> float:
    """Share of right answers, one drawn for each of `problems` problems. Standard error: sqrt(a (1 - a) / problems)."""
    drawn = roll_out(model, world, prompts=problems, samples=1, seed=seed, step=0, split=split, temperature=temperature)
    return float(drawn.reward_B.mean())


def written(world: World, *, prompts: int, seed: int, step: int, samples: int = 1, dialect: str | None = None,
            device: torch.device | str = "cpu") -> Rollout:
    """Solutions that the world writes for the problems that `roll_out` would draw at this seed and step.

    In the world's first dialect unless another is named. Raises LabError for one that it does not speak.
    """
    prompt_BT = world.problems(prompts, seed=seed, step=step).repeat_interleave(samples, 0)
    answer_BA = world.solve(prompt_BT, dialect or world.dialects[0], generator_for(seed, step, INK)).to(device)
    prompt_BT = prompt_BT.to(device)
    reward_B = world.verify(prompt_BT, answer_BA).float()
    return Rollout(prompt_BT, answer_BA, answer_mask(answer_BA), torch.zeros_like(answer_BA, dtype=torch.float32),
                   reward_B)
