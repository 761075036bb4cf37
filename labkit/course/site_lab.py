"""A lab's page: its stored notebook, made to be read. Nothing is executed.

What a learner should think about first is behind a click: the answers of predictions, hints, solutions, and the code
that only draws. Pictures become files with their alternative text, shown as wide as in the notebook, and a click
opens them at full size. Numbers of arXiv become links.
"""

import base64
import copy
import html
import re
from pathlib import Path

from labkit.course import check
from labkit.course.handout_answers import recorded_answers
from labkit.course.handout_read import Prediction, calls, predictions_of, tags_of
from labkit.course.header import text_of
from labkit.course.site_map import LEDGER, Lab
from labkit.errors import LabError

FIGURES = "figures"  # where the site keeps the pictures, relative to its pages
ARXIV = re.compile(r"(?<=arXiv )\d{4}\.\d{5}|(?<=\()\d{4}\.\d{5}(?=[,)])")
NOTE = ("*This page shows the stored quick run. Choose your prediction before you open what was measured. "
        "To run the lab yourself: `make lab`. There are also its [results at every scale]({results}.md), with the "
        "rules behind its verdicts, and the [whole ledger]({ledger}.md).*")


def lab_page(lab: Lab, figures: Path) -> dict:
    """The notebook that the site shows for a lab; its pictures are written into the folder `figures`."""
    predictions = predictions_of(lab.notebook, lab.path.name)
    telling = {telling_cell(lab.notebook, each) for each in predictions}
    cells = []
    for place, cell in enumerate(copy.deepcopy(lab.notebook["cells"])):
        if cell["cell_type"] == "code":
            cell["outputs"] = [shown_output(output, figure_name(lab, place, number), figures)
                               for number, output in enumerate(cell["outputs"])]
            asked = [question_html(lab.number, each) for each in predictions if each.asked == place]
            told = [answer_html(lab, each) for each in predictions if each.revealed == place]
            cells += code_cells(cell, asked, place in telling) + [text_cell(answer) for answer in told if answer]
        else:
            cells.append(text_cell(with_arxiv_links(text_of(cell))))
    note = text_cell(NOTE.format(results=lab.results, ledger=LEDGER))
    cells = [cell | {"id": f"page-{place}"} for place, cell in enumerate([cells[0], note, *cells[1:]])]
    return {**lab.notebook, "cells": cells}


# code cells ----------------------------------------------------------------------------------------------------------

def code_cells(cell: dict, asked: list[str], tells: bool) -> list[dict]:
    """A code cell as the page shows it. `asked`: the questions that stand in its place; `tells`: it shows an answer."""
    tags = tags_of(cell)
    if asked:
        return [text_cell(question) for question in asked]
    if "solution" in tags:
        return [tagged(cell, "hide-cell", show="Show the solution", hide="Hide the solution")]
    if "exercise" in tags:
        return [cell | {"outputs": []}, *hints_of(cell)]  # the output says "not answered yet"
    hidden = cell["metadata"].get("jupyter", {}).get("source_hidden")
    code = tagged(cell | {"outputs": []}, *["hide-input"] * bool(hidden), show="Show the code", hide="Hide the code")
    shown = tagged(cell, "remove-input", *["hide-output"] * tells, show="Show what was measured", hide="Hide it again")
    return [code, shown] if cell["outputs"] else [code]


def tagged(cell: dict, *tags: str, show: str, hide: str) -> dict:
    """The cell with tags by which MyST-NB folds it or leaves a part out, and with the words on the fold."""
    prompts = {"code_prompt_show": show, "code_prompt_hide": hide}
    return cell | {"metadata": cell["metadata"] | {"tags": [*tags_of(cell), *tags], "mystnb": prompts}}


def hints_of(cell: dict) -> list[dict]:
    """The hints of the exercises that a cell checks, each behind a click."""
    names = re.findall(r"lab\.check\(\s*[\"']([^\"']+)", text_of(cell))
    return [text_cell(fold_html("Show a hint", f"<p>{html.escape(check.find(name).hint)}</p>")) for name in names]


