"""The lint of the notebooks: what nbval does not see, found before anything is run.

    python -m labkit.course.notebook_lint notebooks/

Every notebook must be stored executed, in order, without an error, and say the same to somebody who can't see its
figures; a lab of the course (NN_name.ipynb) must also have a lab's parts and keep to the minutes and gigabytes of its
header. Each rule is a function from a notebook to sentences; each was made for a defect that nbval passes over.
"""

import difflib
import io
import json
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from labkit.course import record
from labkit.course.gate import run_gate
from labkit.course.header import header_of, read_notebook, text_of
from labkit.course.scale import SCALES

COMMENTS = ("NBVAL_IGNORE_OUTPUT", "NBVAL_CHECK_OUTPUT", "NBVAL_RAISES_EXCEPTION", "NBVAL_SKIP")
MARKER_TAGS = ("nbval-ignore-output", "nbval-check-output", "nbval-raises-exception", "nbval-skip", "raises-exception")
COURSE_TAGS = ("settings", "prediction", "figure", "exercise", "solution")
PATHS = re.compile(r"(?<![\w.:/<])/(?:home|root|Users|tmp|work|usr|opt|mnt|media|var|private|srv)/\w|\b[A-Z]:\\\w")
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")


def lint(path: Path) -> list[str]:
    """All problems of one notebook, as sentences that begin with its name and cell."""
    path = Path(path)
    notebook = read_notebook(path)
    rules = [order, plain_python, markers, outputs, markdown_pictures]
    if re.match(r"\d\d_", path.name):
        rules += [anatomy, pairs, lambda notebook: budget(notebook, path.name[:2])]
    return [f"{path.name}: {problem}" for rule in rules for problem in rule(notebook)]


