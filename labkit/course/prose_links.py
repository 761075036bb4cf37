"""Links in prose lead somewhere: a file that is there, a heading that is there, or a well-formed https address.

Nothing is fetched: the course is read offline, and a test that needs the network fails for reasons of its own. Also
checked: a lab that is named by its number (`lab 07`) must exist, and a paper's arXiv number must have its form.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from labkit.course.header import NOTEBOOKS
from labkit.course.prose import markdown_of

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
LAB = re.compile(r"\b[Ll]abs? (\d\d)\b")
ADDRESS = re.compile(r"https?://[^\s)>\]\"'`]+")
ARXIV = re.compile(r"arXiv:? ?(\d+\.\d+)")


def broken(path: Path) -> Iterator[str]:
    """A sentence for each link, address or name of a lab in a notebook or page that leads nowhere."""
    text = re.sub(r"```.*?```", " ", markdown_of(path), flags=re.DOTALL)
    for target in LINK.findall(text):
        if not ADDRESS.match(target):
            yield from _broken_here(Path(path), target)
    for address in ADDRESS.findall(text):
        parts = urlsplit(address)
        if not (parts.scheme == "https" and "." in parts.netloc) and parts.hostname not in ("localhost", "127.0.0.1"):
            yield f"the address {address!r} is not https with a host"
    for number in LAB.findall(text):
        if not list(NOTEBOOKS.glob(f"{number}_*.ipynb")):
            yield f"lab {number} is named, and there is none"
    for number in ARXIV.findall(text):
        if not re.fullmatch(r"\d{4}\.\d{4,5}", number) or not 1 <= int(number[2:4]) <= 12:
            yield f"arXiv {number} is not the number of a paper"


def _broken_here(path: Path, target: str) -> Iterator[str]:
    """A relative link: the file must exist, and its heading if one is named."""
    file, _, heading = unquote(target).partition("#")
    place = (path.parent / file) if file else path
    if not place.exists():
        yield f"the link to {target!r} leads to no file"
    elif heading and heading not in _anchors(place):
        yield f"the link to {target!r} leads to no heading; there are: {', '.join(sorted(_anchors(place)))}"


def _anchors(path: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    titles = re.findall(r"^#{1,6} (.+?)\s*$", markdown_of(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
