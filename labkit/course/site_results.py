"""A lab's page of results: every shipped run, every claim with its rule and its seeds, figures, recorded data.

Verdicts and intervals are computed from the rules when the page is built, as everywhere.
"""

import html
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.course.claims import Claim
from labkit.course.handout_answers import recorded_answers
from labkit.course.handout_read import predictions_of
from labkit.course.ledger import shown, where
from labkit.course.record import measured_at
from labkit.course.results import RESULTS, read_result
from labkit.course.scoreboard import counted_verdicts
from labkit.course.site_lab import figure_file, figure_name, fold_html
from labkit.course.site_ledger import anchor, linked_paper, verdict_html
from labkit.course.site_map import Lab
from labkit.files import DATA

TEXT = """# Results of {title}

{counts}. The lab itself: [{title}]({page}.ipynb).

## Runs

{runs}

## Claims

{claims}
{predictions}
## Figures

As the notebook stores them; where a full run is shipped, they show it beside the short one. A click opens one.

{figures}
"""


def results_page(lab: Lab, rows: Sequence[Mapping], claims: Mapping[str, Claim], extra: Path) -> str:
    """The page as MyST markdown; copies of the result files go into `extra`, to be downloaded from it."""
    own = [row for row in rows if row["notebook"] == lab.number]
    return TEXT.format(title=lab.short_title, page=lab.page, counts=counted_verdicts(own) or "No claims",
                       runs=runs_html(lab, extra), claims=claims_html(own, claims),
                       predictions=predictions_html(lab), figures=figures_html(lab, extra))


def table_html(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table of cells that are HTML already; on a narrow screen each row becomes a card with its heads."""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    told = [zip(heads, row, strict=True) for row in rows]
    lines = ["".join(f'<td data-head="{name}">{cell}</td>' for name, cell in row) for row in told]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<table class="cards"><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table>")


# runs ----------------------------------------------------------------------------------------------------------------

def runs_html(lab: Lab, extra: Path) -> str:
    """Each shipped run: where, when by its commit, how long, and its files."""
    rows = [_run(path, extra) for paths in measured_at(lab.number).values() for path in paths]
    heads = ("scale", "device", "minutes", "GB at most", "seeds", "commit", "versions", "files")
    return table_html(heads, rows, "Shipped runs") if rows else "No run is shipped."


def _run(path: Path, extra: Path) -> list[str]:
    run = read_result(path)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    cells = [run["scale"], run["device"], f"{run['seconds'] / 60:.1f}", f"{run['peak_gb']:.2f}",
             f"{len(run['seeds'])}" if run["seeds"] else "none", run["commit"], versions]
    files = [each for each in (path, path.with_suffix(".figures.json")) if each.exists()]
    return [*map(html.escape, cells), ", ".join(_copied(file, extra) for file in files)]


def _copied(file: Path, extra: Path) -> str:
    """A link to the page's own copy of a result file."""
    place = Path("data") / file.relative_to(RESULTS if file.is_relative_to(RESULTS) else DATA)
    (extra / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, extra / place)
    return f'<a href="{place.as_posix()}">{file.name}</a>'


# claims --------------------------------------------------------------------------------------------------------------

def claims_html(rows: Sequence[Mapping], claims: Mapping[str, Claim]) -> str:
    """Each claim under its statement: its verdict at each scale, then the rule and the seeds behind a click."""
    by_claim: dict[str, list[Mapping]] = {}
    for row in rows:
        by_claim.setdefault(row["id"], []).append(row)
    return "\n".join(_claim(claims[name], found) for name, found in by_claim.items()) or "<p>It has no claims.</p>"


def _claim(claim: Claim, rows: Sequence[Mapping]) -> str:
    lines = "".join(f"<li>{_line(row)}</li>" for row in rows)
    return (f'<div class="claim" id="{anchor(claim.id)}"><p><b>{html.escape(claim.statement)}</b> '
            f'<span class="id">{claim.id}</span></p>'
            f"<p>{linked_paper(claim.paper)} ({html.escape(claim.source)}): {html.escape(claim.paper_value)}</p>"
            f"<ul>{lines}</ul>{fold_html('The rule and the seeds', _rule(claim, rows))}</div>")


def _line(row: Mapping) -> str:
    exact = "exact: " if row["kind"] == "exact" else ""
    words = [html.escape(where(row)), exact + html.escape(shown(row))] if row["scale"] else []
    return " ".join([": ".join(words), verdict_html(row["verdict"])]).strip()


def _rule(claim: Claim, rows: Sequence[Mapping]) -> str:
    told = {"Rule": claim.rule, "Written": str(claim.written), "Metric": claim.metric, "Setting": claim.setting,
            "Why not here": claim.reason}
    told |= {f"Changed {change['date']}": change["reason"] for change in claim.changes}
    told |= {f"{row['scale']}, {arm}": _arm(row[arm]) for row in rows for arm in ("ours", "baseline")
             if row[arm] is not None}
    return "<dl>" + "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
                            for name, text in told.items() if text) + "</dl>"


def _arm(values: object) -> str:
    """'0: 3.21, 1: 3.19' by seed, or the exact number."""
    if isinstance(values, Mapping):
        return ", ".join(f"seed {seed}: {value:.5g}" for seed, value in values.items())
    return f"{values:.6g}"


# predictions and figures ---------------------------------------------------------------------------------------------

def predictions_html(lab: Lab) -> str:
    """Each question with the answers that runs recorded, behind a click; nothing where none did."""
    found = []
    for asked in predictions_of(lab.notebook, lab.path.name):
        answers = recorded_answers(lab.notebook, lab.number, asked)
        told = [f"<li>{html.escape(each.source)}: <b>{html.escape(each.option)}</b>. {html.escape(each.sentence)}</li>"
                for each in answers]
        if told:
            question = html.escape(" ".join(asked.question.split()))
            found.append(f"<p>{question}</p>\n" + fold_html("Show what was measured", f"<ul>{''.join(told)}</ul>"))
    return "\n## Predictions\n\n" + "\n".join(found) + "\n" if found else ""


def figures_html(lab: Lab, extra: Path) -> str:
    """The lab's figures, which `site_lab` has written, with their alternative texts; and what their data are called."""
    pictures = []
    for place, cell in enumerate(lab.notebook["cells"]):
        for number, output in enumerate(cell.get("outputs", [])):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                file = figure_file(figure_name(lab, place, number))
                pictures.append(f'<figure><a href="{file}"><img src="{file}" alt="{html.escape(alt)}" loading="lazy">'
                                "</a></figure>")
    return '<div class="gallery">' + "\n".join(pictures) + "</div>\n\n" + recorded_html(lab)


def recorded_html(lab: Lab) -> str:
    """What each run kept for the figures: names and sizes; the numbers are in the files above."""
    rows = []
    for scale, paths in measured_at(lab.number).items():
        for path in paths:
            file = path.with_suffix(".figures.json")
            kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            rows += [(scale, html.escape(name), html.escape(_size(value))) for name, value in kept.items()
                     if name != "answers"]
    return table_html(("scale", "name", "holds"), rows, "Data behind the figures") if rows else ""


def _size(value: object) -> str:
    """'3 entries: 0.0, 0.1, 0.3', '44 rows of arm, seed, loss', or a number itself."""
    if isinstance(value, dict):
        names = ", ".join(list(value)[:6]) + (", ..." if len(value) > 6 else "")
        return f"{len(value)} entries: {names}"
    if isinstance(value, list):
        names = ", ".join(value[0]) if value and isinstance(value[0], dict) else ""
        return f"{len(value)} rows" + (f" of {names}" if names else "")
    return str(value)
