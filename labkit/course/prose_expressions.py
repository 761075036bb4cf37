"""A number in prose that the ledger does not hold, computed again from the shipped results.

In prose_numbers.toml the source of a number may be an expression, behind an equals sign:

    "+0.02 [−0.08, 0.13]" = "= interval(ours('menu.rest_weaker'), ours('menu.shared_suffices'))"

It may use, of the lab's desk results (or another scale's, as a second argument: `ours('menu.chance', 'quick')`):
`ours(id)` and `baseline(id)`, {seed: value} or a number; `figure(name)`, the data that a figure kept; and what
FUNCTIONS names. It gives a number, or (estimate, low, high).
"""

import functools
import json
from math import log
from pathlib import Path
from statistics import mean, median

from labkit.course import results
from labkit.errors import LabError
from labkit.measure import interval

FUNCTIONS = {each.__name__: each for each in (interval, mean, median, log, min, max, sum, len, sorted, abs, round, zip,
                                              range, enumerate, any, all, dict, list, float, int, str)}


def evaluate(expression: str, number: str) -> tuple[float, ...]:
    """The value of an expression for lab `number`: one number, or three. Raises LabError with what is wrong."""
    try:
        value = eval(expression, {"__builtins__": {}, **FUNCTIONS, **_readers(number)})
        return tuple(map(float, value)) if isinstance(value, tuple | list) else (float(value),)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise LabError(f"The source {expression!r} of lab {number} can't be computed ({problem}).",
                       "Mend it in labkit/course/prose_numbers.toml.") from None


def _readers(number: str) -> dict:
    """`ours`, `baseline` and `figure` of one lab."""
    def row(name: str, scale: str) -> dict:
        return next(row for row in _file(number, scale, ".json")["rows"] if row["id"] == name)

    def ours(name: str, scale: str = "desk"):
        return row(name, scale)["ours"]

    def baseline(name: str, scale: str = "desk"):
        return row(name, scale)["baseline"]

    def figure(name: str, scale: str = "desk"):
        return _file(number, scale, ".figures.json")[name]

    return {"ours": ours, "baseline": baseline, "figure": figure}


@functools.cache
def _file(number: str, scale: str, ending: str) -> dict:
    path = Path(results.RESULTS) / scale / f"{number}{ending}"
    return results.read_result(path) if ending == ".json" else json.loads(path.read_text(encoding="utf-8"))
