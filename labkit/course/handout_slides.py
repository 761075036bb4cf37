"""Slides of a lab as one HTML file that asks for nothing else: no script, font or picture from elsewhere.

Headings give the titles. Text is cut so that a slide holds one idea; each figure, table, prediction and exercise has a
slide of its own. Arrow keys move; printing gives a page a slide. Formulas are drawn by labkit/course/handout_math.py.
"""

import ast
import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from labkit.course.handout_math import formula
from labkit.course.handout_read import ASKED, predictions_of, tags_of
from labkit.course.header import header_of, text_of

WORDS = 85  # on a slide of text
LEAD = 25  # words of a text that may stand above the code, table or figure that it announces
LINES = 16  # on a slide of code
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
html {{ scroll-snap-type: y proximity; font: clamp(1.05rem, 1.9vw, 1.7rem)/1.45 system-ui, sans-serif;
 counter-reset: slide; }}
body {{ margin: 0; color: #1a1a1a; background: #fff; }}
section {{ min-height: 100vh; box-sizing: border-box; padding: 5vh 7vw 9vh; scroll-snap-align: start;
 position: relative; counter-increment: slide; border-bottom: 1px solid #ccc; overflow-x: auto; }}
section::after {{ content: counter(slide); position: absolute; right: 2vw; bottom: 2vh; color: #555;
 font-size: 0.7em; }}
h1 {{ font-size: 1.5em; }} h2 {{ font-size: 1.2em; }} h1, h2 {{ line-height: 1.2; margin: 0 0 0.8em; }}
section.title {{ display: flex; flex-direction: column; justify-content: center; }}
figure {{ margin: 0; }} figure img {{ max-width: 100%; max-height: 54vh; display: block; margin: auto; }}
figcaption {{ font-size: 0.8em; margin-top: 0.6em; }}
pre {{ background: #f4f4f4; padding: 0.8em; font-size: 0.75em; white-space: pre-wrap; }}
table {{ border-collapse: collapse; font-size: 0.75em; }}
td, th {{ padding: 0.2em 0.8em 0.2em 0; text-align: left; }}
th {{ border-bottom: 1px solid #555; }}
svg {{ fill: currentColor; max-width: 100%; }}
.formula {{ text-align: center; margin: 0.8em 0; font-size: 1.1em; }}
section.prediction {{ background: #eef4fa; }} section.exercise {{ background: #f3f7ee; }}
@media print {{ section {{ break-after: page; min-height: 0; border: 0; }} }}
</style></head><body>
{slides}
<script>
const slides = [...document.querySelectorAll("section")];
const steps = {{ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1}};
addEventListener("keydown", event => {{
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const here = slides.findIndex(slide => slide.getBoundingClientRect().bottom > innerHeight / 2);
  slides[Math.min(slides.length - 1, Math.max(0, here + steps[event.key]))].scrollIntoView();
}});
</script>
</body></html>
"""


@dataclass(frozen=True)
class Slide:
    """One screen: its kind (title, text, code, figure, table, prediction, exercise), heading, and body as HTML."""

    kind: str
    heading: str
    body: str
    cell: int = 0  # place in the notebook of the cell that it comes from


def slides_page(notebook: dict, name: str) -> str:
    """The whole file."""
    slides = with_leads(slides_of(notebook, name))
    sections = "\n".join(_section(slide, first=place == 0) for place, slide in enumerate(slides))
    return PAGE.format(title=html.escape(header_of(notebook).title or name), slides=sections)


def _section(slide: Slide, *, first: bool) -> str:
    level, label = ("h1" if first else "h2"), html.escape(re.sub(r"<[^>]+>", "", slide.heading))
    return (f'<section class="{slide.kind}" aria-label="{label}">'
            f"<{level}>{slide.heading}</{level}>\n{slide.body}\n</section>")


def with_leads(slides: Iterable[Slide]) -> list[Slide]:
    """A short text joins the slide that follows under the same heading: "That is phase 1, whole:" needs its code."""
    joined: list[Slide] = []
    for slide in slides:
        last = joined[-1] if joined else None
        if last and last.kind == "text" and _words(last.body) <= LEAD and _goes_on(last, slide):
            slide = replace(slide, body=f"{joined.pop().body}\n{slide.body}")
        joined.append(slide)
    return joined


def _goes_on(lead: Slide, slide: Slide) -> bool:
    """Whether the slide is what the lead announces: the next cell under the same heading."""
    room = slide.kind in ("code", "figure", "table") or \
        (slide.kind == "text" and _words(lead.body + slide.body) <= WORDS)
    return room and lead.heading == slide.heading and slide.cell <= lead.cell + 1


def _words(body: str) -> int:
    return len(re.sub(r"<[^>]+>", " ", body).split())


def slides_of(notebook: dict, name: str) -> Iterator[Slide]:
    """Slides in the order of the notebook; solutions and the long table of claims are left out."""
    header, heading, begun = header_of(notebook), "", False
    asked: dict[int, list] = {}
    for prediction in predictions_of(notebook, name):
        asked.setdefault(prediction.asked, []).append(prediction)
    yield Slide("title", _inline(header.title or name), rendered(header.question))
    for place, cell in enumerate(notebook["cells"]):
        slides: list[Slide] = []
        if cell["cell_type"] == "markdown":
            for title, text in _chapters(text_of(cell), heading):
                slides += _text_slides(title, text)
                heading = title
        elif "solution" not in tags_of(cell):
            begun = begun or place in asked
            slides = [Slide("prediction", "Predict", _question(each)) for each in asked.get(place, [])]
            slides += ([] if begun else _code_slides(cell, heading)) + list(_output_slides(cell, heading))
        yield from (replace(slide, cell=place) for slide in slides)


def _question(prediction) -> str:
    options = "".join(f"<li>{html.escape(option)}</li>" for option in prediction.options)
    return f"<p><b>{html.escape(prediction.question)}</b></p><ul>{options}</ul>"


def _chapters(text: str, heading: str) -> Iterator[tuple[str, str]]:
    """(heading, text below it) of a text cell; what stands above its first heading belongs to the one before."""
    parts = re.split(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)
    for title, below in zip([heading, *parts[1::2]], parts[::2], strict=True):
        if below.strip():
            yield title.strip(), below.strip()


def _text_slides(heading: str, text: str) -> Iterator[Slide]:
    """A text in slides of at most WORDS words, cut between paragraphs."""
    pages: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("**The question"):
            continue  # it stands on the first slide
        starts = re.match(r"\*\*\d\d\.\d ", block)  # an exercise begins its own slide
        if pages[-1] and (starts or len(" ".join([*pages[-1], block]).split()) > WORDS):
            pages.append([])
        pages[-1].append(block)
    for page in filter(None, pages):
        kind = "exercise" if re.match(r"\*\*\d\d\.\d ", page[0]) else "text"
        yield Slide(kind, _inline(heading), rendered("\n\n".join(page)))


def _code_slides(cell: dict, heading: str) -> list[Slide]:
    """The functions of an unfolded cell, without the lines that try them: the mechanism, if it is short."""
    if tags_of(cell) or cell["metadata"].get("jupyter", {}).get("source_hidden"):
        return []
    source = text_of(cell)
    functions = [ast.get_source_segment(source, node) for node in ast.parse(source).body
                 if isinstance(node, ast.FunctionDef)]
    code = "\n\n".join(functions)
    return [Slide("code", _inline(heading), f"<pre><code>{html.escape(code)}</code></pre>")] \
        if 0 < len(code.splitlines()) <= LINES else []


def _output_slides(cell: dict, heading: str) -> Iterator[Slide]:
    """A slide for each figure and each table."""
    for output in [] if "lab.ledger(" in text_of(cell) else cell.get("outputs", []):
        data, text = output.get("data", {}), "".join(output.get("data", {}).get("text/plain", ""))
        if "image/png" in data:
            alt, picture = html.escape(text), "".join(data["image/png"]).replace("\n", "")
            yield Slide("figure", _inline(heading), f'<figure><img alt="{alt}" src="data:image/png;base64,{picture}">'
                                                    f"<figcaption>{alt}</figcaption></figure>")
        elif "text/html" in data and not text.startswith(ASKED):
            yield Slide("table", _inline(heading), "".join(data["text/html"]))


def rendered(source: str) -> str:
    """Markdown as HTML, formulas drawn."""
    return _markdown()(source)


def _inline(text: str) -> str:
    """A line of markdown as HTML without the paragraph around it."""
    return re.sub(r"^<p>|</p>$", "", rendered(text).strip())


def _markdown():
    """nbconvert's reader of notebook markdown, with formulas as drawings."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return formula(body, block=True)

        def inline_math(self, body: str) -> str:
            return formula(body, block=False)

    return MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render
