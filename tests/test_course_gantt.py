"""The Gantt chart shows every operation where it ran: its bars add up to the busy time, and kinds differ by hatch."""

from itertools import pairwise

import pytest
from matplotlib.colors import to_rgb

from labkit.course import figures, gantt
from labkit.pipeline import simulate

ASKED = {"workers": 2, "micro_batches": 3, "stage_forward_ms": [1.0, 2.0], "stage_backward_ms": [4.0, 3.0],
         "stage_recompute_ms": [1.0, 1.0]}


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "roundpipe"])
def test_bars_are_the_busy_time_of_each_worker(schedule):
    timeline = simulate(schedule, **ASKED)
    for row, busy in zip(timeline.rows, timeline.busy, strict=True):
        found = [bar for parts in gantt.bars(row).values() for bar in parts]
        assert sum(length for _, length in found) == pytest.approx(busy)
        assert min(length for _, length in found) > 0
        ends = sorted((start, start + length) for start, length in found)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(ends))


def test_the_recompute_opens_its_backward_and_the_fused_stage_has_none():
    bars = [gantt.bars(row) for row in simulate("roundpipe", **ASKED).rows]
    assert sum(len(row["R"]) for row in bars) == 3 and sum(len(row["FB"]) for row in bars) == 3
    for row in bars:
        for start, length in row["R"]:
            assert length == 1.0 and any(abs(start + length - other) < 1e-9 for other, _ in row["B"])


def test_the_drawing_has_a_row_a_worker_and_names_the_kinds_that_occur():
    timeline = simulate("roundpipe", **ASKED)
    _, ax = figures.figure()
    gantt.draw(ax, timeline, until=2 * timeline.makespan)
    gantt.legend(ax, [timeline])
    assert list(ax.get_yticks()) == [0, 1] and ax.get_xlim()[1] >= 2 * timeline.makespan and ax.yaxis_inverted()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "forward", "recompute", "backward", "fused: head, loss, backward"]


def test_every_bar_is_drawn_where_it_ran_in_its_kinds_colour_and_hatch():
    """One path a kind, which is quick to draw; its boxes are the bars of all workers, in their rows."""
    timeline = simulate("roundpipe", **ASKED)
    _, ax = figures.figure()
    gantt.draw(ax, timeline)
    drawn = {}
    for patch in ax.patches:
        boxes = [polygon.tolist() for polygon in patch.get_path().to_polygons(closed_only=False)]
        drawn[patch.get_facecolor()[:3], patch.get_hatch() or None] = sorted(
            (min(x for x, _ in box), max(x for x, _ in box), min(y for _, y in box)) for box in boxes)
    for kind, (_, colour, hatch) in gantt.KINDS.items():
        expected = sorted((start, start + length, worker - 0.4) for worker, row in enumerate(timeline.rows)
                          for start, length in gantt.bars(row)[kind])
        assert drawn.get((to_rgb(colour), hatch or None), []) == [pytest.approx(box) for box in expected]


def test_no_two_kinds_share_colour_and_hatch():
    assert len({(colour, hatch) for _, colour, hatch in gantt.KINDS.values()}) == len(gantt.KINDS)
    assert len({colour for _, colour, _ in gantt.KINDS.values()}) == len(gantt.KINDS)
