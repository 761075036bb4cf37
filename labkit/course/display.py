"""The one place that talks to a front end: text, HTML and pictures in a notebook, plain text elsewhere.

A picture carries its alternative text in the output's metadata (`image/png` → `alt`) and as its text/plain, so
that screen readers, text-only viewers and the lint find it.
"""

import base64
import html
import sys
from collections.abc import Mapping, Sequence


def kernel():
    """The running IPython kernel, or None in plain Python and at an IPython prompt."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def publish(data: dict, metadata: dict | None = None) -> None:
    """Show a bundle of equivalent forms (mime type → content); only for use in a kernel."""
    from IPython.display import display

    display(data, metadata=metadata or {}, raw=True)


def publish_html(markup: str, text: str) -> None:
    """HTML in a notebook, `text` in a terminal."""
    if kernel():
        publish({"text/html": markup, "text/plain": text})
    else:
        print(text)


def publish_png(picture: bytes, alt: str, width: int) -> None:
    """A PNG with its alternative text, shown `width` CSS pixels wide."""
    publish({"image/png": base64.b64encode(picture).decode("ascii"), "text/plain": alt},
            {"image/png": {"alt": alt, "width": width}})


def publish_for_screen_readers(text: str) -> None:
    """A paragraph that is read aloud and not seen: JupyterLab (4.6) does not pass a picture's alternative text on."""
    hidden = "position:absolute; width:1px; height:1px; margin:0; overflow:hidden; clip-path:inset(50%)"
    publish_html(f'<p style="{hidden}">Figure: {html.escape(text)}</p>', f"Figure: {text}")


def inline_image(picture: bytes, alt: str, width: int) -> str:
    """The same picture as an HTML <img>, for widgets."""
    source = base64.b64encode(picture).decode("ascii")
    style = "max-width:100%; height:auto"  # narrow windows shrink it instead of cutting it off
    return f'<img alt="{html.escape(alt)}" width="{width}" style="{style}" src="data:image/png;base64,{source}">'


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping | Sequence], columns: Sequence[str] | None, caption: str) -> tuple[str, str]:
    """(HTML, plain text) of a small table; rows are mappings, or sequences with `columns` as their heads."""
    columns = list(columns or (rows[0] if rows and isinstance(rows[0], Mapping) else []))
    body = [[_cell(row.get(name) if isinstance(row, Mapping) else row[i]) for i, name in enumerate(columns or row)]
            for row in rows]
    return _html_table(columns, body, caption), _text_table(columns, body, caption)


def _html_table(columns: list[str], body: list[list[str]], caption: str) -> str:
    style = ' style="text-align:left; vertical-align:top; padding:2px 12px 2px 0"'
    head = "".join(f'<th scope="col"{style}>{html.escape(name)}</th>' for name in columns)
    lines = ["<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    title = f'<caption style="text-align:left; font-weight:bold">{html.escape(caption)}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _text_table(columns: list[str], body: list[list[str]], caption: str) -> str:
    grid = ([columns] if columns else []) + body
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))] if grid else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
    if columns:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(([caption] if caption else []) + lines)
