"""RoundPipe's event protocol over every interleaving: five orderings suffice, each is needed, weights are one late.

The search is judged first, by random walks of an own few lines that must stay inside the states it visits and by
programs whose breaches are known; then the protocol, by the search.
"""

import math
import random

import pytest
from pipeline_faults import plant

from labkit.errors import LabError
from labkit.pipeline import INVARIANTS, ORDERINGS, check_protocol
from labkit.pipeline.interleavings import Search
from labkit.pipeline.staleness import Action, Protocol

SIZES = [(1, 1), (1, 4), (2, 2), (2, 3), (3, 3)]  # layers, iterations

# What breaks first, without each ordering: the invariants that some interleaving violates.
BROKEN = {
    "uploaded": {"version", "whole"},
    "renewed": {"version", "whole"},
    "downloaded": {"gradient", "whole"},
    "collected": {"gradient", "whole"},
    "between": {"gradient", "update", "whole"},
}


# ---- the search itself


class Counters:
    """Two agents that each add 1 to a shared number `times` times, by reading and writing in one action."""

    def __init__(self, times, shared=True, wait=None):
        self.times, self.shared, self.wait = times, shared, wait
        self.lists = {agent: [(agent, i) for i in range(times)] for agent in "ab"}

    def start(self):
        return 0

    def waits(self, action):
        return self.wait(action) if self.wait else []

    def touches(self, action):
        place = {"x" if self.shared else action[0]}
        return place, place

    def breach(self, action, memory):
        return ("small", "finds too much") if memory >= 3 else None

    def after(self, action, memory):
        return memory + 1

    def measure(self, action, memory):
        return {memory}


def apart():
    """Two agents that share nothing, n actions each: (2 n + 1)^2 states, all reached, none broken."""
    report = Search(Counters(1, shared=False)).run()
    assert (report.states, report.broken, report.finished, report.measured) == (9, {}, True, {0, 1})
    crowded = Search(Counters(2, shared=False)).run()
    assert set(crowded.broken) == {"small"} and crowded.finished
    assert len(crowded.broken["small"]) == 7  # three actions that begin and end, then the fourth


def shared():
    """What begins inside another's action on the same buffer is a breach, and the shortest path to it has two lines."""
    report = Search(Counters(1)).run()
    assert set(report.broken) == {"whole"} and report.finished
    assert report.broken["whole"] in {(f"('{first}', 0) begins", f"('{second}', 0) begins inside ('{first}', 0)")
                                      for first, second in ("ab", "ba")}


def stuck():
    """Each waits for the other: nothing can go on, and the path to that is empty."""
    report = Search(Counters(1, wait=lambda action: [("b" if action[0] == "a" else "a", 0)])).run()
    assert report.broken == {"progress": ("nothing can go on",)} and not report.finished and report.states == 1
    turns = Search(Counters(1, wait=lambda action: [("a", 0)] if action[0] == "b" else [])).run()
    assert (turns.states, turns.broken, turns.finished) == (5, {}, True)


def test_the_search_finds_what_is_known():
    apart()
    shared()
    stuck()


