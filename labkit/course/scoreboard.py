"""The claims ledger as people read it: README's tables between two marks, and the table that `labkit claims` prints.

README's part is generated from claims.toml and data/results (`labkit claims --readme`); tests/test_scoreboard.py fails
where the two differ. A quick row is left out of README wherever a fuller scale has a row of the same claim.
"""

from collections import Counter
from itertools import groupby
from pathlib import Path

from labkit.course.claims import VERDICTS, load_claims
from labkit.course.ledger import claims_table, shown, where
from labkit.course.ledger_views import OWN, source_of
from labkit.errors import LabError
from labkit.files import REPOSITORY, whole_file

BEGIN, END = "<!-- scoreboard:begin -->", "<!-- scoreboard:end -->"
HEAD = "| claim | paper | ours (95% interval) | scale | verdict |\n|---|---|---|---|---|"
COLOURS = {"reproduced": "green", "partly": "yellow", "not reproduced": "red", "inconclusive": "magenta"}


def scoreboard_markdown(rows: list[dict]) -> str:
    """A line of counts, then one folded table a notebook whose summary counts its verdicts."""
    rows = sorted(without_superseded(rows), key=lambda row: row["notebook"])
    notebooks = groupby(rows, key=lambda row: row["notebook"])
    tables = [_folded_table(notebook, list(group)) for notebook, group in notebooks]
    return "\n\n".join([summary(rows), legend(rows), *tables])


def legend(rows: list[dict]) -> str:
    """How to read the tables, with the counts that a reader should know before trusting them."""
    exact = sum(row["kind"] == "exact" and row["verdict"] == "reproduced" for row in rows)
    own, ids = sum(source_of(row) == OWN for row in rows), {row["id"] for row in rows}
    claims = [claim for claim in load_claims().values() if claim.id in ids]
    changed = sum(bool(claim.changes) for claim in claims)
    return (f"*Measured* rows have an interval over seeds; *exact* ones are identities, counts and arithmetic on "
            f"printed numbers: {exact} of the reproduced. *Partly*: the interval lies in a second, named region. "
            f"*Inconclusive*: it crosses a border. \"Paper\" is its number as we saw it; `source` in "
            f"`labkit/course/claims.toml` says whether in the text or in a reader's note. {own} rows are predictions "
            f"of our own. Rules are written before the run; where a row changed later ({changed} of {len(claims)}, "
            f"many in wording only), it keeps date and reason in `changes`.")


def _folded_table(notebook: str, rows: list[dict]) -> str:
    lines = "\n".join(_line(row) for row in rows)
    return (f"<details>\n<summary><b>{title(notebook)}</b>: {counted_verdicts(rows)}</summary>\n\n"
            f"{HEAD}\n{lines}\n\n</details>")


def without_superseded(rows: list[dict]) -> list[dict]:
    """The rows without those of quick runs whose claim has a row of a fuller scale."""
    fuller = {row["id"] for row in rows if row["scale"] in ("desk", "workstation")}
    return [row for row in rows if row["scale"] != "quick" or row["id"] not in fuller]


def summary(rows: list[dict]) -> str:
    """'51 claims in 60 rows (one a claim, scale and device): 30 reproduced, ...': every verdict is counted."""
    claims = len({row["id"] for row in rows})
    apart = "" if claims == len(rows) else f" in {len(rows)} rows (one a claim, scale and device)"
    return f"{claims} claims{apart}: {counted_verdicts(rows) or 'nothing yet'}."


def counted_verdicts(rows: list[dict]) -> str:
    """'3 reproduced, 1 inconclusive', in the order of the verdicts."""
    counts = Counter(row["verdict"] for row in rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def title(notebook: str) -> str:
    """'02 token superposition', from the notebook's file name."""
    files = sorted((REPOSITORY / "notebooks").glob(f"{notebook}_*.ipynb"))
    return f"{notebook} {files[0].stem[3:].replace('_', ' ')}" if files else f"Notebook {notebook}"


def _line(row: dict) -> str:
    own = "exact: " if row["kind"] == "exact" and row["estimate"] is not None else ""
    cells = (row["statement"], row["paper_value"], own + shown(row), where(row), row["verdict"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def update_readme(path: Path | None = None, results_folder: Path | None = None) -> bool:
    """Write the generated scoreboard between README's marks; True if it changed. Raises LabError without marks."""
    path = Path(path or REPOSITORY / "README.md")
    text = path.read_text(encoding="utf-8")
    new = with_scoreboard(text, scoreboard_markdown(claims_table(results_folder)), path)
    if new != text:
        with whole_file(path) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return new != text


def with_scoreboard(text: str, board: str, path: Path) -> str:
    """README's text with `board` between the two marks, each of which must stand there once, in order."""
    return between_marks(text, BEGIN, END, board, path)


def between_marks(text: str, begin: str, end: str, content: str, path: Path) -> str:
    """`text` with `content` between two marks. Raises LabError unless each stands there once, in order."""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise LabError(f"{path} does not hold its two marks once each.", f"Put {begin} and {end} there.")
    return f"{text[: text.index(begin)]}{begin}\n{content}\n{text[text.index(end) :]}"


def print_table(rows: list[dict]) -> None:
    """Rows of `claims_table` in the terminal, as wide as the terminal is; piped, each row keeps one line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=summary(without_superseded(rows)), header_style="bold")
    for column in ("id", "claim", "paper", "ours (95% interval)", "scale", "verdict"):
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    for row in rows:
        colour = COLOURS.get(row["verdict"], "dim")
        cells = [_escaped(row[key]) for key in ("id", "statement", "paper_value")]
        table.add_row(*cells, _escaped(shown(row)), row["scale"], f"[{colour}]{row['verdict']}[/{colour}]")
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a pipe has no width; folding at 80 columns would hide the numbers
    console.print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape  # "[0.1, 0.2]" is an interval and no markup

    return escape(text)
