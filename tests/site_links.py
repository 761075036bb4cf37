"""The links of built pages: which lead nowhere, and which lead out of the site. Read without a browser.

Hosts that the site may link to stand here, and nowhere else; a link to another one is meant to be looked at once.
"""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HOSTS = {"arxiv.org"}
ASKED_FOR = {("script", "src"), ("link", "href"), ("img", "src"), ("source", "src"), ("iframe", "src")}


class Page(HTMLParser):
    """The names that a page has, and what it links to: `links` as (tag, attribute, address)."""

    def __init__(self, path: Path):
        super().__init__()
        self.names, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [(tag, key, found[key]) for key in ("href", "src") if found.get(key)]


def problems(folder: Path) -> list[str]:
    """A sentence for each link that leads nowhere, to a strange place, or loads something from outside."""
    pages = {path: Page(path) for path in sorted(folder.glob("*.html"))}
    return [f"{path.name}: {problem}" for path, page in pages.items() for tag, key, address in page.links
            if (problem := problem_of(tag, key, address, path, pages))]


def problem_of(tag: str, key: str, address: str, path: Path, pages: dict[Path, Page]) -> str:
    """What is wrong with one link of the page at `path`, or nothing."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        return _outside(tag, key, address, parts)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_relative_to(path.parent) or not target.is_file():
        return f"{address} is not there"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].names:
        return f"{address}: the page has no such place"
    return ""


def _outside(tag: str, key: str, address: str, parts) -> str:
    if (tag, key) in ASKED_FOR and not address.startswith("#"):
        return f"<{tag}> loads {address} from outside"
    if parts.scheme != "https" or not parts.hostname or " " in address:
        return f"{address} is no https address"
    return "" if parts.hostname in HOSTS else f"{address}: its host does not stand in tests/site_links.py"
