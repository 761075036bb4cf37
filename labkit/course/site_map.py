"""Which pages the site has: the labs in their parts, and for each lab its notebook's page and its page of results.

The order here is the order of the sidebar and of "previous" and "next".
"""

from dataclasses import dataclass
from pathlib import Path

from labkit.course.header import NOTEBOOKS, Header, header_of, labs, read_notebook
from labkit.errors import LabError

PARTS = {
    "Start": ("00", "01"),
    "Pre-training": ("02", "03", "04", "05", "06"),
    "Reinforcement learning": ("07", "08"),
    "Distillation": ("09", "10", "11", "12", "13"),
    "Agents and self-play": ("14", "15"),
    "The whole": ("16",),
}
FRONT, LEDGER, TEACHING = "index", "ledger", "teaching"


@dataclass(frozen=True)
class Lab:
    """One lab: its number, where its notebook is, the notebook itself, and what its first cell says."""

    number: str
    path: Path
    notebook: dict
    header: Header

    @property
    def page(self) -> str:
        return self.path.stem

    @property
    def results(self) -> str:
        return f"results_{self.number}"

    @property
    def short_title(self) -> str:
        """'02 · Token superposition': the title up to its colon."""
        return self.header.title.split(":")[0]


def read_labs(folder: Path = NOTEBOOKS) -> list[Lab]:
    """The labs of a folder, by number. LabError where there is none, or where one stands in no part."""
    paths = labs(Path(folder))
    if not paths:
        raise LabError(f"There are no notebooks in {folder}.", "Call `make site` in the repository's own folder.")
    placed = {number for numbers in PARTS.values() for number in numbers}
    for path in paths:
        if path.name[:2] not in placed:
            raise LabError(f"{path.name} stands in no part of the site.", "Add it to PARTS in site_map.py.")
    return [Lab(path.name[:2], path, notebook := read_notebook(path), header_of(notebook)) for path in paths]


def by_part(labs: list[Lab]) -> dict[str, list[Lab]]:
    """Part → its labs, without parts that have none."""
    parts = {part: [lab for lab in labs if lab.number in numbers] for part, numbers in PARTS.items()}
    return {part: found for part, found in parts.items() if found}
