"""What a teacher needs from a lab's notebook: its predictions with their choices, its exercises, its measured times.

Question and choices are read from the stored output of the prediction's cell, since some choices are computed there.
"""

import datetime
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from labkit.course import record
from labkit.course.header import text_of
from labkit.course.results import read_result
from labkit.errors import LabError

TEACHING = Path(__file__).with_name("teaching.toml")
ASKED = "Predict before you run on: "  # how labkit.course.predict begins the stored text of a question


@dataclass(frozen=True)
class Prediction:
    """One question: the cells (by place) that ask it and that reveal its answer."""

    key: str
    question: str
    options: list[str]
    asked: int
    revealed: int | None


def tags_of(cell: dict) -> list[str]:
    """The tags of a cell."""
    return cell.get("metadata", {}).get("tags", [])


def stored_texts(cell: dict) -> list[str]:
    """The outputs of a cell as text: prints, tables in plain text, alternative texts of pictures."""
    outputs = cell.get("outputs", [])
    texts = ["".join(each.get("text") or each.get("data", {}).get("text/plain", "")) for each in outputs]
    return [text.strip() for text in texts if text.strip()]


def calls(cell: dict, method: str) -> list[str]:
    """First arguments of `lab.<method>("...")` in a code cell."""
    if cell["cell_type"] != "code":
        return []
    return re.findall(rf"\blab\.{method}\(\s*[\"']([^\"']+)", text_of(cell))


def predictions_of(notebook: dict, name: str) -> list[Prediction]:
    """Every prediction of a lab; LabError where a question is not stored in its cell's output."""
    cells = notebook["cells"]
    reveals = {key: place for place, cell in enumerate(cells) for key in calls(cell, "reveal")}
    found = []
    for place, cell in enumerate(cells):
        keys = calls(cell, "predict")
        stored = [text.removeprefix(ASKED) for text in stored_texts(cell) if text.startswith(ASKED)]
        if len(keys) != len(stored):
            raise LabError(f"{name} does not store the question of its prediction {' and '.join(keys)}.",
                           f"Run it without a window: labkit run {name[:2]} --scale quick --save")
        for key, text in zip(keys, stored, strict=True):
            question, *options = text.split("\n- ")
            found.append(Prediction(key, question, options, place, reveals.get(key)))
    return found


def tempting(number: str, key: str) -> dict[str, str]:
    """Choice → why it tempts, for one prediction; empty where nobody has written it down."""
    return tomllib.loads(TEACHING.read_text(encoding="utf-8")).get(number, {}).get(key, {})


def measured(number: str) -> dict[str, list[tuple[float, str]]]:
    """Scale → (seconds, device) of each shipped run."""
    results = {scale: [read_result(path) for path in paths] for scale, paths in record.measured_at(number).items()}
    return {scale: [(each["seconds"], each["device"]) for each in runs] for scale, runs in results.items()}


def slow_cells(notebook: dict, least: float = 1.0) -> list[tuple[int, float]]:
    """(number among the code cells, seconds) of cells that took `least` or more, longest first, if times are stored.

    JupyterLab stores the times where its setting `recordTiming` is on; `labkit run --save` leaves them out.
    """
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    took = [(number, _seconds(cell["metadata"].get("execution", {}))) for number, cell in enumerate(code, start=1)]
    return sorted([each for each in took if each[1] >= least], key=lambda each: -each[1])


def _seconds(times: dict) -> float:
    ends = [times.get(name) for name in ("iopub.execute_input", "shell.execute_reply")]
    if None in ends:
        return 0.0
    start, end = (datetime.datetime.fromisoformat(text.replace("Z", "+00:00")) for text in ends)
    return (end - start).total_seconds()
