"""The recipe of the base for self-play with hints: it answers with and without hints, and proposes both.

Proposer and solver begin as this one model, as in the paper. What came out stands in data/checkpoints/manifest.json.
"""

from collections.abc import Callable

from labkit.models import GPTConfig
from labkit.tasks import HintProposals, HintWorld
from labkit.tasks.alphabet import VOCAB
from labkit.trainers.imitate import Lesson
from labkit.trainers.recipes import WorldRecipe, settings

# few steps turn a rope_base of 10,000 in heads so small
SELF_PLAYER = GPTConfig(VOCAB, context=32, width=48, layers=2, heads=4, rope_base=100.0)


def hints() -> WorldRecipe:
    """Questions with all kinds of hints and with none in nine rows of ten, proposals in the tenth."""
    world = HintWorld()
    lessons = Lesson(world, "corpus", 0.9), Lesson(HintProposals(world), "corpus", 0.1)
    worlds = {"no hint": HintWorld(kinds=("none",)), "with STRUCT": HintWorld(kinds=("STRUCT",)),
              "proposals": HintProposals(world)}
    return WorldRecipe(((lessons, settings(400, batch=128)),), worlds, SELF_PLAYER)


HINT_RECIPES: dict[str, Callable[[], WorldRecipe]] = {"hints": hints}
