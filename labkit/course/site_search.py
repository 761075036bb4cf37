"""Excerpts for the search without a server: the text of each page as a script, which a file:// page may load.

Sphinx's index finds the pages; static/texts/<page>.js holds what search.js quotes of them.
"""

import html
import json
import re
from pathlib import Path

ARTICLE = re.compile(r'<article class="bd-article">(.*?)</article>', re.DOTALL)
UNREAD = re.compile(r"<(script|style|h1)\b.*?</\1>|<a class=\"headerlink\".*?</a>", re.DOTALL)


def write_texts(site: Path) -> None:
    """Write `_static/texts/<page>.js` for each page that has an article."""
    folder = site / "_static" / "texts"
    folder.mkdir()
    for page in site.glob("*.html"):
        found = ARTICLE.search(page.read_text(encoding="utf-8"))
        if found:
            words = json.dumps([page.stem, text_of_html(found[1])], ensure_ascii=False)
            (folder / f"{page.stem}.js").write_text(f"searchText(...{words});\n", encoding="utf-8")


def text_of_html(markup: str) -> str:
    """The words of a page, pictures by their alternative text, on one line."""
    markup = re.sub(r'<img\b[^>]*?\balt="([^"]*)"[^>]*>', r" \1 ", UNREAD.sub(" ", markup))
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())
