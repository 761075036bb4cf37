"""Exercises: each check accepts its right answers, refuses its known wrong ones with the sentence that helps, and is
calm about everything else. The checks of all notebooks are held to this, and to being used by their notebook."""

import importlib
import itertools
import json
import pkgutil
import re
import shutil

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from test_nbval_guard import GUARD, message, report

from labkit.course import check, display, exercises, header, reading
from labkit.errors import LabError

CHECKS = {name: found for module in pkgutil.iter_modules(exercises.__path__)
          for name, found in importlib.import_module(f"labkit.course.exercises.{module.name}").CHECKS.items()}


# exercises with many right answers, which stay right when they are scaled; and one that answers with a name
OPEN = {"06.2", "08.2", "09.4", "09.5", "16.1", "16.2"}

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
    assert len(CHECKS[name].right) >= 2
    for answer in CHECKS[name].right:
        check.respond(name, answer)
        check.confirm(name, answer)
        right, passes = said().splitlines()
        assert right == f"Exercise {name}: right." + (f" {CHECKS[name].remark(answer)}" if CHECKS[name].remark else "")
        assert passes == f"Exercise {name}: this solution passes the check."


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers_get_their_sentence(name, said):
    """`check` names the mistake and does not raise; `solution` raises, so that nbval sees a broken solution."""
    assert len({part for _, part in CHECKS[name].wrong}) >= 2, "two mistakes with a sentence each"
    for answer, part in CHECKS[name].wrong:
        check.respond(name, answer)
        assert part in said()
        with pytest.raises(AssertionError, match=re.escape(name)):
            check.confirm(name, answer)


@pytest.mark.parametrize("name", CHECKS)
def test_right_answers_are_different_programs(name):
    """Two right answers with the same code prove no more than one: each function's code or data differs."""
    codes = [getattr(getattr(each, "fn", each), "__code__", None) for each in CHECKS[name].right]
    programs = [(code.co_code, code.co_consts, code.co_names) for code in codes if code is not None]
    assert all(one != other for one, other in itertools.combinations(programs, 2))


def changed(answer, change):
    """An answer whose numbers went through `change`: itself, what its function returns, or each value of a dict."""
    if callable(answer):
        return lambda *arguments: changed(answer(*arguments), change)
    if isinstance(answer, dict):
        return {key: changed(value, change) for key, value in answer.items()}
    return answer if answer is None or isinstance(answer, str | bool) or not numeric(answer) else change(answer)


def numeric(answer) -> bool:
    kinds = {type(value) for value in (answer if isinstance(answer, list | tuple | set) else [answer])}
    return not kinds & {bool, str} and getattr(answer, "dtype", None) not in (bool, torch.bool)


def typed(dtype):
    """Numbers as tensors of this type, or as they are if it cannot hold them."""
    def change(answer):
        tensor = answer if isinstance(answer, torch.Tensor) else torch.tensor(np.asarray(reading.array(answer)))
        there = tensor.to(dtype)
        return there if there.isfinite().all() else answer
    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in CHECKS if not CHECKS[name].interpreted])
def test_right_answers_of_any_float_type_pass(name, dtype):
    """The first right answer, rounded to a type, is as right as the type can be."""
    assert check.verdict(CHECKS[name], changed(CHECKS[name].right[0], typed(dtype))) is None


@pytest.mark.parametrize("factor", [1.15, -1.0], ids=["off by 15%", "sign turned"])
@pytest.mark.parametrize("name", [name for name in CHECKS if not CHECKS[name].interpreted and name not in OPEN])
def test_nearly_right_answers_are_refused(name, factor):
    """Tolerances forgive rounding, and nothing else: not in double precision, not in bfloat16."""
    if name == "05.2" or (name, factor) == ("05.4", -1):
        pytest.skip("two booleans have no size, and an eigenvector no sign")
    for dtype in (torch.float64, torch.bfloat16):
        right, change = CHECKS[name].right[0], typed(dtype)
        answer = changed(right, lambda got, change=change: change(factor * typed(torch.float64)(got)))
        assert check.verdict(CHECKS[name], answer)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("nonsense", [None, "why?", object(), [], lambda: 1, float("nan"), torch.ones(2, 3)],
                         ids=lambda value: type(value).__name__)
