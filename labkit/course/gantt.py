"""A pipeline's timeline as a Gantt chart: one row a worker, one bar an operation, white where the worker waits.

Simulated and measured timelines have the same form (labkit/pipeline/timeline.py), so one function draws both. Kinds
differ by colour and by hatch.
"""

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from labkit.course.figures import PALETTE, boxes
from labkit.pipeline import Event, Timeline

KINDS = {"F": ("forward", PALETTE["sky"], ""), "R": ("recompute", PALETTE["orange"], "////"),
         "B": ("backward", PALETTE["vermillion"], ""), "FB": ("fused: head, loss, backward", PALETTE["green"], "xx"),
         "W": ("backward of weights", PALETTE["purple"], "..")}


def bars(row: Iterable[Event]) -> dict[str, list[tuple[float, float]]]:
    """A worker's (start, length) by kind; the recompute that opens a backward is apart."""
    found = {kind: [] for kind in KINDS}
    for event in row:
        first = event.recompute_ms if event.kind == "B" else 0.0
        if first:
            found["R"].append((event.start, first))
        found[event.kind].append((event.start + first, event.end - event.start - first))
    return found


def draw(ax: Axes, timeline: Timeline, *, until: float | None = None) -> None:
    """The chart; `until` sets the right end, to compare two."""
    rows = [bars(row) for row in timeline.rows]
    for kind, (_, colour, hatch) in KINDS.items():
        found = [(start, worker - 0.4, start + length, worker + 0.4)
                 for worker, row in enumerate(rows) for start, length in row[kind]]
        boxes(ax, found, facecolor=colour, edgecolor="black", linewidth=0.3, hatch=hatch)
    ax.set(ylim=(timeline.workers - 0.4, -0.6), xlim=(0, (until or timeline.makespan) * 1.01), ylabel="worker",
           yticks=range(timeline.workers))
    ax.grid(visible=False)


def legend(ax: Axes, timelines: Iterable[Timeline], below: float = -0.3) -> None:
    """The kinds that occur, in one line under the axes."""
    used = {kind for timeline in timelines for row in timeline.rows for kind, parts in bars(row).items() if parts}
    handles = [Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=name)
               for kind, (name, colour, hatch) in KINDS.items() if kind in used]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(handles), fontsize=10)
