"""Exercises: each check accepts its right answers, refuses its known wrong ones with the sentence that helps, and is
calm about everything else. The checks of all notebooks are held to this, and to being used by their notebook."""

import importlib
import pkgutil
import re

import numpy as np
import pytest
import torch

from labkit.course import check, display, exercises, header
from labkit.errors import LabError

CHECKS = {name: found for module in pkgutil.iter_modules(exercises.__path__)
          for name, found in importlib.import_module(f"labkit.course.exercises.{module.name}").CHECKS.items()}


# checks that launch kernels run with the interpreted tests
NAMES = [pytest.param(name, marks=[pytest.mark.interp] * each.interpreted) for name, each in CHECKS.items()]


@pytest.fixture
def said(monkeypatch, capsys):
    """What a check prints in a notebook."""
    monkeypatch.setattr(display, "kernel", lambda: object())
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_pass(name, said):
    """Every right answer, in the notebook's two ways: `check` says right, `solution` does not raise."""
    assert CHECKS[name].right
    for answer in CHECKS[name].right:
        check.respond(name, answer)
        check.confirm(name, answer)
        right, passes = said().splitlines()
        assert right == f"Exercise {name}: right." + (f" {CHECKS[name].remark(answer)}" if CHECKS[name].remark else "")
        assert passes == f"Exercise {name}: this solution passes the check."


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers_get_their_sentence(name, said):
    """`check` names the mistake and does not raise; `solution` raises, so that nbval sees a broken solution."""
    assert CHECKS[name].wrong
    for answer, part in CHECKS[name].wrong:
        check.respond(name, answer)
        assert part in said()
        with pytest.raises(AssertionError, match=re.escape(name)):
            check.confirm(name, answer)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("nonsense", [None, "why?", object(), [], lambda: 1, float("nan"), torch.ones(2, 3)],
                         ids=lambda value: type(value).__name__)
def test_nonsense_is_not_an_exception(name, nonsense, said):
    """Whatever a learner types, a sentence comes back, and never "right"."""
    check.respond(name, nonsense)
    assert "not yet" in said()


@pytest.mark.parametrize("name", CHECKS)
def test_unanswered_is_said_and_a_hint_is_offered(name, said):
    """The ellipsis of the empty exercise is no answer; as a solution it is an error."""
    check.respond(name, ...)
    assert "not answered yet" in (text := said()) and f"{CHECKS[name].minutes} min" in text
    with pytest.raises(AssertionError):
        check.confirm(name, ...)
    check.show_hint(name)
    assert CHECKS[name].hint in said()


def test_an_empty_function_is_no_answer(said):
    """A puzzle's kernel comes with its signature and an ellipsis for a body: that is "not answered", not "wrong"."""
    def empty(x, y):
        """Fill y."""
        ...

    check.respond("02.1", empty)
    assert "not answered yet" in said()
    def begun(x, y):
        y = x + y
        ...

    assert not check.unanswered(lambda r, s: ...) and not check.unanswered(begun) and not check.unanswered(said)


@pytest.mark.parametrize("name", CHECKS)
def test_each_exercise_stands_in_its_notebook(name):
    """An exercise that no notebook asks, or that it never solves, would be tested here and used by nobody."""
    source = header.find_notebook(name.split(".")[0]).read_text(encoding="utf-8").replace('\\"', '"')
    assert f'lab.check("{name}"' in source and f'lab.solution("{name}"' in source


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_any_type_are_understood(dtype):
    """Tensors of each float type, numpy and Python numbers, with or without a gradient."""
    assert check.close(torch.tensor([0.75], dtype=dtype, requires_grad=True), 0.75, within=1e-9)
    assert check.array(torch.ones(2, 3, dtype=dtype)).tolist() == [[1.0] * 3] * 2
    assert check.close(np.float32(0.75), 0.75, within=0) and check.close(np.array(0.75), 0.75, within=0)
    for wrong in (True, "0.75", None, torch.ones(2), lambda: 0.75):
        with pytest.raises((TypeError, RuntimeError)):
            check.number(wrong)


def test_plain_python_is_silent_and_an_unknown_name_is_a_sentence(capsys):
    """On a server nothing is asked; a misspelt name lists the exercises there are."""
    check.respond("02.1", 5)
    assert capsys.readouterr().out == ""
    with pytest.raises(LabError, match="no exercise '02.99'"):
        check.find("02.99")
    with pytest.raises(LabError, match="Known here: none"):
        check.find("zz.1")
