"""A notebook's file and its header: title, question, and the table of minutes and gigabytes for each scale.

The first markdown cell of a lab holds a table like this one; a cell says "not run yet" where nobody has measured.

    | scale | minutes | GB |
    |---|---|---|
    | quick (CPU) | 0.9 | 0.6 |
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from labkit.course.scale import SCALES
from labkit.errors import LabError
from labkit.files import REPOSITORY

NOTEBOOKS = REPOSITORY / "notebooks"
_ROW = re.compile(r"^\|\s*(\w+)\b[^|]*\|\s*([^|]*?)\s*\|\s*([^|]*?)\s*\|", re.MULTILINE)


@dataclass(frozen=True)
class Header:
    """What the first markdown cell says. Budgets: scale → (minutes, GB), None where "not run yet" stands."""

    title: str
    question: str
    minutes: dict[str, float | None]
    gigabytes: dict[str, float | None]


def text_of(cell: dict) -> str:
    """A cell's source as one string (the file format also allows a list of lines)."""
    return "".join(cell["source"])


def read_notebook(path: Path) -> dict:
    """A notebook as plain data; read without nbformat, which a bare GPU server does not have."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4 or not isinstance(notebook["cells"], list):
            raise KeyError("nbformat")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise LabError(f"{Path(path).name} can't be read as a notebook ({error}).",
                       f"Restore it: git checkout {Path(path).name}") from None
    return notebook


def labs(folder: Path | None = None) -> list[Path]:
    """The labs' files in order; a copy that lies beside them (02_name-Copy1, 02_name.learner) is none."""
    found = sorted((folder or NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if re.fullmatch(r"\d\d_\w+", path.stem)]


def find_notebook(number: str) -> Path:
    """The file of lab "02" (or "2", or its file name)."""
    known = {path.name[:2]: path for path in labs()}
    wanted = Path(number).name[:2] if "_" in number else number.zfill(2)
    if wanted not in known:
        raise LabError(f"There is no notebook {number!r}.", f"Choose one of: {', '.join(known) or 'none is here'}.")
    return known[wanted]


def header_of(notebook: dict) -> Header:
    """Read the first markdown cell; what is missing there comes back empty."""
    first = next((text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"), "")
    title = re.search(r"^# (.+)$", first, re.MULTILINE)
    question = re.search(r"\*\*(?:The )?question[.:]?\*\*[.:]?\s*(.+?)(?:\n\s*\n|\Z)", first, re.IGNORECASE | re.DOTALL)
    rows = {name: (minutes, gigabytes) for name, minutes, gigabytes in _ROW.findall(first) if name in SCALES}
    return Header(title[1].strip() if title else "", " ".join(question[1].split()) if question else "",
                  {name: _number(row[0]) for name, row in rows.items()},
                  {name: _number(row[1]) for name, row in rows.items()})


def _number(text: str) -> float | None:
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def headings(notebook: dict) -> list[str]:
    """For each cell the last heading above it: what a progress bar says about where it is."""
    found, current = [], ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            titles = re.findall(r"^#{1,6} (.+)$", text_of(cell), re.MULTILINE)
            current = titles[-1].strip() if titles else current
        found.append(current)
    return found
