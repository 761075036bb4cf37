"""The base models of the small worlds: decoders of 17,000 to 118,000 weights that have read a mixture of dialects.

They are what reinforcement learning and distillation begin with: able to solve a world's problems in several ways, and
right in some part of their answers; those of the labs on on-policy distillation, teachers too, stand in
labkit.trainers.sum_bases, that of the lab on self-play in labkit.trainers.hint_bases.
`python data/build_checkpoints.py` makes them anew; the manifest has the accuracy of each on the test side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from labkit.data.corpora import checked_file, read_manifest
from labkit.errors import LabError
from labkit.files import DATA
from labkit.models import GPT
from labkit.tasks import Countdown, DigitList, ListRepair, RunningSum, StrategyAddition, World, WrittenAddition
from labkit.trainers.checkpoint import load_model
from labkit.trainers.hint_bases import HINT_RECIPES
from labkit.trainers.imitate import Lesson
from labkit.trainers.recipes import WorldRecipe, settings
from labkit.trainers.sum_bases import SUM_RECIPES

FOLDER = DATA / "checkpoints"


@dataclass(frozen=True)
class WorldBase:
    """A shipped base, the worlds it knows, and what the manifest says of it."""

    model: GPT
    worlds: dict[str, World]
    facts: dict


def addition() -> WorldRecipe:
    """Three strategies in 20, 50 and 30% of the lessons: right digits in about 0.37 of sampled answers."""
    world = StrategyAddition(2)
    lessons = tuple(Lesson(world, dialect, share)
                    for dialect, share in (("sum", 0.2), ("no_carry", 0.5), ("copy", 0.3)))
    return WorldRecipe(((lessons, settings(900)),), {"addition": world})


def noisy_addition() -> WorldRecipe:
    """The true sum, but 15% of the digits read were random, and training stopped early: noise is all that is wrong."""
    world = StrategyAddition(2, noise=0.15)
    return WorldRecipe((((Lesson(world, "sum"),), settings(340)),), {"addition": world})


def filler_addition() -> WorldRecipe:
    """Eight letters that decide nothing, then the right strategy in 5% of the lessons: a sparse task.

    A first stage has it in half of the lessons, or the model would choose it rarely and do it badly as well.
    """
    world = StrategyAddition(2, filler=8)
    often, rarely = (tuple(Lesson(world, dialect, share) for dialect, share in (("sum", part), ("copy", 1 - part)))
                     for part in (0.5, 0.05))
    stages = (often, settings(600)), (rarely, settings(200, learning_rate=1e-3))
    return WorldRecipe(stages, {"addition": world})


def written_carries() -> WorldRecipe:
    """Twelve tokens of written addition, any of which can be wrong: a dense task."""
    world = WrittenAddition(3, noise=0.06)
    return WorldRecipe((((Lesson(world, "carries"),), settings(1500)),), {"addition": world})


def sort_parity() -> WorldRecipe:
    """Sorting, known well, and parity, half known: what a new task does to an old one."""
    sort, parity = DigitList("sort"), DigitList("parity", same=0.75)
    lessons = (Lesson(sort, "canonical", 160), Lesson(parity, "same", 96))
    return WorldRecipe(((lessons, settings(700)),), {"sort": sort, "parity": parity})


def list_repair() -> WorldRecipe:
    """Four tasks known well, and repairing lists in three ways, one of which is right."""
    old = {rule: DigitList(rule, length=6) for rule in ("sort", "reverse", "shift", "copy")}
    repair = ListRepair(6)
    lessons = [Lesson(world, "canonical", 0.15) for world in old.values()]
    lessons += [Lesson(repair, dialect, share)
                for dialect, share in (("minimal", 0.15), ("rewrite", 0.1), ("copy", 0.15))]
    return WorldRecipe(((tuple(lessons), settings(2000)),), {**old, "repair": repair})


def running_sum() -> WorldRecipe:
    """Sums of four numbers in language A, with slips: a student with something left to learn."""
    world = RunningSum(4, slip=0.2)
    return WorldRecipe((((Lesson(world, "A"),), settings(900)),), {"running sum": world})


def countdown() -> WorldRecipe:
    """Expressions of three numbers that mostly miss the target."""
    world = Countdown(3)
    lessons = tuple(Lesson(world, dialect, share) for dialect, share in (("right", 0.4), ("loose", 0.6)))
    return WorldRecipe(((lessons, settings(1500)),), {"countdown": world})


RECIPES: dict[str, Callable[[], WorldRecipe]] = {
    "addition": addition, "noisy-addition": noisy_addition, "filler-addition": filler_addition,
    "written-carries": written_carries, "sort-parity": sort_parity, "list-repair": list_repair,
    "running-sum": running_sum, "countdown": countdown, **SUM_RECIPES, **HINT_RECIPES}
WORLD_BASES = tuple(RECIPES)


def world_recipe(name: str) -> WorldRecipe:
    """The recipe of a base. Raises LabError for an unknown name."""
    if name not in RECIPES:
        raise LabError(f"There is no base for a world called {name!r}.", f"The bases are: {', '.join(RECIPES)}.")
    return RECIPES[name]()


def load_world_base(name: str, folder: Path = FOLDER, device: torch.device | str = "cpu") -> WorldBase:
    """A shipped base, after checking its sha256. Raises LabError where it is unknown, missing or altered."""
    recipe = world_recipe(name)
    facts = read_manifest(folder).get(name)
    if facts is None:
        raise LabError(f"The base {name} has not been made yet.", f"Make it: python data/build_checkpoints.py {name}")
    return WorldBase(load_model(checked_file(name, folder), device), recipe.worlds, facts)
