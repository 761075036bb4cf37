"""The prose of a notebook or a page: what its markdown says once code, formulas and addresses are taken out.

    python -m labkit.course.prose notebooks/ README.md       # what `make lint` checks: numbers, links, spelling

Three gates for text that nobody executes: each number must have a source (prose_numbers.py), each link must lead
somewhere (prose_links.py), and no word may be on codespell's list of misspellings.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from labkit.course.gate import run_gate
from labkit.course.header import read_notebook, text_of

NOT_PROSE = [re.compile(pattern, re.DOTALL) for pattern in (
    r"```.*?```", r"`[^`\n]*`", r"\$\$.*?\$\$", r"\$[^$]*\$", r"(?<=\])\([^)]*\)", r"<[^>]*>", r"https?://\S+")]


def markdown_of(path: Path) -> str:
    """All markdown of a notebook, cells apart by a blank line; of a page, all of it."""
    if Path(path).suffix != ".ipynb":
        return Path(path).read_text(encoding="utf-8")
    return "\n\n".join(text_of(cell) for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown")


def plain_text(markdown: str) -> str:
    """Markdown without code, formulas, tags and addresses."""
    for pattern in NOT_PROSE:
        markdown = pattern.sub(" ", markdown)
    return markdown


def misspelled(path: Path) -> Iterator[str]:
    """codespell's findings in the prose of one file."""
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare", "-"]
    found = subprocess.run(command, input=plain_text(markdown_of(path)), capture_output=True, text=True)
    for line in found.stdout.splitlines():
        if " ==> " in line:
            yield f"may misspell a word: {line.split(':', 1)[-1].strip()}"


def problems_of(path: Path) -> list[str]:
    """What the three gates say of one file."""
    from labkit.course import prose_links, prose_numbers

    gates = (misspelled, prose_links.broken, prose_numbers.unexplained)
    return [f"{path.name}: {problem}" for gate in gates for problem in gate(path)]


def main(arguments: list[str]) -> int:
    """Check files and folders of notebooks and pages; prints what is wrong and returns the exit status."""
    return run_gate(arguments, problems_of, "The prose of {files} files", endings=("*.ipynb", "*.md"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
