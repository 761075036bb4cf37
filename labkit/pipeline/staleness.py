"""Weights one update late: RoundPipe's event protocol as a small model, checked over every interleaving.

Three copies of each layer: transient on a worker, master (host), optimizer. Six agents work at once, each through its
own list; a copy has a beginning and an end, so two of them can overlap. Between the agents stand five orderings:

    1 uploaded     P-copy (optimizer -> master) of iteration T waits for the layer's uploads of T
    2 renewed      an upload of T + 1 waits for the P-copy of T
    3 downloaded   G-copy (master gradient -> optimizer) of T waits for the download of the gradient of T
    4 collected    a download of T + 1 waits for the G-copy of T
    5 between      P- and G-copies lie between two optimizer steps

With them iteration T computes on version max(0, T - 1) (version v contains the gradients 0 ... v - 1), hence

    W_(T+2) = W_(T+1) - eta Adam(G_T),    G_T = grad L(W_T):     every gradient is exactly one update late.

With staleness 0 the P-copy carries the update of its own iteration: `is_async=False`. Breadth-first search visits every
reachable state (interleavings.py), for so many layers and iterations. Source: arXiv 2604.27085; roundpipe 0.1.1,
attribute.py.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from labkit.errors import LabError
from labkit.pipeline.interleavings import Report, Search

ORDERINGS = ("uploaded", "renewed", "downloaded", "collected", "between")
INVARIANTS = {
    "version": "an upload of iteration T reads version max(0, T - staleness) of the master weights",
    "update": "the P-copy of iteration T carries the updates 0 ... T - staleness, no more and no fewer",
    "gradient": "no gradient is lost or counted twice: step T applies that of iteration T, once, in every layer",
    "whole": "nobody reads or writes what another is writing",
    "progress": "before all is done, something can go on",
}


class Action(NamedTuple):
    """One copy of one layer, or an optimizer step over all of them."""

    agent: str
    iteration: int
    layer: int = 0

    def __str__(self) -> str:
        place = "" if self.agent == "step" else f", layer {self.layer}"
        return f"{self.agent} of iteration {self.iteration}{place}"


class Memory(NamedTuple):
    """What the buffers hold. A gradient is (its iteration, the version that it was computed on)."""

    master: tuple[int, ...]  # versions, one a layer
    optimizer: int  # version
    held: tuple[int | None, ...]  # version of a backward on a worker, one for each iteration and layer
    slot: tuple[tuple[int, int] | None, ...]  # gradients in host memory
    collected: tuple[tuple[int, int] | None, ...]  # gradients at the optimizer


@dataclass(frozen=True)
class Protocol:
    """The model for some layers and iterations, with some orderings removed."""

    layers: int
    iterations: int
    removed: frozenset[str] = frozenset()
    staleness: int = 1

    def start(self) -> Memory:
        """Version 0 everywhere, no gradient anywhere."""
        none = (None,) * self.layers
        return Memory((0,) * self.layers, 0, none * self.iterations, none, none)

    @cached_property
    def lists(self) -> dict[str, list[Action]]:
        """What each agent does, in order. Steps touch all layers."""
        up, down = range(self.layers), range(self.layers)[::-1]
        order = {"upload": up, "reupload": down, "download": down, "P-copy": up, "G-copy": down, "step": [0]}
        return {agent: [Action(agent, T, layer) for T in range(self.iterations) for layer in layers]
                for agent, layers in order.items()}

    def waits(self, action: Action) -> list[Action]:
        """What must have ended before an action begins: the order of computing, and the orderings left in place."""
        T = action.iteration
        of = {name: action._replace(agent=name) for name in self.lists}
        late = T + 1 - self.staleness  # P-copy T lies before this step
        rules = {
            "upload": [("renewed", [of["P-copy"]._replace(iteration=T - 1)])],
            "reupload": [(None, [Action("upload", T, self.layers - 1)]),
                         ("renewed", [of["P-copy"]._replace(iteration=T - 1)])],
            "download": [(None, [of["reupload"]]), ("collected", [of["G-copy"]._replace(iteration=T - 1)])],
            "P-copy": [("uploaded", [of["upload"], of["reupload"]]), ("between", [Action("step", late - 1)])],
            "G-copy": [("downloaded", [of["download"]]), ("between", [Action("step", T - 1)])],
            "step": [("between", [Action("G-copy", T, each) for each in range(self.layers)]
                      + [Action("P-copy", T - 1 + self.staleness, each) for each in range(self.layers)])],
        }[action.agent]
        return [need for name, needs in rules if name not in self.removed for need in needs
                if 0 <= need.iteration < self.iterations]

    def touches(self, action: Action) -> tuple[set, set]:
        """(buffers read, buffers written)."""
        layer, layers = action.layer, range(self.layers)
        return {"upload": ({("master", layer)}, set()), "reupload": ({("master", layer)}, set()),
                "download": (set(), {("slot", layer)}), "P-copy": ({("optimizer", layer)}, {("master", layer)}),
                "G-copy": ({("slot", layer)}, {("collected", layer)}),
                "step": ({("collected", each) for each in layers}, {("optimizer", each) for each in layers}),
                }[action.agent]

    def breach(self, action: Action, memory: Memory) -> tuple[str, str] | None:
        """The invariant that an action breaks by what it finds, and how."""
        agent, T, layer = action
        promised, carried = max(0, T - self.staleness), max(0, T + 1 - self.staleness)
        if agent in ("upload", "reupload") and memory.master[layer] != promised:
            return "version", f"finds version {memory.master[layer]}, promised {promised}"
        if agent == "P-copy" and memory.optimizer != carried:
            return "update", f"finds version {memory.optimizer} instead of {carried}"
        if agent == "download" and memory.slot[layer]:
            return "gradient", f"overwrites the gradient of iteration {memory.slot[layer][0]}, which nobody has copied"
        found = {"G-copy": memory.slot[layer:layer + 1], "step": memory.collected}.get(agent, ())
        if any(gradient is None or gradient[0] != T for gradient in found):
            return "gradient", f"finds {[gradient and gradient[0] for gradient in found]} instead of iteration {T}"
        return None

    def after(self, action: Action, memory: Memory) -> Memory:
        """The buffers when an action has ended."""
        agent, T, layer = action
        held = T * self.layers + layer
        if agent == "reupload":
            return memory._replace(held=put(memory.held, held, memory.master[layer]))
        if agent == "download":
            gradient = T, memory.held[held]
            return memory._replace(slot=put(memory.slot, layer, gradient), held=put(memory.held, held, None))
        if agent == "P-copy":
            return memory._replace(master=put(memory.master, layer, memory.optimizer))
        if agent == "G-copy":
            return memory._replace(collected=put(memory.collected, layer, memory.slot[layer]),
                                   slot=put(memory.slot, layer, None))
        if agent == "step":
            return memory._replace(optimizer=memory.optimizer + 1, collected=(None,) * self.layers)
        return memory

    def measure(self, action: Action, memory: Memory) -> set[int]:
        """T - version of the gradients that step T applies, from where weights can be late."""
        if action.agent != "step" or action.iteration < self.staleness:
            return set()
        return {action.iteration - version for _, version in memory.collected}


def put(values: tuple, place: int, value: object) -> tuple:
    return (*values[:place], value, *values[place + 1:])


def check_protocol(layers: int, iterations: int, *, removed: frozenset[str] | set[str] = frozenset(),
                   staleness: int = 1) -> Report:
    """Visit every state that some interleaving reaches.

    Args:
        removed: names from ORDERINGS to leave out.
        staleness: 1, or 0 for synchronous updates.
    Returns:
        the report; `measured` holds how many updates the gradients were late by, {1} where all orderings stand.
    Raises:
        LabError: an unknown ordering, or sizes below 1.
    """
    if set(removed) - set(ORDERINGS) or min(layers, iterations) < 1 or staleness not in (0, 1):
        raise LabError(f"No such protocol: {layers} layers, {iterations} iterations, without {sorted(removed)}.",
                       f"Give 1 or more of each, staleness 0 or 1, and names among {', '.join(ORDERINGS)}.")
    return Search(Protocol(layers, iterations, frozenset(removed), staleness)).run()
