"""Exercises that answer back: a check accepts every right answer, and says what to look at for a wrong one.

A `Check` carries right answers and known wrong ones, so that a test can prove that it tells them apart.
Answers may be functions, tensors of any float type, arrays or plain numbers.
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from labkit.course import display
from labkit.errors import LabError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Check:
    """One exercise. `test(answer)` returns None if the answer is right, else a sentence that helps.

    `remark(answer)`, said after "right", is a score such as the bytes that a kernel moves. `interpreted` marks checks
    that launch kernels and need Triton's interpreter. `right` and `wrong` (pairs of an answer and a part of the
    sentence it must get) are for the course's tests.
    """

    question: str
    minutes: int
    hint: str
    test: Callable[[object], str | None]
    right: list = field(default_factory=list)
    wrong: list[tuple[object, str]] = field(default_factory=list)
    remark: Callable[[object], str] | None = None
    interpreted: bool = False


def find(name: str) -> Check:
    """The exercise called "02.1" (in labkit/course/exercises/nb02.py)."""
    try:
        checks = importlib.import_module(f"labkit.course.exercises.nb{name.split('.')[0]}").CHECKS
    except ModuleNotFoundError:
        checks = {}
    if name not in checks:
        raise LabError(f"There is no exercise {name!r}.", f"Known here: {', '.join(checks) or 'none'}.")
    return checks[name]


def verdict(check: Check, answer: object) -> str | None:
    """None for a right answer, else a sentence; an answer that raises is a wrong answer."""
    try:
        return check.test(answer)
    except Exception as error:
        return f"Your answer raised {type(error).__name__}: {error}"


def respond(name: str, answer: object) -> None:
    """What `lab.check` says; silent in plain Python."""
    check = find(name)
    if not display.kernel():
        return
    if unanswered(answer):
        print(f"Exercise {name}: not answered yet (about {check.minutes} min; lab.hint(\"{name}\") helps).")
        return
    problem = verdict(check, answer)
    if problem is not None:
        return print(f"Exercise {name}: not yet. {problem}")
    print(f"Exercise {name}: right." + (f" {check.remark(answer)}" if check.remark else ""))


def confirm(name: str, answer: object) -> None:
    """What `lab.solution` does: AssertionError unless the course's own solution passes its check."""
    problem = "it is still `...`" if unanswered(answer) else verdict(find(name), answer)
    assert problem is None, f"the solution of exercise {name} fails its check: {problem}"
    if display.kernel():
        print(f"Exercise {name}: this solution passes the check.")


def unanswered(answer: object) -> bool:
    """The ellipsis, or a function or kernel whose whole body is one (docstring or not)."""
    if answer is ...:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(answer, "fn", answer))))
    except (TypeError, OSError, SyntaxError):  # no function, or one without a text
        return False
    if not isinstance(tree.body[0], ast.FunctionDef):
        return False
    said = [line.value.value if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) else None
            for line in tree.body[0].body]
    return said[-1] is ... and all(word is ... or isinstance(word, str) for word in said)


def show_hint(name: str) -> None:
    """Print the hint of an exercise."""
    print(f"Hint for {name}: {find(name).hint}")


# what checks are made of -------------------------------------------------------------------------------------------

def number(answer: object) -> float:
    """An answer as a float: a Python or numpy number, or a tensor or array with one element."""
    if callable(answer):
        raise TypeError("a number is asked for, not a function")
    item = answer.item() if hasattr(answer, "item") else answer
    if isinstance(item, bool | str) or item is None:
        raise TypeError(f"a number is asked for, not {item!r}")
    return float(item)


def array(answer: object) -> "np.ndarray":
    """An answer as a float64 array: a list, an array, or a tensor of any float type on any device."""
    import numpy as np

    if hasattr(answer, "detach"):
        answer = answer.detach().cpu().double().numpy()
    return np.asarray(answer, dtype=float)


def close(answer: object, expected: float, *, within: float) -> bool:
    """Whether a number is within `within` (absolute) of the expected one."""
    return abs(number(answer) - expected) <= within
