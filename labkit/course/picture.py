"""README's picture: a figure of an executed notebook, taken over byte for byte with its alternative text.

So the picture can't differ from what the notebook shows; tests/test_scoreboard.py holds the two together.
"""

import base64

from labkit.course.header import find_notebook, read_notebook
from labkit.course.scoreboard import between_marks
from labkit.errors import LabError
from labkit.files import DATA, REPOSITORY, whole_file

BEGIN, END = "<!-- picture:begin -->", "<!-- picture:end -->"
SHOWN = ("16", "Bars of verdicts by source")  # the notebook, and words of the alternative text of its figure
CAPTION = "What became of the claims, by the source they come from (a figure of lab 16)."
README = REPOSITORY / "README.md"
FILE = DATA / "results" / "pictures" / "scoreboard.png"


def chosen_figure() -> tuple[bytes, str]:
    """The PNG and the alternative text of the figure that README shows."""
    number, words = SHOWN
    for cell in read_notebook(find_notebook(number))["cells"]:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if words in alt:
                return base64.b64decode(output["data"]["image/png"]), alt
    raise LabError(f"Notebook {number} holds no figure whose text says {words!r}.",
                   f"Run it: labkit run {number} --scale quick --save")


def with_picture(readme: str, alt: str) -> str:
    """README's text with the picture between its marks."""
    link = f"![{alt}]({FILE.relative_to(REPOSITORY).as_posix()})\n"
    return between_marks(readme, BEGIN, END, f"{link}\n*{CAPTION}*", README)


def update_picture() -> None:
    """Write the picture's file and README's link to it."""
    png, alt = chosen_figure()
    with whole_file(FILE) as temporary:
        temporary.write_bytes(png)
    text = with_picture(README.read_text(encoding="utf-8"), alt)
    with whole_file(README) as temporary:
        temporary.write_text(text, encoding="utf-8")
