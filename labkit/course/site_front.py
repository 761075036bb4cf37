"""The site's front page: the top of README, with its picture, then the map of the course with each lab's verdicts."""

import html
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.course.claims import VERDICTS
from labkit.course.scoreboard import counted_verdicts, without_superseded
from labkit.course.site_map import LEDGER, TEACHING, Lab, by_part
from labkit.errors import LabError
from labkit.files import REPOSITORY

README, MAP = REPOSITORY / "README.md", "\n## The course\n"
ABOUT = f"""All claims in one table: [the whole ledger]({LEDGER}.md). Plans for a workshop: [teaching]({TEACHING}.md).
To run anything of it, you need the repository: these pages show what is stored in it.
"""
TREE = "```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def front_page(rows: Sequence[Mapping], labs: Sequence[Lab], pictures: Path) -> str:
    """The page as MyST markdown; README's pictures are copied into the folder `pictures`."""
    parts = by_part(list(labs))
    maps = "\n".join(f"### {part}\n\n" + "\n".join(entry(lab, rows) for lab in found) for part, found in parts.items())
    trees = [TREE.format(caption=part, pages="\n".join(lab.page for lab in found)) for part, found in parts.items()]
    trees += [TREE.format(caption="Results", pages=LEDGER), TREE.format(caption="Teaching", pages=TEACHING)]
    return "\n".join([with_pictures(readme_top(), pictures), "## The course\n", ABOUT, maps, *trees])


def readme_top(path: Path = README) -> str:
    """README up to its map of the course."""
    text = path.read_text(encoding="utf-8")
    if MAP not in text:
        raise LabError(f"{path} has no section 'The course'.", "The site's front page ends where that section begins.")
    return text[: text.index(MAP)]


def with_pictures(markdown: str, pictures: Path) -> str:
    """The text with the repository's pictures copied beside the page, and its links to other files as plain names."""
    def beside(found: re.Match) -> str:
        if not (REPOSITORY / found[2]).is_file():
            raise LabError(f"README shows {found[2]}, which is not there.", "Make it again: labkit claims --readme")
        pictures.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / found[2], pictures / Path(found[2]).name)
        return f"![{found[1]}]({pictures.name}/{Path(found[2]).name})"

    markdown = re.sub(r"!\[([^\]]*)\]\((?!https:)([^)]+)\)", beside, markdown)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https:|#)[^)]+\)", r"\1", markdown)


def entry(lab: Lab, rows: Sequence[Mapping]) -> str:
    """A lab on the map: its title, its question, its minutes, its verdicts."""
    own = without_superseded([row for row in rows if row["notebook"] == lab.number])
    minutes = ", ".join(f"{scale} {minutes:g} min" for scale, minutes in lab.header.minutes.items() if minutes)
    return (f"**[{lab.header.title}]({lab.path.name})**\n\n{lab.header.question}\n\n{bar_html(own)}\n\n"
            f"[{counted_verdicts(own) or 'no claims'}]({lab.results}.md). Time: {minutes}.\n")


def bar_html(rows: Sequence[Mapping]) -> str:
    """The shares of the verdicts as a bar; the line of words below says the same."""
    counts = Counter(row["verdict"] for row in rows)
    parts = "".join(f'<span class="{html.escape(verdict.replace(" ", "-"))}" style="flex:{counts[verdict]}"></span>'
                    for verdict in VERDICTS if counts[verdict])
    return f'<div class="bar" aria-hidden="true">{parts}</div>'
