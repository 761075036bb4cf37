"""Every widget tried where a learner can take it, and timed: nothing breaks, everything moves, and at once.

`LABKIT_WIDGETS=ends` makes `lab.play` take each control to its ends (`make test` does, for every notebook);
`corners` takes it to every option and every corner too (`make test-browser`). A widget passes if each place draws, if
each end of a control gives another picture and another text than the start, and if no place costs more than 0.2 s
(0.4 s at the ends, which are tried while a second notebook shares caches and cores). Where LABKIT_WIDGET_TIMES asks
for a file of the times, as `make test-browser` does, they are told and not judged.
Time is this process's own (CPU), so that a busy machine is not held against a widget; a slow place is timed again.
"""

import itertools
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median

from labkit.course import widgets
from labkit.errors import LabError

LIMIT_SECONDS = {"ends": 0.4, "corners": 0.2}
HOW = tuple(LIMIT_SECONDS)
MOST_CORNERS, MOST_VALUES = 32, 9  # of a widget with eight controls a sample; of a long slider every so many steps


def wanted() -> str | None:
    """How far LABKIT_WIDGETS asks widgets to be tried: not at all, "ends", or "corners"."""
    how = os.environ.get("LABKIT_WIDGETS")
    if how and how not in HOW:
        raise LabError(f"LABKIT_WIDGETS is {how!r}.", f"Use one of {', '.join(HOW)}, or leave it out.")
    return how


def try_all(notebook: str, draw: Callable, alt: str | Callable[..., str], controls: Mapping[str, widgets.Control],
            how: str) -> dict:
    """Draw every place that `how` names; returns {notebook, widget, places, median_ms, worst_ms, at}.

    Raises LabError with the first defect. LABKIT_WIDGET_TIMES names a file that gets what is returned as a line of
    JSON; then it is for the file's reader to judge the times.
    """
    name, start = _name(draw), {name: control.value for name, control in controls.items()}
    widgets.spare_the_collector()
    first, times = _drawn(name, draw, alt, start)[1:], []
    for moved, values in places(controls, how):
        seconds, *drawn = _drawn(name, draw, alt, values)
        times.append((seconds, values))
        if moved:
            _must_differ(name, moved, values[moved], zip(("picture", "alternative text"), first, drawn, strict=True))
    worst, at = max(times, key=lambda each: each[0])
    found = {"notebook": notebook, "widget": name, "places": len(times),
             "median_ms": round(1000 * median(each[0] for each in times)), "worst_ms": round(1000 * worst),
             "at": str(at)}
    if path := os.environ.get("LABKIT_WIDGET_TIMES"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    elif worst > LIMIT_SECONDS[how]:
        raise LabError(f"The widget {name} takes {worst:.2f} s at {at}; a redraw may take {LIMIT_SECONDS[how]}.",
                       "Compute before lab.play what does not change, and let draw(...) only plot it.")
    return found


def places(controls: Mapping[str, widgets.Control], how: str) -> Iterator[tuple[str | None, dict]]:
    """(the control that stands at an end, all others at their start, or None; the values), in a fixed order."""
    start = {name: control.value for name, control in controls.items()}
    ends = {name: (control.values[0], control.values[-1]) for name, control in controls.items()}
    for name, control in controls.items():
        for value in ends[name] if how == "ends" else _spread(control.values):
            if value != control.value:
                yield (name if value in ends[name] else None), start | {name: value}
    if how == "corners":
        corners = list(itertools.product(*ends.values()))
        for corner in random.Random(0).sample(corners, min(len(corners), MOST_CORNERS)):
            yield None, dict(zip(ends, corner, strict=True))


def _spread(values: Sequence) -> list:
    """A few of the values, evenly over the range, both ends among them."""
    last, count = len(values) - 1, min(len(values), MOST_VALUES)
    return [values[round(i * last / max(count - 1, 1))] for i in range(count)]


def _drawn(name: str, draw: Callable, alt: str | Callable[..., str], values: dict) -> tuple[float, bytes, str]:
    """(seconds, PNG, alternative text) of one place; a slow one gets a second chance."""
    tries = []
    while not tries or (min(tries) > LIMIT_SECONDS["corners"] and len(tries) < 3):
        start = time.process_time()
        try:
            with warnings.catch_warnings(action="error"):  # a learner would see it in red
                png, text, _ = widgets.rendered(draw, alt, values)
        except Exception as error:
            raise LabError(f"The widget {name} can't be drawn at {values}: {error}",
                           "Narrow the controls, or let draw(...) show what is possible there.") from error
        tries.append(time.process_time() - start)
    return min(tries), png, text


def _must_differ(name: str, moved: str, value: object, pairs: Iterable[tuple[str, object, object]]) -> None:
    for what, before, after in pairs:
        if before == after:
            raise LabError(f"The widget {name} shows the same {what} after {moved} was moved to {value!r}.",
                           f"Let it say what {moved} does, or take that control away.")


def _name(draw: Callable) -> str:
    """The function's name; for a lambda also where it stands."""
    code = getattr(draw, "__code__", None)
    return f"{draw.__name__} (line {code.co_firstlineno})" if draw.__name__ == "<lambda>" else draw.__name__
