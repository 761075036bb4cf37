"""How a base of the small worlds is made: stages of training one after the other, from fresh weights.

A stage is lessons with `TrainSettings` (imitation), or a world with `GRPOSettings` (reinforcement learning). A recipe
is data alone; `python data/build_checkpoints.py` carries it out.
"""

from dataclasses import dataclass

from labkit.models import GPTConfig
from labkit.tasks import World
from labkit.tasks.alphabet import VOCAB
from labkit.trainers.grpo import GRPOSettings
from labkit.trainers.imitate import Lesson
from labkit.trainers.loop import TrainSettings

CONFIG = GPTConfig(VOCAB, context=32, width=48, layers=2, heads=4)
Stage = tuple[tuple[Lesson, ...], TrainSettings] | tuple[World, GRPOSettings]


@dataclass(frozen=True)
class WorldRecipe:
    """The stages with their settings, the worlds that the base is measured on, and its shape."""

    stages: tuple[Stage, ...]
    worlds: dict[str, World]
    config: GPTConfig = CONFIG

    @property
    def examples(self) -> int:
        """Solutions read and answers drawn, over all stages."""
        return sum(settings.rounds * settings.prompts * settings.samples if isinstance(settings, GRPOSettings)
                   else settings.steps * settings.batch for _, settings in self.stages)


def settings(steps: int, **changes) -> TrainSettings:
    """What all bases share."""
    shared = {"learning_rate": 3e-3, "batch": 256, "context": CONFIG.context, "warmup": 50, "decay": 0.3,
              "weight_decay": 0.01, "checkpoint_every": 300}
    return TrainSettings(steps, **shared | changes)