# predictions ---------------------------------------------------------------------------------------------------------

def question_html(number: str, asked: Prediction) -> str:
    """The question with its choices to tick; site.js says later whether the ticked one was measured."""
    name = html.escape(f"{number}.{asked.key}")
    choices = "".join(f'<label><input type="radio" name="{name}" value="{html.escape(option)}"> {html.escape(option)}'
                      "</label>" for option in asked.options)
    words = html.escape(" ".join(asked.question.split()))
    return (f'<fieldset class="prediction"><legend>Predict before you read on</legend><p>{words}</p>{choices}'
            "</fieldset>")


def telling_cell(notebook: dict, asked: Prediction) -> int | None:
    """The place of the output that tells the answer: the last one between the question and its reveal."""
    places = range(asked.asked + 1, (asked.revealed or asked.asked) + 1)
    shown = [place for place in places if notebook["cells"][place].get("outputs")]
    return max((place for place in shown if not calls(notebook["cells"][place], "predict")), default=None)


def answer_html(lab: Lab, revealed: Prediction) -> str:
    """The recorded answer of the fullest run, behind a click; empty where only the output tells it."""
    answers = recorded_answers(lab.notebook, lab.number, revealed)
    if not answers:
        return ""
    answer = answers[-1]
    whence = f"the {answer.source} run" if " " not in answer.source else answer.source
    words = (f'<p>By {whence}: <b class="answer">{html.escape(answer.option)}</b>. {html.escape(answer.sentence)}</p>'
             '<p class="said" role="status"></p>')
    return fold_html("Compare your prediction", words, f"{lab.number}.{revealed.key}")


def fold_html(summary: str, inside: str, prediction: str = "") -> str:
    """A fold of the page; one of a prediction carries its name."""
    name = f' data-prediction="{html.escape(prediction)}"' if prediction else ""
    return f'<details class="fold"{name}><summary>{summary}</summary>{inside}</details>'


# text and pictures ---------------------------------------------------------------------------------------------------

def text_cell(markdown: str) -> dict:
    """A markdown cell."""
    return {"cell_type": "markdown", "metadata": {}, "source": markdown}


def with_arxiv_links(markdown: str) -> str:
    """'arXiv 2605.06546' with its number as a link."""
    return ARXIV.sub(lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[0]})", markdown)


def shown_output(output: dict, name: str, figures: Path) -> dict:
    """An output as it is, or, for a picture, the HTML that shows its file."""
    if "image/png" not in output.get("data", {}):
        return output
    about = output.get("metadata", {}).get("image/png", {})
    if not about.get("alt"):
        raise LabError(f"The picture {name} has no alternative text.", "Show it by lab.show(figure, alt).")
    picture = base64.b64decode("".join(output["data"]["image/png"]))
    figures.mkdir(parents=True, exist_ok=True)
    (figures / f"{name}.png").write_bytes(picture)
    return {**output, "data": {"text/html": picture_html(picture, name, about)}, "metadata": {}}


def figure_name(lab: Lab, place: int, number: int) -> str:
    """What the site calls output `number` of the cell at `place`."""
    return f"{lab.number}-{place}-{number}"


def figure_file(name: str) -> str:
    """Where a picture lies, relative to the pages."""
    return f"{FIGURES}/{name}.png"


def picture_html(picture: bytes, name: str, about: dict) -> str:
    """An <img> of a PNG that keeps its room before it is loaded, inside a link to the file."""
    wide, high = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))  # PNG: the header's sizes
    width = int(about.get("width", wide))
    file = figure_file(name)
    return (f'<a class="figure" href="{file}"><img src="{file}" alt="{html.escape(about["alt"])}" width="{width}" '
            f'height="{round(width * high / wide)}" loading="lazy"></a>')
