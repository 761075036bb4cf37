"""The ledger to search: four lists, a line of text and a page, above a table that follows at once.

Where nobody can click, the same table is shown for the starting filter. Every list holds only what occurs, so no
choice can break it; a page beyond the last is the last.
"""

import html
from collections.abc import Mapping, Sequence

from labkit.course import display, widget_access
from labkit.course.ledger import shown
from labkit.course.ledger_views import matching, source_of
from labkit.course.scoreboard import counted_verdicts
from labkit.errors import LabError

PAGE = 12
FILTERS = {"notebook": "Lab", "paper": "Source", "verdict": "Verdict", "scale": "Scale", "device": "Device"}
EVERYTHING = "all"


def browse(lab, rows: Sequence[Mapping], **start: str) -> None:
    """Show `rows` with their filters; `start` holds starting values of the filters and of `text`."""
    if unknown := set(start) - {*FILTERS, "text"}:
        raise LabError(f"The ledger has no filter {', '.join(sorted(unknown))}.",
                       f"It has: {', '.join(FILTERS)}, text.")
    if lab.interactive:
        _widget(rows, start)
        return
    caption, table, columns = view(rows, page=1, **start)
    lab.table(table, columns, caption)


def view(rows: Sequence[Mapping], page: int, **wanted: str) -> tuple[str, list[tuple], list[str]]:
    """(caption, lines, heads) of one page of the rows that match."""
    found = matching(rows, **wanted)
    page = min(max(1, page), pages(len(found)))
    said = ", ".join(f"{FILTERS.get(key, key).lower()} {value}" for key, value in wanted.items() if value)
    caption = f"{len(found)} of {len(rows)} rows{': ' + said if said else ''}. {counted_verdicts(found)}."
    if pages(len(found)) > 1:
        caption += f" Page {page} of {pages(len(found))}."
    lines = [(row["id"], row["statement"], row["paper_value"], shown(row), row["scale"], row["verdict"])
             for row in found[(page - 1) * PAGE : page * PAGE]]
    return caption, lines, ["id", "claim", "paper", "ours (95% interval)", "scale", "verdict"]


def pages(count: int) -> int:
    """How many pages `count` rows fill, at least one."""
    return max(1, -(-count // PAGE))


def _options(rows: Sequence[Mapping], key: str) -> list[tuple[str, str]]:
    values = sorted({source_of(row) if key == "paper" else row[key] for row in rows} - {""})
    return [(EVERYTHING, ""), *((value, value) for value in values)]


def _widget(rows: Sequence[Mapping], start: Mapping[str, str]) -> None:
    import ipywidgets

    wide = {"style": {"description_width": "5em"}, "layout": ipywidgets.Layout(width="32em", max_width="100%")}
    controls = {key: ipywidgets.Dropdown(options=_options(rows, key), value=start.get(key, ""), description=name,
                                         **wide) for key, name in FILTERS.items()}
    controls["text"] = ipywidgets.Text(value=start.get("text", ""), description="Words", placeholder="in id or claim",
                                       **wide)
    page = ipywidgets.BoundedIntText(value=1, min=1, max=pages(len(rows)), description="Page", **wide)
    picture = ipywidgets.HTML(layout=ipywidgets.Layout(width="100%"))

    def redraw(change=None) -> None:
        wanted = {key: control.value for key, control in controls.items()}
        if change is not None and change["owner"] is not page:
            page.max, page.value = pages(len(matching(rows, **wanted))), 1
        caption, table, columns = view(rows, page=page.value, **wanted)
        picture.value = f'<p role="status">{html.escape(caption)}</p>{display.table(table, columns, "")[0]}'

    for control in [*controls.values(), page]:
        control.observe(redraw, names="value")
    redraw()
    widget_access.show(ipywidgets.VBox([*controls.values(), page, picture]))
