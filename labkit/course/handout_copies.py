"""The learner's and the instructor's copy of a lab, as notebooks made from the committed one.

The learner's copy has no outputs and no solutions. Cells that reveal an answer are folded, and text that tells a
result is behind a line to click. The instructor's copy keeps everything, opens the solutions and adds notes.
"""

import ast
import copy
import re
from collections.abc import Iterator

from labkit.course import handout_answers as answers
from labkit.course import handout_read as read
from labkit.course.check import Check, find
from labkit.course.header import header_of, text_of
from labkit.errors import LabError

LEARNER = ("**Learner's copy.** Outputs and solutions are left out; where the text speaks of folded solutions, your "
           "instructor has them. Commit to each prediction before you run on. What a run showed is folded: run the "
           "cell above it first, then click.")
FOLD = ("<details><summary>What the runs showed: open this when you have run the cell above</summary>\n\n"
        "{}\n\n</details>")


# the learner's copy --------------------------------------------------------------------------------------------------

def learner_copy(notebook: dict, name: str) -> dict:
    """Without outputs, solutions and execution counts; LabError if a kept cell needs what a solution defines."""
    for used in names_from_solutions(notebook):
        raise LabError(f"{name} can't be handed out without solutions: a later cell uses {used!r} from a solution.",
                       "Define that name outside the solution.")
    cells = [text_cell(LEARNER, "learner-note")]
    tells = asked = False  # whether a cell since the last text shows a result; whether a prediction was made
    for cell in notebook["cells"]:
        if "solution" in read.tags_of(cell):
            continue
        cell = copy.deepcopy(cell)
        if cell["cell_type"] == "code":
            asked = asked or bool(read.calls(cell, "predict"))
            tells = tells or (asked and shows_result(cell))
            empty_cell(cell)
        else:
            if tells:
                cell["source"] = folded(text_of(cell))
            tells = False
        cells.append(cell)
    cells[:2] = cells[1::-1]  # the lab's title first, then the note
    return new_notebook(notebook, cells, "learner")


def shows_result(cell: dict) -> bool:
    """Whether a cell's output is a finding: not a question, a widget or an exercise."""
    other = {"prediction", "exercise", "solution"} & set(read.tags_of(cell)) or "lab.play(" in text_of(cell)
    return bool(read.calls(cell, "reveal")) or (bool(cell.get("outputs")) and not other)


def empty_cell(cell: dict) -> None:
    """Remove what a run left in a code cell, and fold the code that names a prediction's answer."""
    cell["outputs"], cell["execution_count"] = [], None
    for leftover in ("execution", "collapsed", "scrolled"):
        cell["metadata"].pop(leftover, None)
    if read.calls(cell, "reveal"):
        cell["metadata"].setdefault("jupyter", {})["source_hidden"] = True


def folded(source: str) -> str:
    """A text with everything above its first heading behind a line to click."""
    heading = re.search(r"^#{1,6} ", source, re.MULTILINE)
    told, rest = (source[: heading.start()], source[heading.start():]) if heading else (source, "")
    return (FOLD.format(told.strip()) + "\n\n" + rest).strip() if told.strip() else source


def names_from_solutions(notebook: dict) -> Iterator[str]:
    """Names that a cell after a solution uses and that only the solution has set."""
    missing: set[str] = set()
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse(text_of(cell))
        bound = {name for node in tree.body for name in _bound(node)}
        if "solution" in read.tags_of(cell):
            missing |= bound
            continue
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        yield from sorted({node.id for node in names} & missing - bound)
        missing -= bound


