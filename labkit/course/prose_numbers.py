"""Numbers in prose have a source: the ledger, the notebook's own code or output, or a sentence that says where from.

A text is not executed, so a number in it goes stale in silence when a run is repeated. Here each number of a lab's
markdown is looked up:

- an interval, `0.06 [0.02, 0.10]` or `[0.02, 0.10]`, must be that of one row of the lab's ledger (any scale), or stand
  so in an output;
- a single number must be, as far as it is rounded, an estimate, a bound or a mean of the ledger, a number that a
  claim quotes from its paper, or a number in the lab's code or outputs;
- everything else stands in prose_numbers.toml with the place that it comes from: an expression over the shipped
  results, computed again here (prose_expressions.py), or, for what no result holds, a sentence.

Years, and whole numbers up to twelve, are taken for words. A lab holds hundreds of values, so a wrong single number is
often somebody else's rounding: made wrong in the last digit, 98% of the intervals are caught and a third of the single
numbers (tests/test_prose.py measures it). What goes stale in silence goes stale when a desk run is repeated. So
prose_numbers.toml also marks the desk results that each lab's prose was last read against: other results, and the gate
asks for another reading.
"""

import functools
import hashlib
import json
import math
import re
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.course.header import read_notebook, text_of
from labkit.course.ledger import claims_table
from labkit.course.prose import markdown_of, plain_text
from labkit.course.prose_expressions import evaluate
from labkit.course.results import RESULTS
from labkit.errors import LabError

SOURCES = Path(__file__).with_suffix(".toml")
NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
SINGLE = re.compile(rf"(?<![\w.,–-])[-−+–]?({NUMBER})(%?)(?![\w]|\.\d)")
INTERVAL = re.compile(rf"(?:([-−+]?{NUMBER})(%?)(?: nats?)? )?\[([-−+]?{NUMBER})(%?)(?:,| to) ([-−+]?{NUMBER})%?\]")
HEADER_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
AS_WORDS = 12
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Known:
    """What a lab's numbers may be: single values, intervals (estimate, low, high), and texts quoted as they stand."""

    values: Sequence[float]
    intervals: Sequence[Interval]
    quoted: Mapping[str, str]


def unexplained(path: Path) -> Iterator[str]:
    """Sentences about each number of a lab without a source or unlike it, and each source whose number is not there."""
    path = Path(path)
    if not re.match(r"\d\d_.*\.ipynb$", path.name):
        return
    known = known_numbers(path)
    written = [found for found in _numbers(_text(path)) if found in known.quoted or not explained(found, known)]
    for found in written:
        if found not in known.quoted:
            yield f"{found!r} has no source: mend it, or name its source in {SOURCES.name}"
        elif problem := _contradiction(found, known.quoted[found], path.name[:2]):
            yield problem
    for found in known.quoted.keys() - set(written):
        yield f"{SOURCES.name} gives {found!r} a source, and the text does not have it"
    number, mark = path.name[:2], results_mark(path.name[:2])
    if mark != _sources().get("read_against", {}).get(number):
        yield (f"the desk results are others than those that the prose was read against: compare its numbers, mend "
               f"them, then put {number} = \"{mark}\" under [read_against] in {SOURCES.name}")


