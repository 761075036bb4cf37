"""An agent that reads and edits a repository and runs nothing: one bash command a turn, the output as its observation.

    system, task -> (THOUGHT and one ```bash block -> Observation) x turns -> a row of {role, content} messages

The rules are those of the SWE-ZERO rollouts in the text format of mini-swe-agent 1: the first bash block of an answer
is run; an answer without one gets a sentence that asks for it, and ends the rollout if the model had ended it itself;
an observation keeps 8,000 characters, half its head and half its tail; the rollout is "Submitted" when the first line
of an output is the marker, which is then no observation any more, and "incomplete" after the last turn. So a finished
trace ends with the assistant, and one that used up 15 turns has 32 messages.
Source: marin-community/marin, experiments/swe_zero (scaffold.py, rollout_generator.py); arXiv 2604.01496.
"""

import re
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from labkit.data.trajectories import FINISHED, FORMAT, UNFINISHED
from labkit.errors import LabError
from labkit.progress import bar
from labkit.tasks.repositories import Task
from labkit.tasks.sandbox import Result, Sandbox

MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
REPAIR = "Please always provide EXACTLY ONE action in triple backticks."
BLOCK = re.compile(r"```bash\s*\n(.*?)```", re.DOTALL)

SYSTEM = f"""You are a software engineer who resolves an issue in a repository by writing bash commands.

Every answer is a THOUGHT that says why, and then EXACTLY ONE bash block with ONE command:

THOUGHT: what you want to know or change, and why
```bash
the command
```

RULES
- Write no comments inside the bash block.
- Each command runs in a new subshell at the root of the repository. DO NOT use cd: it does not last.
- You CANNOT run code. DO NOT call python, pip, pytest, node, make, a compiler or any build tool: they are not there.
- You have ls, find, cat, head, tail, grep, sed, awk, diff, patch, cp, mv, rm, mkdir, touch, git and the like.
- Read a file again after you have edited it.
- When the issue is resolved, submit with: echo {MARKER}"""
SHORT_SYSTEM = f"THOUGHT, then one bash block with one command. No cd, no python, no pytest. At the end: echo {MARKER}"


def task_message(task: Task, *, short: bool = False) -> str:
    """The first user message: the issue, and what the agent is told about the repository."""
    if short:
        return f"{task.repo}: {task.issue}"
    return (f"Please resolve this issue in the repository {task.repo}.\n\n## Issue\n\n{task.issue}\n\n## Repository\n\n"
            f"- Language: Python\n- Base commit: {task.base_commit}\n- Every command starts at its root.")


def first_messages(task: Task, *, short: bool = False) -> list[dict[str, str]]:
    """System and task. `short` says the same rules in a line, for models with a context of some hundred tokens."""
    return [{"role": "system", "content": SHORT_SYSTEM if short else SYSTEM},
            {"role": "user", "content": task_message(task, short=short)}]


def parse_command(text: str) -> str | None:
    """The command in the first ```bash block of an answer; None where there is none that is closed."""
    found = BLOCK.search(text)
    return found.group(1).strip() if found else None


def observation(result: Result) -> str:
    """What the agent is told of a result (the sandbox has already cut it)."""
    return (result.output + "\n\n[command timed out]").strip() if result.timed_out else result.output


def is_submission(text: str) -> bool:
    """Whether the first line that is not blank is the marker."""
    lines = text.strip().splitlines()
    return bool(lines) and lines[0].strip() == MARKER


@dataclass(frozen=True)
class Turn:
    """One answer of a policy; `cut` where it ran out of tokens, and did not end by itself."""

    text: str
    cut: bool = False


Answer = Callable[[list[dict[str, str]]], Turn | None]  # messages so far -> the next answer; None: no room for one


class Policy(Protocol):
    """What plays the agent. `begin` starts one rollout; all chance in it comes from the seed."""

    def begin(self, task: Task, seed: int) -> Answer: ...


@dataclass(frozen=True)
class Attempt:
    """One rollout: its row in the exact schema, and what the row does not say."""

    row: dict  # instance_id, repo, messages, trajectory_format, exit_status, duration_sec
    correct: bool  # whether the hidden check passes on the files as they were left, submitted or not
    commands: tuple[str, ...]  # those that were run

    @property
    def submitted(self) -> bool:
        return self.row["exit_status"] == FINISHED


def converse(answer: Answer, sandbox: Sandbox, messages: list[dict[str, str]], turns: int) -> tuple[str, list[str]]:
    """The loop: appends to `messages`; returns the exit status and the commands."""
    commands = []
    for _ in range(turns):
        turn = answer(messages)
        if turn is None:
            break
        messages.append({"role": "assistant", "content": turn.text})
        command = parse_command(turn.text)
        if command is None:
            messages.append({"role": "user", "content": REPAIR})
            if turn.cut:
                continue
            break
        commands.append(command)
        seen = observation(sandbox.run(command))
        if is_submission(seen):
            return FINISHED, commands
        messages.append({"role": "user", "content": f"Observation: {seen}"})
    return UNFINISHED, commands


def attempt(policy: Policy, task: Task, *, seed: int = 0, turns: int = 15, short: bool = False,
            **limits: float) -> Attempt:
    """One rollout on a fresh copy of the task's repository, in a sandbox, and its hidden check.

    Args:
        policy: what answers.
        task: from `make_repository`.
        seed: of the policy's draws.
        turns: the cap (15 in the published set from late April 2026 on, 30 before).
        short: system and task in a line each.
        limits: of the Sandbox (seconds, output_characters, processes, ...).
    Raises:
        LabError: there is no sandbox on this machine.
    """
    if turns < 1:
        raise LabError(f"A rollout of {turns} turns says nothing.", "Allow at least one turn.")
    start, messages = time.monotonic(), first_messages(task, short=short)
    with tempfile.TemporaryDirectory() as folder:
        worktree = task.copy_to(Path(folder) / "repo")
        with Sandbox(worktree, **limits) as sandbox:
            status, commands = converse(policy.begin(task, seed), sandbox, messages, turns)
        correct = task.correct(worktree)
    row = {"instance_id": task.instance_id, "repo": task.repo, "messages": messages, "trajectory_format": FORMAT,
           "exit_status": status, "duration_sec": round(time.monotonic() - start, 3)}
    return Attempt(row, correct, tuple(commands))


def rollout(policy: Policy, task: Task, **settings) -> dict:
    """The row of one `attempt`, whose arguments it takes."""
    return attempt(policy, task, **settings).row


def rollouts(tasks: Iterable[Task], policy: Policy, *, policy_seed: int = 0, workers: int = 2,
             **settings) -> list[Attempt]:
    """One attempt a task, in the order of `tasks`; name a task several times for several attempts.

    The policy's seed of attempt i is (policy_seed, i) in one number, so the result does not depend on `workers`. They
    are threads: each waits for a sandbox, which is a process.
    """
    tasks = list(tasks)

    def one(i: int) -> Attempt:
        return attempt(policy, tasks[i], seed=policy_seed * 1_000_003 + i, **settings)

    with bar(len(tasks), "rollouts", unit="rollout") as progress, ThreadPoolExecutor(max(1, workers)) as pool:
        futures = [pool.submit(one, i) for i in range(len(tasks))]
        results = []
        try:
            for future in futures:
                results.append(future.result())
                progress.update(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results
