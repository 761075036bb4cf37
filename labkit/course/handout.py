"""`labkit handout`: three files a lab from its committed notebook, all of them written or none.

    NN_name.learner.ipynb     no solutions, no outputs; predictions and exercises as they are
    NN_name.instructor.ipynb  outputs, open solutions, notes before each prediction and exercise
    NN_name.slides.html       slides in one file that needs no network

handout.json beside them holds the sha256 of each file. So a file in which somebody has worked is never overwritten,
and a folder that holds anything else is left alone.
"""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from labkit import progress
from labkit.course import header as headers
from labkit.course import notebook_lint
from labkit.course.handout_copies import instructor_copy, learner_copy
from labkit.course.handout_read import predictions_of, tags_of
from labkit.course.handout_slides import slides_page
from labkit.errors import LabError
from labkit.files import sha256, write_json

INDEX = "handout.json"


def make_handouts(notebooks: Sequence[str], folder: Path) -> list[dict]:
    """Write the files of these labs ("02", ...; none named: all) into `folder`; returns a summary of each lab.

    Raises LabError for an unknown lab, a notebook without outputs, and a folder that holds anything that this command
    did not write; then no file is touched.
    """
    paths = [headers.find_notebook(number) for number in dict.fromkeys(notebooks)]
    paths = paths or headers.labs()
    folder = Path(folder)
    kept = files_made_before(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as fresh, \
            progress.bar(len(paths), "handouts", unit="lab") as bar:
        labs = []
        for path in paths:
            bar.set_postfix_str(path.stem)
            labs.append(write_lab(path, Path(fresh)))
            bar.update()
        made = {file.name: sha256(file) for file in sorted(Path(fresh).iterdir())}
        folder.mkdir(exist_ok=True)
        for name in made:
            os.replace(Path(fresh) / name, folder / name)
    write_json(folder / INDEX, dict(sorted((kept | made).items())))
    return [lab | {kind: str(folder / lab[kind]) for kind in ("learner", "instructor", "slides")} for lab in labs]


def files_made_before(folder: Path) -> dict[str, str]:
    """Name → sha256 of the handouts in a folder; LabError if it holds anything else or a file that was changed."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    elsewhere = "Name another folder with --out, or move it away."
    try:
        made = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LabError(f"{folder} exists and was not made by labkit handout.", elsewhere) from None
    for file in sorted(folder.iterdir()):
        if file.name not in (*made, INDEX, ".ipynb_checkpoints"):
            raise LabError(f"{folder} also holds {file.name}, which labkit handout did not make.", elsewhere)
        if file.name in made and sha256(file) != made[file.name]:
            raise LabError(f"{file} was changed since it was made; perhaps somebody has worked in it.", elsewhere)
    return made


def write_lab(path: Path, folder: Path) -> dict:
    """Make the three files of one lab in `folder`; returns its summary."""
    notebook, number, name = headers.read_notebook(path), path.name[:2], path.name
    for problem in notebook_lint.order(notebook):
        what = re.split(r" or |;", problem)[0]
        raise LabError(f"{name} is not stored with the outputs of a whole run: {what}.",
                       f"Run it first (labkit run {number} --scale quick --save), or name other labs.")
    learner, instructor = learner_copy(notebook, name), instructor_copy(notebook, number, name)
    files = {"learner": f"{path.stem}.learner.ipynb", "instructor": f"{path.stem}.instructor.ipynb",
             "slides": f"{path.stem}.slides.html"}
    write_notebook(folder / files["learner"], learner)
    write_notebook(folder / files["instructor"], instructor)
    (folder / files["slides"]).write_text(slides_page(notebook, name), encoding="utf-8")
    header = headers.header_of(notebook)
    return {"notebook": number, "title": header.title, "minutes": header.minutes,
            "predictions": len(predictions_of(notebook, name)),
            "exercises": sum("exercise" in tags_of(cell) for cell in notebook["cells"]),
            "solutions_removed": sum("solution" in tags_of(cell) for cell in notebook["cells"]), **files}


def write_notebook(path: Path, notebook: dict) -> None:
    """A notebook as Jupyter writes it; nbformat says no to one that is not valid."""
    import nbformat

    node = nbformat.from_dict(notebook)
    nbformat.validate(node)
    nbformat.write(node, path)
