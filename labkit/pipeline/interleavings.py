"""Every interleaving of agents that share buffers, by breadth-first search: what it doesn't find doesn't happen.

An agent runs its list of actions in order. An action has a beginning and an end, so two of them can overlap; it begins
when all that it waits for has ended. A state is (positions, memory): position 2 i stands before action i of an agent,
2 i + 1 inside it. An invariant is looked at when an action begins; where it breaks, the path ends there, and the first
path found to a breach is a shortest. Every model has two invariants of the search itself: "whole", nobody reads or
writes what another is writing, and "progress", before all is done something can go on. The method is explicit-state
model checking, as in TLC or SPIN, small enough to be read.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

State = tuple[tuple[int, ...], Hashable]
Sentence = tuple[str, str]  # the invariant that breaks, and how


class Model(Protocol):
    """What the search asks of a model."""

    @property
    def lists(self) -> dict[str, list[Hashable]]: ...  # agent -> its actions

    def start(self) -> Hashable: ...  # the memory at first

    def waits(self, action: Hashable) -> list[Hashable]: ...  # what must have ended before

    def touches(self, action: Hashable) -> tuple[set, set]: ...  # buffers read, buffers written

    def breach(self, action: Hashable, memory: Hashable) -> Sentence | None: ...  # at the beginning

    def after(self, action: Hashable, memory: Hashable) -> Hashable: ...  # the memory at the end

    def measure(self, action: Hashable, memory: Hashable) -> set: ...  # what to collect at the end


@dataclass(frozen=True)
class Report:
    """What the search found."""

    states: int
    broken: dict[str, tuple[str, ...]]  # invariant -> a shortest path to its breach, which stands last
    measured: frozenset  # all that `measure` gave, on paths where nothing broke
    finished: bool  # the state in which all is done was reached


class Search:
    """One search; `run` it once."""

    def __init__(self, model: Model):
        self.model, self.lists = model, list(model.lists.values())
        place = {action: (agent, 2 * i + 2) for agent, actions in enumerate(self.lists)
                 for i, action in enumerate(actions)}
        self.waits = {action: [place[need] for need in model.waits(action)] for action in place}
        self.touches = {action: model.touches(action) for action in place}
        self.broken: dict[str, tuple[str, ...]] = {}
        self.measured: set = set()

    def run(self) -> Report:
        """Visit all states that can be reached."""
        start = (0,) * len(self.lists), self.model.start()
        self.before: dict[State, tuple[State, str] | None] = {start: None}
        queue, finished = deque([start]), False
        while queue:
            state = queue.popleft()
            finished |= not self.unfinished(state[0])
            for label, following in self.moves(state):
                if following not in self.before:
                    self.before[following] = state, label
                    queue.append(following)
        return Report(len(self.before), self.broken, frozenset(self.measured), finished)

    def unfinished(self, positions: tuple[int, ...]) -> list[int]:
        """Agents with something left to do."""
        return [agent for agent, at in enumerate(positions) if at < 2 * len(self.lists[agent])]

    def moves(self, state: State) -> list[tuple[str, State]]:
        """The states one event away, with its name."""
        positions = state[0]
        able = [agent for agent in self.unfinished(positions) if self.may_go(agent, positions)]
        if not able and self.unfinished(positions):
            self.note("progress", "nothing can go on", state)
        return [move for agent in able if (move := self.move(agent, state))]

    def may_go(self, agent: int, positions: tuple[int, ...]) -> bool:
        """Whether all has ended that the agent's action waits for; of one that has begun that stays true."""
        action = self.lists[agent][positions[agent] // 2]
        return all(positions[other] >= needed for other, needed in self.waits[action])

    def move(self, agent: int, state: State) -> tuple[str, State] | None:
        """The agent's next event: a beginning, unless it breaks an invariant, or an end."""
        positions, memory = state
        action = self.lists[agent][positions[agent] // 2]
        ahead = (*positions[:agent], positions[agent] + 1, *positions[agent + 1:])
        if positions[agent] % 2:
            self.measured |= self.model.measure(action, memory)
            return f"{action} ends", (ahead, self.model.after(action, memory))
        breach = self.race(action, positions) or self.model.breach(action, memory)
        if breach:
            self.note(breach[0], f"{action} {breach[1]}", state)
            return None
        return f"{action} begins", (ahead, memory)

    def race(self, action: Hashable, positions: tuple[int, ...]) -> Sentence | None:
        """Whether an action would touch what another one in flight writes, or write what that one reads."""
        reads, writes = self.touches[action]
        for at, actions in zip(positions, self.lists, strict=True):
            if at % 2:
                other_reads, other_writes = self.touches[actions[at // 2]]
                if (reads | writes) & other_writes or writes & other_reads:
                    return "whole", f"begins inside {actions[at // 2]}"
        return None

    def note(self, invariant: str, sentence: str, state: State) -> None:
        """Keep the first breach of each invariant with the path that leads to it."""
        if invariant in self.broken:
            return
        path = [sentence]
        while self.before[state]:
            state, label = self.before[state]
            path.append(label)
        self.broken[invariant] = tuple(path[::-1])
