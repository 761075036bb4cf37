"""Small verifiable worlds: prompts, solutions in several dialects, and a verifier that tensors cannot fool.

alphabet         one alphabet for all of them; the token of digit d is d
world            World: what each offers; sides by content, so that nothing leaks
addition         StrategyAddition: a strategy token, then the digits it leads to
written_carries  WrittenAddition: a carry and a digit for each column, then the sum; any token can break it
running_sum      RunningSum: sums modulo 7 in three languages, or at once
digit_lists      DigitList: sort, reverse, shift, copy, parity with its many right answers, split
countdown        Countdown: an expression of given numbers that makes a target
repair           ListRepair: one broken item of a progression, and what an answer changed without need
"""

from labkit.tasks.addition import StrategyAddition
from labkit.tasks.countdown import Countdown
from labkit.tasks.digit_lists import DigitList
from labkit.tasks.repair import ListRepair
from labkit.tasks.running_sum import RunningSum
from labkit.tasks.world import World, answer_lengths, answer_mask
from labkit.tasks.written_carries import WrittenAddition

__all__ = ["Countdown", "DigitList", "ListRepair", "RunningSum", "StrategyAddition", "World", "WrittenAddition",
           "answer_lengths", "answer_mask"]