def results_mark(number: str) -> str:
    """Eight hexadecimal digits that change with the rows and the figures of the lab's desk run."""
    folder = RESULTS / "desk"
    rows = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))["rows"]
    figures = folder / f"{number}.figures.json"
    text = json.dumps(rows) + (figures.read_text(encoding="utf-8") if figures.exists() else "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _contradiction(found: str, source: str, number: str) -> str | None:
    """A sentence if the source is an expression and gives something else than what is written."""
    if not source.startswith("="):
        return None
    value = evaluate(source[1:].strip(), number)
    alone = Known(value if len(value) == 1 else (), [value] if len(value) == 3 else (), {})
    return None if explained(found, alone) else f"{found!r} is written, and {source[1:].strip()} gives {value}"


def _text(path: Path) -> str:
    """The prose, without arXiv's numbers and the header's table, which the lint holds to the measured minutes."""
    header, _, rest = plain_text(markdown_of(path)).partition("\n## ")
    return ARXIV.sub(" ", HEADER_ROW.sub(" ", header) + "\n" + rest)


def _numbers(text: str) -> list[str]:
    """Intervals first, then the single numbers of what is left, each as it is written, in order and once."""
    intervals = [match[0] for match in INTERVAL.finditer(text)]
    singles = [match[0] for match in SINGLE.finditer(INTERVAL.sub(" ", text)) if not _is_word(match[1], match[2])]
    return list(dict.fromkeys(intervals + singles))


def _is_word(number: str, percent: str) -> bool:
    """A count in words, or a year."""
    return not percent and number.isdigit() and (int(number) <= AS_WORDS or 1900 <= int(number) < 2100)


def explained(found: str, known: Known) -> bool:
    """Whether a number, or an interval, as written, is a rounding of something known."""
    if match := INTERVAL.fullmatch(found):
        parts, scale = match.group(1, 3, 5), 100 if match[2] or match[4] else 1
        return any(all(part is None or _rounds(part, scale * value) for part, value in zip(parts, each, strict=True))
                   for each in _either_way(known.intervals))
    match = SINGLE.fullmatch(found)
    return any(_rounds(match[1], abs(value)) or (match[2] and _rounds(match[1], abs(100 * value)))
               for value in known.values)


def _either_way(intervals: Sequence[Interval]) -> Iterator[Interval]:
    """A difference may be told from either side."""
    for estimate, low, high in intervals:
        yield estimate, low, high
        yield -estimate, -high, -low


def _rounds(written: str, value: float) -> bool:
    """Whether `written` is `value`, rounded to as many places as are written; `17,000` may stand for 17,203."""
    number = written.replace(",", "").replace("−", "-").lstrip("+")
    if "e" in number:
        return math.isclose(float(number), value, rel_tol=0.051)
    decimals = len(number.partition(".")[2])
    zeros = 0 if decimals else max(0, min(len(number) - len(number.rstrip("0")), len(number) - 2))
    return abs(float(number) - value) <= 0.5001 * 10.0 ** (zeros - decimals)


def known_numbers(path: Path) -> Known:
    """What the lab's ledger, claims, code and outputs hold, and what prose_numbers.toml adds."""
    number, notebook = path.name[:2], read_notebook(path)
    rows = [row for row in _ledger() if row["notebook"] == number]
    texts = [row[key] for row in rows for key in ("paper", "source", "statement", "paper_value", "rule")]
    texts += [text for cell in notebook["cells"] if cell["cell_type"] == "code" for text in _texts(cell)]
    values = {value for row in rows for value in _measured(row)} | {value for text in texts for value in read(text)}
    intervals = [(row["estimate"], row["low"], row["high"]) for row in rows 
                 if row["low"] is not None and row["high"] is not None]
    intervals += [tuple(_value(part or "0") for part in match.group(1, 3, 5))
                  for text in texts for match in INTERVAL.finditer(text)]
    return Known(sorted(values), intervals, _sources().get(number, {}))


@functools.cache
def _ledger() -> list[dict]:
    return claims_table()


@functools.cache
def _sources() -> dict[str, dict[str, str]]:
    try:
        return tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LabError(f"{SOURCES.name} can't be read ({error}).", "Mend that line.") from None


def _measured(row: Mapping) -> Iterator[float]:
    """Estimate and bounds of one row, and mean, median and range of each arm."""
    yield from (abs(row[key]) for key in ("estimate", "low", "high") if row[key] is not None)
    for arm in (row["ours"], row["baseline"]):
        seeds = list(arm.values()) if isinstance(arm, Mapping) else [] if arm is None else [arm]
        for summary in (statistics.mean, statistics.median, min, max) if seeds else ():
            yield abs(summary(seeds))


def _texts(cell: Mapping) -> Iterator[str]:
    """The code of a cell and the texts of its outputs, tables without their tags."""
    yield text_of(cell)
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")):
            yield re.sub(r"<[^>]*>", " ", "".join(text))


def read(text: str) -> Iterator[float]:
    """All numbers of a text or of code, without their signs; of 1_024 and 1,024 alike."""
    for number in re.findall(NUMBER, re.sub(r"(?<=\d)_(?=\d)", "", text)):
        yield _value(number)


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))
