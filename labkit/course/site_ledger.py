"""The whole ledger as one page: a table of every claim at every scale, with filters that need no server.

Without JavaScript the page is the plain table. ledger.js, beside it, hides the rows that do not match.
"""

import html
import re
from collections.abc import Mapping, Sequence

from labkit.course.claims import VERDICTS
from labkit.course.ledger import shown, where
from labkit.course.ledger_views import source_names, source_of
from labkit.course.scoreboard import summary
from labkit.course.site_map import Lab

FILTERS = {"notebook": "Lab", "paper": "Source", "verdict": "Verdict", "scale": "Scale", "device": "Device",
           "kind": "Kind"}
HEADS = ("claim", "lab", "source", "its number", "ours (95% interval)", "scale", "kind", "verdict")
TEXT = """# The whole ledger

{summary}

A row is a claim at one scale, so a claim that was run quick and at the desk counts twice here. Its rule was written
before the run, or says when and why it changed; the verdict is computed from the whole interval over seeds. The rules
themselves, and what each seed gave, stand on the results page of each lab.

{filters}

{table}

```{{toctree}}
:hidden:

{results}
```
"""


def ledger_page(rows: Sequence[Mapping], labs: Sequence[Lab]) -> str:
    """The page as MyST markdown."""
    pages = {lab.number: lab.results for lab in labs}
    lines = "\n".join(row_html(row, pages) for row in sorted(rows, key=lambda row: row["notebook"]))
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    table = (f'<table class="ledger" id="ledger"><caption>Every claim at every scale</caption>'
             f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>")
    return TEXT.format(summary=summary(list(rows)), filters=filters_html(rows), table=table,
                       results="\n".join(pages.values()))


def filters_html(rows: Sequence[Mapping]) -> str:
    """A form of lists and a line of words; ledger.js shows it, for without JavaScript it could do nothing."""
    lists = "".join(f'<label>{name} <select name="{key}"><option value="">all</option>{_options(rows, key)}</select>'
                    "</label>" for key, name in FILTERS.items())
    words = '<label>Words <input type="search" name="words" placeholder="in claim or source"></label>'
    return (f'<form class="filters" hidden>{lists}{words}<button type="reset">Show all</button></form>\n'
            '<p id="found" role="status"></p>')


def _options(rows: Sequence[Mapping], key: str) -> str:
    names = source_names(rows) if key == "paper" else {}
    values = {source_of(row) if key == "paper" else row[key] for row in rows} - {""}
    order = VERDICTS.index if key == "verdict" else str
    return "".join(f'<option value="{html.escape(value)}">{html.escape(names.get(value, value))}</option>'
                   for value in sorted(values, key=order))


def row_html(row: Mapping, pages: Mapping[str, str]) -> str:
    """One row, with what the filters ask for as its data; HEADS again as data, for narrow screens."""
    kept = {key: source_of(row) if key == "paper" else row[key] for key in FILTERS}
    data = "".join(f' data-{key}="{html.escape(value)}"' for key, value in kept.items())
    told = zip(HEADS, cells_of(row, pages), strict=True)
    return f"<tr{data}>" + "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in told) + "</tr>"


def cells_of(row: Mapping, pages: Mapping[str, str]) -> list[str]:
    """The cells of a row as HTML, in the order of HEADS."""
    page = pages.get(row["notebook"])
    claim = html.escape(row["statement"])
    name = f'<span class="id">{html.escape(row["id"])}</span>'
    number = f'<a href="{page}.html#{anchor(row["id"])}">{row["notebook"]}</a>' if page else row["notebook"]
    return [f"{claim} {name}", number, linked_paper(row["paper"]), html.escape(row["paper_value"]),
            html.escape(shown(row)), html.escape(where(row)), row["kind"].replace("_", " "),
            verdict_html(row["verdict"])]


def anchor(claim: str) -> str:
    """Where the results page of a lab tells about a claim."""
    return "claim-" + re.sub(r"[^a-z0-9]+", "-", claim)


def linked_paper(paper: str) -> str:
    """A paper's name, its arXiv id as a link."""
    return re.sub(r"\b\d{4}\.\d{5}\b", lambda found: f'<a href="https://arxiv.org/abs/{found[0]}">{found[0]}</a>',
                  html.escape(paper))


def verdict_html(verdict: str) -> str:
    """The verdict in words, with a sign and a colour beside them."""
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'