def test_nonsense_is_not_an_exception(name, nonsense, said):
    """Whatever a learner types, a sentence comes back, and never "right"."""
    check.respond(name, nonsense)
    assert "not yet" in (text := said()) and "raised" not in text


@pytest.mark.parametrize("name", CHECKS)
def test_unanswered_is_said_and_a_hint_is_offered(name, said):
    """The ellipsis of the empty exercise is no answer; as a solution it is an error."""
    check.respond(name, ...)
    assert "not answered yet" in (text := said()) and f"{CHECKS[name].level}, about {CHECKS[name].minutes} min" in text
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


@pytest.mark.parametrize("number", sorted({name[:2] for name in CHECKS}))
def test_minutes_and_levels_stand_in_the_notebook(number):
    """4 to 6 exercises, from easy to hard; the text above each names its minutes and its level as the check does."""
    mine = {name: each for name, each in CHECKS.items() if name.startswith(number)}
    levels = [check.LEVELS.index(each.level) for each in mine.values()]
    assert 4 <= len(mine) <= 6 and list(mine) == [f"{number}.{n + 1}" for n in range(len(mine))]
    assert levels == sorted(levels) and (levels[0], levels[-1]) == (0, 2)
    cells = json.loads(header.find_notebook(number).read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    stated = re.findall(rf"\*\*({number}\.\d) \((\d+) min, (\w+)\)\.", text)
    assert stated == [(name, str(each.minutes), each.level) for name, each in mine.items()]
    stored = "".join(str(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))
    for name, each in mine.items():
        assert f"Exercise {name}: not answered yet ({each.level}, about {each.minutes} min" in stored


ANSWERS = {"09.1": "lambda m, n, V: m * n / V**2", "09.2": "1 / 3", "09.3": "lambda p, answers: 1 / (p - p)",
           "09.4": "None", "09.5": "lambda: ([3, 2, 0, 0, 0], [-3, 3, 2, 0, 0], [2, 2.5, 0, 0, 0])"}
SAID = {"09.1": "not yet. That is the chance", "09.2": "not yet. After distillation", "09.3": "raised ZeroDivision",
        "09.4": "not yet. A function is asked for", "09.5": "right"}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Notebook 09 as a learner leaves it: answers, mostly wrong ones, in place of the `...`; no experiments."""
    code = [cell for cell in nbformat.read(header.find_notebook("09"), 4).cells if cell.cell_type == "code"]
    tags = [set(cell.metadata.get("tags", [])) for cell in code]
    cells, folder = code[:tags.index({"settings"}) + 1], tmp_path_factory.mktemp("answered")
    for cell, mine in zip(code, tags, strict=True):
        if "exercise" in mine:
            name = re.search(r'lab\.check\("([\d.]+)"', cell.source)[1]
            cell.source = cell.source.replace("= ...", f"= {ANSWERS[name]}")
        cells += [cell] * bool(mine & {"exercise", "solution"})
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "09_answered.ipynb")
    return folder


def test_a_wrong_answer_is_told_in_a_kernel(answered, monkeypatch):
    """What a learner sees in Jupyter below each exercise; no cell fails, or nbclient would raise."""
    monkeypatch.setenv("LABKIT_SCALE", "quick")
    ran = NotebookClient(nbformat.read(answered / "09_answered.ipynb", 4), timeout=60).execute()
    said = {name: "".join(output.get("text", "") for output in cell.outputs) for cell in ran.cells
            for name in ANSWERS if f'lab.check("{name}"' in cell.source}
    assert {name: SAID[name] in said[name] for name in ANSWERS} == dict.fromkeys(ANSWERS, True)
    assert said["09.3"].count("\n") == 1 and "It was called with (0.001, 64)" in said["09.3"]


def test_a_wrong_answer_leaves_nbval_green(answered):
    """A learner who runs the tests is not punished for an exercise; a solution that fails its check would be red."""
    shutil.copy(GUARD, answered / "conftest.py")
    notebook = nbformat.read(answered / "09_answered.ipynb", 4)
    notebook.cells.append(nbformat.v4.new_code_cell('lab.solution("09.1", lambda m, n, V: m * n / V**2)'))
    nbformat.write(notebook, answered / "09_answered.ipynb")
    failed = [(name, text) for name, case in report(answered).items() if (text := message(case))]
    assert [name for name, _ in failed] == [f"09_answered Cell {len(notebook.cells) - 1}"]
    assert "the solution of exercise 09.1 fails its check: That is the chance" in failed[0][1]


# how answers are read ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_any_type_are_understood(dtype):
    """Tensors of each float type, numpy and Python numbers, with or without a gradient."""
    assert reading.close(torch.tensor([0.75], dtype=dtype, requires_grad=True), 0.75)
    assert reading.array(torch.ones(2, 3, dtype=dtype)).tolist() == [[1.0] * 3] * 2
    assert reading.alike([torch.ones(3, dtype=dtype, requires_grad=True), (1, np.float32(1), True)], np.ones((2, 3)))
    assert reading.close(np.float32(0.75), 0.75) and reading.close(np.array(0.75), 0.75)
    for wrong in (True, "0.75", None, torch.ones(2), lambda: 0.75, [1.0], ..., 1j):
        with pytest.raises(check.Unreadable):
            reading.number(wrong)
    for wrong in ("0.75", None, lambda: 0.75, ..., {"a": 1}, [[1, 2], [3]]):
        with pytest.raises(check.Unreadable):
            reading.array(wrong)


def test_a_type_is_forgiven_what_it_rounds_and_no_more():
    """One third in each type is right; a number that is off by more than the type's rounding is not."""
    third = torch.tensor(1 / 3, dtype=torch.float64)
    for dtype, off in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        assert reading.close(third.to(dtype), 1 / 3) and reading.alike([third.to(dtype)], [1 / 3], within=0, rel=0)
        assert not reading.close(((1 + off) * third).to(dtype), 1 / 3)
        assert not reading.alike([((1 + off) * third).to(dtype)], [1 / 3], within=0, rel=0)
    assert reading.close(np.float16(1 / 3), 1 / 3) and not reading.close(float(np.float16(1 / 3)), 1 / 3)
    assert not reading.close(float("nan"), 1.0, within=9.0) and not reading.alike([1.0, 1.0], [[1.0, 1.0]])


def test_functions_are_called_with_what_their_library_takes():
    """Arrays go in as tensors, else as arrays, else numbers as tensors too; a function may change what it gets."""
    row_N = np.arange(3.0)
    assert reading.called(lambda row: row.log().exp(), row_N).tolist() == pytest.approx(row_N)
    assert reading.called(lambda row: row.astype(int), row_N).tolist() == [0, 1, 2]
    assert reading.called(torch.exp, 0.0) == 1 and reading.called(lambda row: row.fill(9.0), row_N) is None
    assert reading.called(lambda row: row.mul_(0).sum(), row_N) == 0 and row_N.tolist() == [0, 1, 2]
    assert reading.called(lambda words: words == "a", np.array(["a", "b"])).tolist() == [True, False]
    with pytest.raises(ZeroDivisionError) as caught:
        reading.called(lambda row, n: 1 / (n - n), row_N, 3.0)
    assert caught.value.__notes__ == ["It was called with ([0.0, 1.0, 2.0], 3)."]
    with pytest.raises(check.Unreadable, match="function"):
        reading.called(5, row_N)


def test_plain_python_is_silent_and_an_unknown_name_is_a_sentence(capsys):
    """On a server nothing is asked; a misspelt name lists the exercises there are."""
    check.respond("02.1", 5)
    assert capsys.readouterr().out == ""
    with pytest.raises(LabError, match="no exercise '02.99'"):
        check.find("02.99")
    with pytest.raises(LabError, match="Known here: none"):
        check.find("zz.1")
