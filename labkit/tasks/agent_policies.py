"""Two that play the agent: a script with noise, which makes data, and a small language model, which learns from it.

The script knows the fix. It lists, searches, reads, edits, reads again and submits; the noise makes it a weak model's
kind of teacher: calls of what is not there (python, pytest) and of what does not last (cd), answers without a command,
wrong edits, submissions of nothing, and rollouts that read until their turns are used up.
Source: the miniature plan of the SWE-ZERO lab.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from labkit.data.chats import ChatTokenizer
from labkit.errors import LabError
from labkit.models import GPT, generate
from labkit.tasks.agent import MARKER, Answer, Turn
from labkit.tasks.repositories import Task

THOUGHTS = {
    "list": ("Look at the files.", "First I list the files.", "Which files are there?"),
    "search": ("Where is `{name}`?", "Find `{name}`.", "I search for `{name}`."),
    "read": ("Read {path}.", "Look at {path}.", "I read {path} before the edit."),
    "edit": ("Now the edit.", "I change that line.", "Fix {path}."),
    "check": ("Check the edit.", "Read {path} again.", "Did it change?"),
    "submit": ("It is done.", "The issue is resolved.", "Submit."),
    "blocked": ("Run it.", "Let me test this.", "Try the code."),
    "talk": ("I think the issue is in {path}.", "The fix is clear now."),
}
BLOCKED = ("python -c 'import {module}'", "pytest", "python test_{path}", "cd /repo", "python3 {path}", "pip list")


@dataclass(frozen=True)
class Noise:
    """Probabilities; the first two and `cut` are drawn at every step of the script, the others once a rollout."""

    blocked: float = 0.12  # a call of something that is not there, or of cd, before the step
    skipped: float = 0.08  # listing, reading or checking is left out
    cut: float = 0.02  # an answer that ran out of tokens before its command
    wrong_edit: float = 0.07  # the edit changes something else
    no_edit: float = 0.06  # submits what it found
    talks: float = 0.06  # ends with an answer that holds no command
    wanders: float = 0.1  # reads and searches until the turns are used up


def bash(thought: str, command: str) -> str:
    """An answer in the one form that the rules allow."""
    return f"THOUGHT: {thought}\n```bash\n{command}\n```"


class ScriptedPolicy:
    """The script with its noise. `Noise(**{every field: 0})` is a script that is always right."""

    def __init__(self, noise: Noise | None = None):
        self.noise = noise or Noise()

    def begin(self, task: Task, seed: int) -> Answer:
        """Answers one after another; none of them depends on what was observed."""
        script = self.script(task, random.Random(f"{seed} {task.instance_id}"))
        return lambda messages: next(script, None)

    def script(self, task: Task, rng: random.Random) -> Iterator[Turn]:
        """One rollout's answers."""
        noise, draw = self.noise, rng.random()
        steps = ["list", "search", "read", "edit", "check", "submit"]
        ends = (("no_edit", noise.no_edit), ("talks", noise.talks), ("wanders", noise.wanders))
        end = ""
        for name, chance in ends:
            if 0 <= draw < chance:
                end = name
            draw -= chance
        if end == "no_edit":
            steps = [step for step in steps if step not in ("edit", "check")]
        for step in steps:
            if rng.random() < noise.blocked:
                yield self.turn("blocked", task, rng)
            if rng.random() < noise.cut:
                yield Turn(f"THOUGHT: {self.thought('talk', task, rng)}", cut=True)
            if end == "talks" and step == "check":
                yield Turn(f"THOUGHT: {self.thought('talk', task, rng)}")
                return
            if end == "wanders" and step == "submit":
                while True:
                    yield self.turn(rng.choice(("list", "search", "read", "blocked")), task, rng)
            if step not in ("list", "read", "check") or rng.random() >= noise.skipped:
                yield self.turn(step, task, rng)

    def thought(self, step: str, task: Task, rng: random.Random) -> str:
        """A sentence for a step."""
        return rng.choice(THOUGHTS[step]).format(name=name_in_issue(task), path=task.fix.path)

    def turn(self, step: str, task: Task, rng: random.Random) -> Turn:
        """Thought and command of one step."""
        path, name = task.fix.path, name_in_issue(task)
        commands = {"list": "ls", "search": f"grep -n 'def {name}' *.py", "read": f"cat {path}",
                    "check": f"cat {path}", "submit": f"echo {MARKER}"}
        if step == "edit":
            command = edit_command(task, wrong=rng.random() < self.noise.wrong_edit)
        elif step == "blocked":
            command = rng.choice(BLOCKED).format(path=path, module=path.removesuffix(".py"))
        else:
            command = commands[step]
        return Turn(bash(self.thought(step, task, rng), command))


def name_in_issue(task: Task) -> str:
    """The function's name as it stands in the repository: the first word in backquotes."""
    return task.issue.split("`")[1]


def edit_command(task: Task, *, wrong: bool = False) -> str:
    """The sed command that resolves the issue; a wrong one replaces the line by one that is not right."""
    fix, name = task.fix, name_in_issue(task)
    if fix.right.startswith("def "):
        right = fix.wrong.replace("(", "_(") if wrong else fix.right
        return f"sed -i 's|{fix.wrong}|{right}|' {fix.path}"
    right = "    return 0" if wrong else fix.right
    return f"sed -i '/def {name}(/{{n;s|.*|{right}|}}' {fix.path}"


class ModelPolicy:
    """A language model that plays the agent, one token after another.

    Args:
        model: a GPT of labkit.
        chat: its tokenizer with role headers.
        temperature: 0 takes the likeliest token, 1 samples as the published rollouts did.
        max_new_tokens: of an answer (1,024 in the published recipe).
    An answer that the context has no room for ends the rollout.
    """

    def __init__(self, model: GPT, chat: ChatTokenizer, *, temperature: float = 0.0, max_new_tokens: int = 128):
        if max_new_tokens < 1:
            raise LabError("An answer needs at least one token.", "Set max_new_tokens to 1 or more.")
        self.model, self.chat = model, chat
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def begin(self, task: Task, seed: int) -> Answer:
        """Samples with a generator of this rollout's own."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)

        def answer(messages: list[dict[str, str]]) -> Turn | None:
            prompt_T = torch.tensor(self.chat.prompt(messages), device=device)
            room = min(self.max_new_tokens, self.model.config.context + 1 - len(prompt_T))
            if room < 1:
                return None
            drawn = generate(self.model, prompt_T[None], max_new_tokens=room, temperature=self.temperature,
                             stop_tokens=(self.chat.end,), generator=generator)
            stopped, length = bool(drawn.stopped_B[0]), int(drawn.length_B[0])
            return Turn(self.chat.decode(drawn.tokens_BT[0, : length - stopped].tolist()), cut=not stopped)

        return answer