def walk(search, generator):
    """The states of one random interleaving."""
    positions, memory = (0,) * len(search.lists), search.model.start()
    states = [(positions, memory)]
    while True:
        able = []
        for agent, at in enumerate(positions):
            if at < 2 * len(search.lists[agent]):
                action = search.lists[agent][at // 2]
                ended = {each for other, actions in enumerate(search.lists)
                         for i, each in enumerate(actions) if positions[other] >= 2 * i + 2}
                if at % 2 or set(search.model.waits(action)) <= ended:
                    able.append((agent, action))
        if not able:
            return states
        agent, action = generator.choice(able)
        memory = search.model.after(action, memory) if positions[agent] % 2 else memory
        positions = tuple(at + (other == agent) for other, at in enumerate(positions))
        states.append((positions, memory))


def covered(staleness=1):
    """100 random interleavings of the protocol, run by other code, visit no state that the search has not."""
    search, generator = Search(Protocol(2, 3, staleness=staleness)), random.Random(0)
    report, visited = search.run(), set()
    for _ in range(100):
        states = walk(search, generator)
        assert all(at == 2 * len(actions) for at, actions in zip(states[-1][0], search.lists, strict=True))
        visited |= set(states)
    assert visited <= set(search.before) and len(visited) > report.states / 2


@pytest.mark.parametrize("staleness", [0, 1])
def test_random_interleavings_stay_inside_the_search(staleness):
    covered(staleness)


# ---- the protocol


def holds():
    """No invariant breaks, all can be done, and each gradient is late by exactly one update (or by none)."""
    for staleness in (0, 1):
        for layers, iterations in SIZES:
            report = check_protocol(layers, iterations, staleness=staleness)
            assert report.broken == {} and report.finished
            assert report.measured == ({staleness} if iterations > staleness else set())


def test_five_orderings_suffice():
    holds()


def assert_needed(removed):
    report = check_protocol(2, 3, removed={removed})
    assert set(report.broken) == BROKEN[removed] <= set(INVARIANTS)


@pytest.mark.parametrize("removed", ORDERINGS)
def test_each_ordering_is_needed(removed):
    """Without it the invariants of BROKEN break, and no others. So none follows from the other four."""
    assert_needed(removed)
    assert "progress" not in check_protocol(1, 3, removed={removed}).broken


def test_synchronous_updates_need_only_three():
    """With staleness 0 the step itself waits for all uploads and downloads: two orderings follow from the others."""
    broken = {removed: set(check_protocol(2, 3, removed={removed}, staleness=0).broken) for removed in ORDERINGS}
    assert {removed for removed, found in broken.items() if not found} == {"uploaded", "collected"}
    assert broken["renewed"] == {"version", "whole"}


def paths():
    """The shortest path without "renewed": both forwards of iterations 0 and 1 begin and end, then comes the breach."""
    path = check_protocol(1, 3, removed={"renewed"}).broken["version"]
    assert path == ("upload of iteration 0, layer 0 begins", "upload of iteration 0, layer 0 ends",
                    "upload of iteration 1, layer 0 begins", "upload of iteration 1, layer 0 ends",
                    "upload of iteration 2, layer 0 finds version 0, promised 1")
    lost = check_protocol(1, 3, removed={"collected"}).broken["gradient"]
    assert lost[-1] == ("download of iteration 1, layer 0 overwrites the gradient of iteration 0, "
                        "which nobody has copied")
    early = check_protocol(1, 3, removed={"downloaded"}).broken["gradient"]
    assert early == ("G-copy of iteration 0, layer 0 finds [None] instead of iteration 0",)
    torn = check_protocol(1, 3, removed={"uploaded"}).broken["whole"]
    assert torn == ("upload of iteration 0, layer 0 begins",
                    "P-copy of iteration 0, layer 0 begins inside upload of iteration 0, layer 0")


def test_a_breach_comes_with_the_way_to_it():
    paths()


def test_two_iterations_cannot_show_every_need():
    """Without "renewed" the first version too old is wanted in iteration 2: the check needs three iterations."""
    assert "version" not in check_protocol(1, 2, removed={"renewed"}).broken
    assert "version" in check_protocol(1, 3, removed={"renewed"}).broken


def interleavings_without_orderings(layers, iterations):
    """How many ways there are to run the six lists with no waiting at all."""
    lengths = [2 * len(actions) for actions in Protocol(layers, iterations).lists.values()]
    return math.factorial(sum(lengths)) // math.prod(map(math.factorial, lengths))


def test_the_number_of_states_is_small_and_of_interleavings_is_not():
    """Two layers, three iterations: 631 states stand for what would be more than 1e30 interleavings without waits."""
    assert [check_protocol(*size).states for size in ((1, 3), (2, 3))] == [117, 631]
    assert interleavings_without_orderings(2, 3) > 10**30


@pytest.mark.parametrize("change", [{"removed": {"sixth"}}, {"layers": 0}, {"iterations": 0}, {"staleness": 2}])
def test_bad_input_gets_a_sentence(change):
    asked = {"layers": 1, "iterations": 1} | change
    with pytest.raises(LabError, match="No such protocol"):
        check_protocol(**asked)


def names():
    """How actions are called in a path; and that backwards go from the last layer to the first."""
    assert [action.layer for action in Protocol(3, 1).lists["reupload"]] == [2, 1, 0]
    assert [str(Action("step", 3)), str(Action("G-copy", 1, 2))] == [
        "step of iteration 3", "G-copy of iteration 1, layer 2"]


def test_actions_have_names():
    names()


# ---- planted faults


def needed():
    for removed in ORDERINGS:
        assert_needed(removed)


@pytest.mark.parametrize(("check", "place", "old", "new"), [
    (apart, "interleavings.Search.run", "if following not in self.before", "if not self.before"),
    (apart, "interleavings.Search.run", "finished |= not", "finished &= not"),
    (stuck, "interleavings.Search.moves", "if not able and", "if able and"),
    (stuck, "interleavings.Search.may_go", "positions[other] >= needed", "positions[other] >= 0"),
    (apart, "interleavings.Search.unfinished", "at < 2 *", "at < "),
    (apart, "interleavings.Search.move", "self.measured |=", "self.measured &="),
    (apart, "interleavings.Search.move", "(ahead, self.model.after(action, memory))", "(ahead, memory)"),
    (shared, "interleavings.Search.move", "self.race(action, positions) or", ""),
    (apart, "interleavings.Search.move", "or self.model.breach(action, memory)", ""),
    (shared, "interleavings.Search.race", "if at % 2", "if not at % 2"),
    (needed, "interleavings.Search.race", "or writes & other_reads", ""),
    (needed, "interleavings.Search.race", "(reads | writes) & other_writes", "writes & other_writes"),
    (shared, "interleavings.Search.note", "path[::-1]", "path"),
    (paths, "interleavings.Search.note", "if invariant in self.broken", "if not invariant"),
    (holds, "staleness.Protocol.waits", "name not in self.removed", 'name != "renewed"'),
    (needed, "staleness.Protocol.waits", "name not in self.removed", "True"),
    (holds, "staleness.Protocol.waits", '"upload": [("renewed", [of["P-copy"]', '"upload": [("renewed", [of["upload"]'),
    (holds, "staleness.Protocol.waits", '[of["upload"], of["reupload"]]', '[of["upload"]]'),
    (holds, "staleness.Protocol.waits", '("downloaded", [of["download"]]), ', ""),
    (holds, "staleness.Protocol.waits", '("collected", [of["G-copy"]._replace(iteration=T - 1)])', ""),
    (holds, "staleness.Protocol.waits", '[Action("step", late - 1)]', "[]"),
    (holds, "staleness.Protocol.waits", '[Action("step", T - 1)]', "[]"),
    (holds, "staleness.Protocol.waits", 'Action("G-copy", T, each)', 'Action("G-copy", T - 1, each)'),
    (holds, "staleness.Protocol.waits", "T - 1 + self.staleness, each", "T - 1 + self.staleness, 0"),
    (holds, "staleness.Protocol.after", "put(memory.master, layer, memory.optimizer)", "put(memory.master, layer, 0)"),
    (holds, "staleness.Protocol.after", "memory.optimizer + 1", "memory.optimizer + 2"),
    (holds, "staleness.Protocol.after", "put(memory.slot, layer, None)", "memory.slot"),
    (holds, "staleness.Protocol.after", "memory.master[layer]))", "0))"),
    (needed, "staleness.Protocol.breach", 'in ("upload", "reupload") and', 'in () and'),
    (needed, "staleness.Protocol.breach", 'agent == "P-copy" and', "False and"),
    (paths, "staleness.Protocol.breach", 'agent == "download" and', "False and"),
    (paths, "staleness.Protocol.breach", '"G-copy": memory.slot[layer:layer + 1], ', ""),
    (holds, "staleness.Protocol.breach", "max(0, T - self.staleness)", "max(0, T - 1)"),
    (paths, "staleness.Protocol.touches", '"upload": ({("master", layer)}, set())', '"upload": (set(), set())'),
    (needed, "staleness.Protocol.touches", '(set(), {("slot", layer)})', "(set(), set())"),
    (holds, "staleness.Protocol.measure", "action.iteration - version", "version"),
    (holds, "staleness.Protocol.measure", "action.iteration < self.staleness", "False"),
    (holds, "staleness.put", "values[place + 1:]", "values[place:]"),
    (names, "staleness.Protocol.lists", "[::-1]", ""),
    (names, "staleness.Action.__str__", 'self.agent == "step"', 'self.agent != "step"'),
])
def test_a_planted_fault_is_noticed(monkeypatch, check, place, old, new):
    """The check passes, and fails with one place of the source altered."""
    check()
    plant(monkeypatch, place, old, new, globals())
    with pytest.raises((AssertionError, LabError)):
        check()
