"""Small verifiable worlds: prompts, solutions in several dialects, and a verifier that tensors cannot fool.

alphabet         one alphabet for all of them; the token of digit d is d
world            World: what each offers; sides by content, so that nothing leaks
addition         StrategyAddition: a strategy token, then the digits it leads to
written_carries  WrittenAddition: a carry and a digit for each column, then the sum; any token can break it
running_sum      RunningSum: sums modulo 7 in three languages, or at once
digit_lists      DigitList: sort, reverse, shift, copy, parity with its many right answers, split
countdown        Countdown: an expression of given numbers that makes a target
repair           ListRepair: one broken item of a progression, and what an answer changed without need
hints            HintWorld: questions with hints that help, do nothing, or ruin; hints_proposed: who writes them
sandbox          Sandbox: hostile shell commands on a copy of a worktree; sandbox_problem: why there is none here
repositories     small git repositories with one fault each, issues, and a check that runs none of their code
agent            rollouts: one bash command a turn, by the rules of SWE-ZERO; agent_policies: a script, and a model
"""

from labkit.tasks.addition import StrategyAddition
from labkit.tasks.agent import Attempt, attempt, rollout, rollouts
from labkit.tasks.agent_policies import ModelPolicy, Noise, ScriptedPolicy
from labkit.tasks.countdown import Countdown
from labkit.tasks.digit_lists import DigitList
from labkit.tasks.hints import HintWorld
from labkit.tasks.hints_proposed import HintProposals
from labkit.tasks.repair import ListRepair
from labkit.tasks.repositories import Task, make_repository, make_tasks, split_repositories
from labkit.tasks.running_sum import RunningSum
from labkit.tasks.sandbox import Result, Sandbox, sandbox_problem, shorten
from labkit.tasks.world import World, answer_lengths, answer_mask
from labkit.tasks.written_carries import WrittenAddition

__all__ = ["Attempt", "Countdown", "DigitList", "HintProposals", "HintWorld", "ListRepair", "ModelPolicy", "Noise",
           "Result", "RunningSum", "Sandbox", "ScriptedPolicy", "StrategyAddition", "Task", "World", "WrittenAddition",
           "answer_lengths", "answer_mask", "attempt", "make_repository", "make_tasks", "rollout", "rollouts",
           "sandbox_problem", "shorten", "split_repositories"]