def _code(notebook: dict) -> list[tuple[str, dict, str]]:
    """(name for messages, cell, source) of each code cell that has code."""
    cells = [(cell, text_of(cell)) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    full = [(cell, source) for cell, source in cells if source.strip()]
    return [(f"code cell {i} ({source.strip().splitlines()[0][:40]!r})", cell, source)
            for i, (cell, source) in enumerate(full, start=1)]


# what every notebook owes ----------------------------------------------------------------------------------------

def order(notebook: dict) -> Iterator[str]:
    """Executed once, from the top: nbval compares nothing where the output was cleared."""
    for expected, (name, cell, _) in enumerate(_code(notebook), start=1):
        if cell.get("execution_count") is None:
            yield f"{name} was not executed or its output was cleared; run `labkit run NN --save`"
            return
        if cell["execution_count"] != expected:
            yield f"{name} was executed as number {cell['execution_count']}, not {expected}; run all from the top"
            return


def plain_python(notebook: dict) -> Iterator[str]:
    """No magics: with nbval an unknown one passes, and a server without IPython can't run any."""
    for name, _, source in _code(notebook):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compile(source, name, "exec", dont_inherit=True)
        except SyntaxError as error:
            line = (source.splitlines() + [""])[max(0, (error.lineno or 1) - 1)].strip()
            yield f"{name} is not plain Python (magics and shell commands are not used): {line!r}"
        for word in re.findall(r"\b(clear_output|get_ipython|update_display)\b", source):
            yield f"{name} uses {word}, which a headless run can't follow"


def markers(notebook: dict) -> Iterator[str]:
    """Markers of nbval and tags of the course, spelt exactly: a misspelt one is ignored without a word."""
    for name, cell, source in _code(notebook):
        for line, comment in _comments(source):
            known = comment.lstrip("#").strip() in COMMENTS and line.strip() == comment
            if not known and any(_resembles(word, COMMENTS) for word in re.findall(r"[A-Za-z][\w-]+", comment)):
                yield f"{name} has a marker that nbval does not know: {line.strip()!r}; allowed: {', '.join(COMMENTS)}"
        tags = cell.get("metadata", {}).get("tags", [])
        for tag in tags if isinstance(tags, list) else [tags]:
            if tag not in MARKER_TAGS + COURSE_TAGS:
                yield f"{name} has the unknown tag {tag!r}; allowed: {', '.join(MARKER_TAGS + COURSE_TAGS)}"


def _comments(source: str) -> Iterator[tuple[str, str]]:
    """(line, comment) of each comment; stops quietly at text that is not Python, which `plain_python` reports."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.line, token.string
    except (tokenize.TokenError, SyntaxError):
        return


def _resembles(word: str, known: tuple[str, ...]) -> bool:
    word = word.upper().replace("-", "_")
    return word.startswith(("NBVAL", "PYTEST_VALIDATE")) or bool(difflib.get_close_matches(word, known, 1, 0.8))


def outputs(notebook: dict) -> Iterator[str]:
    """No stored error, no warnings, no paths of somebody's machine, no dead widgets, alternative text everywhere."""
    for name, cell, _ in _code(notebook):
        for output in cell.get("outputs", []):
            kind, data = output["output_type"], output.get("data", {})
            if kind == "error":
                yield f"{name} has a stored error: {output.get('ename')}: {output.get('evalue')}"
            if kind == "stream" and output["name"] == "stderr":
                yield f"{name} has output on stderr: {_joined(output['text']).strip()[:80]!r}"
            if "application/vnd.jupyter.widget-view+json" in data:
                yield f"{name} stores a widget, which nobody can open later; save a headless run instead"
            for text in [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]:
                if found := PATHS.search(_joined(text)):
                    yield f"{name} shows a path of this machine: {_joined(text)[found.start():][:60]!r}"
            yield from (f"{name} {problem}" for problem in _alt_text(output.get("metadata", {}), data))


def _joined(text: str | list[str]) -> str:
    return "".join(text)


def _alt_text(metadata: dict, data: dict) -> Iterator[str]:
    for kind in [kind for kind in PICTURES if kind in data]:
        alt = metadata.get(kind, {}).get("alt", "").strip()
        if not alt:
            yield f"shows a picture ({kind}) without alternative text; use lab.show(figure, alt)"
        elif _joined(data.get("text/plain", "")).strip() != alt:
            yield "shows a picture whose text/plain is not its alternative text; use lab.show(figure, alt)"
    for tag in re.findall(r"<img\b[^>]*>", _joined(data.get("text/html", ""))):
        if not re.search(r"""\balt\s*=\s*(["'])\s*\S.*?\1""", tag, re.DOTALL):
            yield "shows an <img> without alternative text"


def markdown_pictures(notebook: dict) -> Iterator[str]:
    """Pictures in the text have alternative text too."""
    for number, cell in enumerate(notebook["cells"], start=1):
        if cell["cell_type"] == "markdown" and re.search(r"!\[\s*\]\(", text_of(cell)):
            yield f"cell {number} has a picture without alternative text: write ![what it shows](...)"


# what a lab of the course owes -----------------------------------------------------------------------------------

def anatomy(notebook: dict) -> Iterator[str]:
    """A lab's parts: title, question, budget, settings, prediction, exercises with folded solutions, ledger."""
    header, code = header_of(notebook), _code(notebook)
    tagged = {tag: [cell for _, cell, _ in code if tag in cell["metadata"].get("tags", [])] for tag in COURSE_TAGS}
    if not header.title:
        yield "the first text cell has no title (a line like `# Title`)"
    if not header.question:
        yield "the first text cell does not state its question (a paragraph that begins with **The question.**)"
    if missing := [scale for scale in SCALES if scale not in header.minutes]:
        yield f"the header's table `| scale | minutes | GB |` has no row for {', '.join(missing)}"
    if len(tagged["settings"]) != 1:
        yield f"{len(tagged['settings'])} code cells are tagged `settings`, one is needed"
    for tag in ("prediction", "exercise", "solution"):
        if not tagged[tag]:
            yield f"no code cell is tagged `{tag}`"
    if not all(cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in tagged["solution"]):
        yield "a solution is not folded (cell metadata jupyter.source_hidden: true)"
    if not any("lab.ledger(" in source for _, _, source in code):
        yield "the ledger is not shown (lab.ledger())"


def pairs(notebook: dict) -> Iterator[str]:
    """Each prediction is taken up again, each exercise has a checked solution."""
    source = "\n".join(source for _, _, source in _code(notebook))
    for first, second in (("predict", "reveal"), ("check", "solution")):
        names = {call: set(re.findall(rf"\blab\.{call}\(\s*[\"']([^\"']+)", source)) for call in (first, second)}
        for name in sorted(names[first] ^ names[second]):
            have, lack = (first, second) if name in names[first] else (second, first)
            yield f"lab.{have}({name!r}, ...) has no lab.{lack}({name!r}, ...)"


def budget(notebook: dict, number: str) -> Iterator[str]:
    """Minutes and gigabytes: at least what was measured, and at most twice that and a little."""
    header, measured = header_of(notebook), record.measured_at(number)
    if "quick" not in measured:
        yield f"data/results/quick/{number}.json is missing; run `labkit run {number} --scale quick`"
    for scale, files in measured.items():
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        for what, stated, found in (
            ("minutes", header.minutes.get(scale), max(result["seconds"] for result in results) / 60),
            ("GB", header.gigabytes.get(scale), max(result["peak_gb"] for result in results)),
        ):
            if stated is None:
                yield f"the header gives no {what} for {scale}, and {found:.2f} were measured"
            elif not found <= stated <= 2 * found + 0.3:
                yield (f"the header says {stated:g} {what} for {scale}, and {found:.2f} were measured; "
                       f"state between that and {2 * found + 0.3:.2f}")
    for scale, minutes in header.minutes.items():
        if minutes is not None and scale not in measured and scale != "quick":
            yield f"the header says {minutes:g} minutes for {scale}, where no run is shipped; write `not run yet`"


def main(arguments: list[str]) -> int:
    """Lint files and folders; prints what is wrong and returns the exit status."""
    return run_gate(arguments, lint, "{files} notebooks")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