def _bound(node: ast.stmt) -> Iterator[str]:
    """The names that one statement at the top of a cell sets."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    else:
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


# the instructor's copy -----------------------------------------------------------------------------------------------

def instructor_copy(notebook: dict, number: str, name: str) -> dict:
    """With all outputs, open solutions, and a note before each prediction and each exercise."""
    asked: dict[int, list[read.Prediction]] = {}
    for prediction in read.predictions_of(notebook, name):
        asked.setdefault(prediction.asked, []).append(prediction)
    wrong, cells = answers.wrong_answers(number), []
    for place, cell in enumerate(notebook["cells"]):
        notes = [prediction_note(notebook, number, each) for each in asked.get(place, [])]
        if "exercise" in read.tags_of(cell):
            notes += [exercise_note(key, find(key), wrong.get(key, [])) for key in read.calls(cell, "check")]
        cells += [text_cell(note, f"note-{place}-{i}") for i, note in enumerate(notes)]
        cell = copy.deepcopy(cell)
        if "solution" in read.tags_of(cell):
            cell["metadata"].pop("jupyter", None)
        cells.append(cell)
    cells.insert(1, text_cell(time_note(notebook, number, asked), "note-times"))
    return new_notebook(notebook, cells, "instructor")


def prediction_note(notebook: dict, number: str, prediction: read.Prediction) -> str:
    """The recorded answer with its sentence, and the wrong choices that tempt."""
    recorded = answers.recorded_answers(notebook, number, prediction)
    lines = [f"**Instructor: prediction `{prediction.key}`**"]
    lines += [f"Recorded ({each.source}): **{escaped(each.option)}**. {escaped(each.sentence)}" for each in recorded]
    if not recorded and (sentence := answers.sentence_of(notebook, prediction)):
        lines.append(f"The notebook's sentence: {escaped(sentence)}")
    if shown := answers.shown_output(notebook, prediction):
        lines.append("The output that answers it, as stored:")
        lines.append("\n".join(["```", *(line for text in shown for line in text.splitlines()), "```"]))
    right = {each.option for each in recorded}
    tempts = {choice: why for choice, why in read.tempting(number, prediction.key).items() if choice not in right}
    if tempts:
        lines.append("Predictions that tempt, and why:")
        lines.append("\n".join(f"- **{escaped(choice)}**: {escaped(why)}" for choice, why in tempts.items()))
    return quoted(lines)


def exercise_note(key: str, check: Check, wrong: list[tuple[str, str]]) -> str:
    """Level, minutes, hint, and the wrong answers that the check knows."""
    effort = f"{check.level}, about {check.minutes} minutes"
    lines = [f"**Instructor: exercise {key}**, {effort}. Hint: {escaped(check.hint)}"]
    if wrong:
        lines.append("Wrong answers that the check knows, and what it says to them:")
        lines.append("\n".join(f"- `{code}`: {escaped(said)}" for code, said in wrong))
    return quoted(lines)


def time_note(notebook: dict, number: str, asked: dict) -> str:
    """Minutes and GB by scale from the header, seconds of the shipped runs, slow cells if the notebook has times."""
    header, runs = header_of(notebook), read.measured(number)
    table = ["| scale | minutes to plan | GB | measured |", "|---|---|---|---|"]
    for scale, minutes in header.minutes.items():
        took = "; ".join(f"{seconds:.0f} s on {escaped(device)}" for seconds, device in runs.get(scale, []))
        table.append(f"| {scale} | {shown(minutes)} | {shown(header.gigabytes.get(scale))} | {took or 'not run yet'} |")
    checks = [find(key) for cell in notebook["cells"] if "exercise" in read.tags_of(cell)
              for key in read.calls(cell, "check")]
    lines = ["**Instructor's copy.** All outputs are kept and the solutions are open. Do not hand it out.",
             f"{sum(map(len, asked.values()))} predictions; {len(checks)} exercises, "
             f"{sum(check.minutes for check in checks)} minutes together.", "\n".join(table)]
    if slow := read.slow_cells(notebook)[:5]:
        lines.append("Slowest cells: " + ", ".join(f"code cell {cell} {seconds:.0f} s" for cell, seconds in slow) + ".")
    return quoted(lines)


# what both are made of -----------------------------------------------------------------------------------------------

def shown(value: float | None) -> str:
    return "not run yet" if value is None else f"{value:g}"


def escaped(text: str) -> str:
    """Text that markdown shows as it is, in a line of its own or in a table."""
    return re.sub(r"([\\*_$`<>|~])", r"\\\1", " ".join(text.split()))


def quoted(paragraphs: list[str]) -> str:
    """Paragraphs as one quotation, which sets a note apart from the lab's own text."""
    return "\n>\n".join("> " + paragraph.replace("\n", "\n> ") for paragraph in paragraphs)


def text_cell(source: str, name: str) -> dict:
    return {"cell_type": "markdown", "id": name, "metadata": {"tags": ["handout"]}, "source": source}


def new_notebook(notebook: dict, cells: list[dict], kind: str) -> dict:
    """These cells with the kernel of the old notebook; states of widgets are left behind."""
    kept = {name: value for name, value in notebook["metadata"].items() if name in ("kernelspec", "language_info")}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": kept | {"labkit": {"copy": kind}}, "cells": cells}
