"""Recipes of the bases for on-policy distillation: running sums of four or eight numbers modulo 7.

    sum-*     languages A, B and C: a small student, teachers that are right; a mixture of direct answers and A, and
              the same after reinforcement learning
    long-*    sums of eight numbers in A: a teacher, and a student who slips
    wait-*    a corpus with slips that are mostly noticed: a teacher that profits, a student that cannot yet
Sizes and accuracies follow the pilots of labs 09 to 12; what came out stands in data/checkpoints/manifest.json.
"""

import copy
import dataclasses
from collections.abc import Callable

from labkit.models import GPTConfig
from labkit.tasks import RunningSum
from labkit.tasks.alphabet import VOCAB
from labkit.trainers.grpo import GRPOSettings
from labkit.trainers.imitate import Lesson
from labkit.trainers.loop import TrainSettings
from labkit.trainers.recipes import CONFIG, Stage, WorldRecipe, settings

# few steps turn a rope_base of 10,000 in heads so small: neighbours would look alike, and the copying is not found
SMALL = GPTConfig(VOCAB, context=32, width=24, layers=2, heads=2, ffn=80, rope_base=100.0)
LONG = dataclasses.replace(CONFIG, context=48)
# of the shapes tried, the one that found the rule of direct answers in the fewest seconds
BIG = GPTConfig(VOCAB, context=32, width=64, layers=1, heads=4, ffn=512)
FOUR, EIGHT = RunningSum(4), RunningSum(8)
SLIPPING = RunningSum(4, slip=0.24)
WAITING = RunningSum(4, slip=0.15, wait_wrong=0.97, wait_right=0.02, retry_slip=0.4)
CALM = RunningSum(4, wait_wrong=0.03, wait_right=0.03)
MIXED = (Lesson(FOUR, "direct", 0.6), Lesson(FOUR, "A", 0.4))


def sums(*stages: Stage, config: GPTConfig = CONFIG, world: RunningSum = FOUR) -> WorldRecipe:
    """A base of one world of running sums."""
    return WorldRecipe(stages, {"running sum": world}, config)


def small(steps: int, **changes) -> TrainSettings:
    """Settings of the small models."""
    return settings(steps, **{"learning_rate": 6e-3, "batch": 128} | changes)


def cut(world: RunningSum, tokens: int) -> RunningSum:
    """The same world with answers cut at so many tokens: the few with many WAITs would slow every batch."""
    shorter = copy.copy(world)
    shorter.answer_length = tokens
    return shorter


def student() -> WorldRecipe:
    """Language A with slips in 24% of the partial sums: it knows how, and errs in most of its answers."""
    return sums(((Lesson(SLIPPING, "A"),), small(600)), config=SMALL)


def teacher(language: str) -> Callable[[], WorldRecipe]:
    """One language, learned to the end."""
    return lambda: sums(((Lesson(FOUR, language),), settings(900)))


def mixed() -> WorldRecipe:
    """Answers at once in 60%, chains of A in 40%; stopped when it could do the second and hardly the first."""
    return sums((MIXED, small(500)), config=SMALL)


def mixed_rl() -> WorldRecipe:
    """`mixed`, rewarded for right answers until it says nothing but chains."""
    rewarded = FOUR, GRPOSettings(60, 2e-3, prompts=32, samples=8, checkpoint_every=20)
    return dataclasses.replace(mixed(), stages=(*mixed().stages, rewarded))


def mixed_big() -> WorldRecipe:
    """The same mixture for a larger model, which can answer at once as well.

    First direct answers alone, which are short. With this weight decay it first knew its own problems, and some hundred
    steps later those of the test side. (Of two pilots of 300 steps, one seed each and not alike in all else, that with
    a decay of 0.01 was at chance.)
    """
    alone = (Lesson(FOUR, "direct"),), settings(2700, learning_rate=5e-3, weight_decay=1.0)
    return sums(alone, (MIXED, settings(900, weight_decay=0.3)), config=BIG)


def long_teacher() -> WorldRecipe:
    """Eight numbers in A, learned to the end."""
    return sums(((Lesson(EIGHT, "A"),), settings(900)), config=LONG, world=EIGHT)


def long_student() -> WorldRecipe:
    """Eight numbers in A with slips in 12% of the partial sums: errors early and late, and nobody takes them back."""
    return sums(((Lesson(RunningSum(8, slip=0.12), "A"),), settings(1000, learning_rate=5e-3, batch=128)),
                config=dataclasses.replace(SMALL, context=48, width=32, ffn=96), world=EIGHT)


def waiting_teacher() -> WorldRecipe:
    """Wrong sums are noticed and mostly mended: WAIT follows 97% of them, and 2% of the right ones."""
    config = dataclasses.replace(CONFIG, context=80)
    lessons = (Lesson(cut(WAITING, 31), "A"),)
    return sums((lessons, settings(900, learning_rate=5e-3, batch=128)), config=config, world=WAITING)


def waiting_student() -> WorldRecipe:
    """Says WAIT in 3% of the places, for no reason, and stopped before it could add."""
    config = dataclasses.replace(SMALL, context=80)
    return sums(((Lesson(cut(CALM, 21), "A"),), small(130)), config=config, world=WAITING)


SUM_RECIPES: dict[str, Callable[[], WorldRecipe]] = {
    "sum-A-student": student, "sum-A-teacher": teacher("A"), "sum-B-teacher": teacher("B"),
    "sum-C-teacher": teacher("C"), "sum-mixed": mixed, "sum-mixed-rl": mixed_rl,
    "sum-mixed-big": mixed_big, "long-teacher": long_teacher, "long-student": long_student,
    "wait-teacher": waiting_teacher, "wait-student": waiting_student}
