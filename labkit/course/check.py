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

from labkit.course import display
from labkit.errors import LabError

# easy: one step from a formula or a table of the notebook. medium: two steps, or one trap. hard: a derivation, a
# program or an idea of one's own. A notebook's exercises stand in this order.
LEVELS = ("easy", "medium", "hard")


class Unreadable(TypeError):
    """An answer of another kind than the exercise asks for. The message is the sentence for the learner."""


@dataclass(frozen=True)
class Check:
    """One exercise of a level out of LEVELS. `test(answer)` is None if the answer is right, else a sentence that helps.

    `remark(answer)`, said after "right", is a score such as the bytes that a kernel moves. `interpreted` marks checks
    that launch kernels and need Triton's interpreter. `right` and `wrong` (pairs of an answer and a part of the
    sentence it must get) are for the course's tests.
    """

    question: str
    minutes: int
    level: str
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
    except Unreadable as error:
        return str(error)
    except Exception as error:
        return " ".join([f"Your answer raised {type(error).__name__}: {error}.", *getattr(error, "__notes__", [])])


def respond(name: str, answer: object) -> None:
    """What `lab.check` says; silent in plain Python."""
    check = find(name)
    if not display.kernel():
        return
    if unanswered(answer):
        effort = f"{check.level}, about {check.minutes} min"
        print(f"Exercise {name}: not answered yet ({effort}; lab.hint(\"{name}\") helps).")
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
