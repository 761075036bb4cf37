"""A good small lab, and for each rule of the guard and the lint a notebook with just that one defect.

Notebooks are built, not stored, so that a defect stands beside its name and nothing else differs.
"""

import copy
import json
from pathlib import Path

HEADER = """# A lab
**The question.** Does it hold?

| scale | minutes | GB |
|---|---|---|
| quick (CPU) | 0.5 | 0.6 |
| desk (CPU) | not run yet | not run yet |
| workstation (one GPU) | not run yet | not run yet |
"""
PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "text/plain": "A rising line."},
           "metadata": {"image/png": {"alt": "A rising line.", "width": 760}}}
CELLS = [
    ('from labkit.course import Lab\nlab = Lab("98")', [], []),
    ("settings = lab.settings(steps=(1, 2, 3))", ["settings"], []),
    ('lab.predict("who", "Who wins?", ["A", "B"], default="A")', ["prediction"], []),
    ('lab.show(figure, "A rising line.")', ["figure"], [PICTURE]),
    ('lab.reveal("who", "A")', [], []),
    ('lab.check("98.1", ...)', ["exercise"], []),
    ('lab.solution("98.1", 3)', ["solution"], []),
    ("lab.ledger()", [], []),
]


def notebook(*cells: dict) -> dict:
    """A notebook file of these cells."""
    return {"nbformat": 4, "nbformat_minor": 5, "cells": list(cells),
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}}


def text(source: str) -> dict:
    return {"cell_type": "markdown", "id": "text", "metadata": {}, "source": source}


def code(source: str, count: int | None, tags: list[str] | None = None, outputs: list[dict] | None = None) -> dict:
    metadata = {"tags": tags} if tags else {}
    if tags and "solution" in tags:
        metadata["jupyter"] = {"source_hidden": True}
    return {"cell_type": "code", "id": f"cell-{count}", "metadata": metadata, "source": source,
            "execution_count": count, "outputs": outputs or []}


def good() -> dict:
    """A lab in which the lint finds nothing."""
    return notebook(text(HEADER), *[code(source, i, list(tags), copy.deepcopy(outputs))
                                    for i, (source, tags, outputs) in enumerate(CELLS, start=1)])


def plain(*sources: str) -> dict:
    """An executed notebook of just these code cells, to be run by nbval."""
    return notebook(*[code(source, i) for i, source in enumerate(sources, start=1)])


def write(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _source(index: int, source: str):
    return lambda cells: cells[index].update(source=source)


def _output(index: int, output: dict):
    return lambda cells: cells[index]["outputs"].append(output)


def _stream(name: str, words: str) -> dict:
    return {"output_type": "stream", "name": name, "text": words}


def _data(kind: str, content: str) -> dict:
    return {"output_type": "display_data", "data": {kind: content}, "metadata": {}}


def _picture(cells: list[dict]) -> dict:
    return cells[4]["outputs"][0]


ERROR = {"output_type": "error", "ename": "E", "evalue": "x", "traceback": []}
SETTINGS = CELLS[1][0]
BAD = {  # defect: (change to the good lab's cells, part of the sentence that must name it)
    "cleared output": (lambda cells: cells[4].update(execution_count=None, outputs=[]), "was not executed"),
    "run out of order": (lambda cells: cells[3].update(execution_count=9), "executed as number 9"),
    "unknown magic": (_source(2, f"%matplotlib inlin\n{SETTINGS}"), "not plain Python"),
    "shell command": (_source(2, f"!pip install x\n{SETTINGS}"), "not plain Python"),
    "cell magic": (_source(2, f"%%capture\n{SETTINGS}"), "not plain Python"),
    "clear_output": (_source(2, f"{SETTINGS}; clear_output()"), "uses clear_output"),
    "misspelt marker": (_source(2, f"# NBVAL_IGNORE_OUTPUTS\n{SETTINGS}"), "marker that nbval does not"),
    "swapped letters": (_source(2, f"# NVBAL_CHECK_OUTPUT\n{SETTINGS}"), "marker that nbval does not"),
    "marker behind code": (_source(2, f"{SETTINGS}  # NBVAL_SKIP"), "marker that nbval does not"),
    "text after marker": (_source(2, f"# NBVAL_SKIP: slow\n{SETTINGS}"), "marker that nbval does not"),
    "lower case marker": (_source(2, f"# nbval-skip\n{SETTINGS}"), "marker that nbval does not"),
    "misspelt tag": (lambda cells: cells[1]["metadata"].update(tags=["nbval_skip"]), "unknown tag 'nbval_skip'"),
    "stored error": (_output(2, ERROR), "stored error"),
    "stderr": (_output(2, _stream("stderr", "UserWarning: old")), "output on stderr"),
    "absolute path": (_output(2, _stream("stdout", "wrote /home/ann/lab/x.json")), "path of this machine"),
    "windows path": (_output(2, _stream("stdout", "wrote C:\\Users\\ann")), "path of this machine"),
    "widget": (_output(2, _data("application/vnd.jupyter.widget-view+json", "{}")), "stores a widget"),
    "missing alt text": (lambda cells: _picture(cells).update(metadata={}), "without alternative"),
    "empty alt text": (lambda cells: _picture(cells)["metadata"]["image/png"].update(alt=" "), "without alternative"),
    "alt is not text/plain": (lambda cells: _picture(cells)["data"].update({"text/plain": "<Figure>"}), "text/plain"),
    "img without alt": (_output(2, _data("text/html", '<img src="x.png">')), "<img> without alternative text"),
    "picture in text": (lambda cells: cells[0].update(source=HEADER + "\n![](x.png)"), "picture without alternative"),
    "no question": (lambda cells: cells[0].update(source=HEADER.replace("The question.", "Hello.")), "its question"),
    "no budget": (lambda cells: cells[0].update(source=HEADER.replace("| desk", "| desktop")), "no row for desk"),
    "minutes over budget": (lambda cells: cells[0].update(source=HEADER.replace("0.5", "0.2")), "0.30 were measured"),
    "minutes far off": (lambda cells: cells[0].update(source=HEADER.replace("0.5", "1.5")), "0.30 were measured"),
    "memory over budget": (lambda cells: cells[0].update(source=HEADER.replace("0.6", "0.4")), "0.50 were measured"),
    "desk never run": (lambda cells: cells[0].update(source=HEADER.replace("not run yet", "7", 1)), "no run is"),
    "no settings": (lambda cells: cells[2]["metadata"].clear(), "tagged `settings`"),
    "no prediction": (lambda cells: cells[3]["metadata"].clear(), "tagged `prediction`"),
    "no exercise": (lambda cells: cells[6]["metadata"].clear(), "tagged `exercise`"),
    "open solution": (lambda cells: cells[7]["metadata"].pop("jupyter"), "not folded"),
    "exercise unsolved": (_source(7, 'lab.solution("98.2", 3)'), "has no lab.solution('98.1'"),
    "no reveal": (_source(5, "pass"), "has no lab.reveal('who'"),
    "no ledger": (_source(8, "pass"), "ledger is not shown"),
}


def bad(name: str) -> tuple[dict, str]:
    """The good lab with one defect, and a part of the sentence that must name it."""
    change, words = BAD[name]
    content = good()
    change(content["cells"])
    return content, words
