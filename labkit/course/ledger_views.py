"""Views of the whole ledger: one row a claim, rows that match a filter, counts, and numbers on one scale.

Two scales make rows of different labs comparable.
    beside the paper:  estimate / paper's number, where both are numbers of one kind (`beside_paper`);
    beside the rule:   x = (estimate - nearest border of `reproduced`) / half the interval's width, positive inside
                       (`distance`). x > 1 is a verdict inside, x < -1 one outside, between them lies inconclusive.
`widened` asks the rule about a wider interval, `pairing` compares the arms of a row over their seeds.
All take the rows of labkit.course.ledger.claims_table and change none.
"""

import math
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labkit.course.claims import VERDICTS, Claim, decide
from labkit.errors import LabError
from labkit.measure.intervals import interval, student_quantile

DECIDED = ("reproduced", "partly", "not reproduced", "inconclusive")  # a rule could be applied
OWN = "our own predictions"
SURPRISES = Path(__file__).with_name("surprises.toml")
_FULLEST_LAST = ("", "quick", "desk", "workstation")
_NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
_BOUND = re.compile(r"\b(above|below|over|under|up to|at least|at most|suffice)\b|O\(|[<>]")


def fullest(rows: Sequence[Mapping]) -> list[Mapping]:
    """One row a claim: that of the fullest scale, and of the first device there; in the order of the claims."""
    best: dict[str, Mapping] = {}
    for row in rows:
        kept = best.get(row["id"])
        if kept is None or _FULLEST_LAST.index(row["scale"]) > _FULLEST_LAST.index(kept["scale"]):
            best[row["id"]] = row
    return list(best.values())


def source_of(row: Mapping) -> str:
    """What a row tests: an arXiv id, "our own predictions", or the paper's name."""
    if row["paper"].startswith("One-GPU Lab"):
        return OWN
    found = re.match(r"\d{4}\.\d{5}", row["paper"])
    return found[0] if found else row["paper"]


def source_names(rows: Sequence[Mapping], width: int = 44) -> dict[str, str]:
    """source -> its most common name in the ledger, cut between words."""
    names: dict[str, Counter] = {}
    for row in rows:
        names.setdefault(source_of(row), Counter())[row["paper"]] += 1
    common = {source: found.most_common(1)[0][0] for source, found in names.items()} | {OWN: OWN}
    return {source: textwrap.shorten(name, width, placeholder=" …") for source, name in common.items()}


def matching(rows: Sequence[Mapping], *, text: str = "", **wanted: str) -> list[Mapping]:
    """Rows whose `notebook`, `paper`, `verdict`, `scale` or `device` is the wanted one, and that hold every word.

    An empty wanted value lets all pass; `paper` is what `source_of` says; words are sought in id, statement, paper.
    """
    words = text.lower().split()
    read: dict[str, Callable] = {"paper": source_of}

    def fits(row: Mapping) -> bool:
        said = f"{row['id']} {row['statement']} {row['paper']}".lower()
        same = all(read.get(key, lambda row, key=key: row[key])(row) == value for key, value in wanted.items() if value)
        return same and all(word in said for word in words)

    return [row for row in rows if fits(row)]


def counts(rows: Sequence[Mapping], key: Callable[[Mapping], str]) -> dict[str, Counter]:
    """key -> how many rows have each verdict, in the order in which the keys first come."""
    found: dict[str, Counter] = {}
    for row in rows:
        found.setdefault(key(row), Counter())[row["verdict"]] += 1
    return found


def share(rows: Sequence[Mapping], verdict: str = "reproduced") -> float:
    """The share of one verdict among the rows that have one; nan where none has."""
    if verdict not in VERDICTS:
        raise LabError(f"{verdict!r} is no verdict.", f"The verdicts are: {', '.join(VERDICTS)}.")
    decided = [row for row in rows if row["verdict"] in DECIDED]
    return sum(row["verdict"] == verdict for row in decided) / len(decided) if decided else math.nan


# beside the paper's number ---------------------------------------------------------------------------------------

class Beside(NamedTuple):
    """One row divided by the paper's number: the estimate and its interval, and the paper's own range."""

    id: str
    notebook: str
    estimate: float
    low: float
    high: float
    paper: tuple[float, float]


def paper_range(text: str) -> tuple[float, float] | None:
    """The number that the paper prints, as (x, x), or its range "a to b" as (a, b); None for anything else.

    30% is 0.3. A bound ("at most 0.1") is no number to lie beside; of several numbers it isn't clear which to take.
    """
    plain = text.replace("−", "-")
    found = re.findall(rf"({_NUMBER})(%?)", plain)
    if _BOUND.search(plain) or not found:
        return None
    ends = [float(number.replace(",", "")) / (100 if percent else 1) for number, percent in found]
    if len(ends) == 2 and re.search(rf"{_NUMBER}%? to {_NUMBER}", plain) and ends[0] < ends[1]:
        return ends[0], ends[1]
    return (ends[0], ends[0]) if len(ends) == 1 else None


def beside_paper(row: Mapping, claim: Claim) -> Beside | None:
    """The row relative to the paper's number (a range's middle), or None where the two are not of one kind.

    They are if the recorded `baseline` is the paper's number to within 0.5%, and then `ours` lies beside it; or if the
    rule's region has two ends around the paper's number, and then the estimate does. At a border of its region the
    number is a bound, and not compared. Our own predictions and our pilots' numbers are no source.
    """
    if source_of(row) == OWN or "our plan" in row["paper_value"]:
        return None
    printed = paper_range(row["paper_value"])
    if row["estimate"] is None or printed is None or not sum(printed):
        return None
    if _baseline_is(row, printed):
        ends = list(interval(row["ours"])) if isinstance(row["ours"], Mapping) else [float(row["ours"])] * 3
    elif _region_holds(claim, printed):
        ends = [row[key] for key in ("estimate", "low", "high")]
    else:
        return None
    if any(end is None or not math.isfinite(end) for end in ends):
        return None
    middle = sum(printed) / 2
    low, high = sorted((ends[1] / middle, ends[2] / middle))
    return Beside(row["id"], row["notebook"], ends[0] / middle, low, high, (printed[0] / middle, printed[1] / middle))


def _baseline_is(row: Mapping, printed: tuple[float, float]) -> bool:
    if row["baseline"] is None or printed[0] != printed[1]:
        return False
    values = row["baseline"].values() if isinstance(row["baseline"], Mapping) else [row["baseline"]]
    return all(abs(value / printed[0] - 1) < 0.005 for value in values)


def _region_holds(claim: Claim, printed: tuple[float, float]) -> bool:
    low, high = claim.reproduced
    if math.isinf(low) or math.isinf(high):
        return False
    first, last = printed
    return low <= first < last <= high if first < last else low == high == first or low < first < high


# beside the rule's border ----------------------------------------------------------------------------------------

def distance(row: Mapping, claim: Claim) -> float | None:
    """The estimate's distance from the nearest border of `reproduced`, in half widths of its interval; inside is > 0.

    Ratios are measured on the log scale, on which their intervals are symmetric. None without an interval of a width.
    """
    if row["kind"] != "measured" or row["verdict"] not in DECIDED or None in (row["low"], row["high"]):
        return None
    scale = _log if claim.compare == "ours / baseline" else float
    estimate, low, high, left, right = map(scale, (row["estimate"], row["low"], row["high"], *claim.reproduced))
    half = (high - low) / 2
    return min(estimate - left, right - estimate) / half if half > 0 else None


def widened(row: Mapping, claim: Claim, factor: float) -> str:
    """The verdict of the row's interval made `factor` times as wide about its middle (for ratios on the log scale)."""
    if claim.compare == "ours / baseline":
        low, high = _stretched(_log(row["low"]), _log(row["high"]), factor)
        return decide(claim, math.exp(low), math.exp(high))
    return decide(claim, *_stretched(row["low"], row["high"], factor))


def _stretched(low: float, high: float, factor: float) -> tuple[float, float]:
    more = (factor - 1) * (high - low) / 2
    return low - more, high + more


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


# two arms of a seed ----------------------------------------------------------------------------------------------

def pairing(row: Mapping, claim: Claim) -> tuple[float, float] | None:
    """(correlation of the arms over their seeds, width of the unpaired interval / of the paired one), or None.

    For judged rows of "ours - baseline" whose arms and difference vary. The unpaired interval pools the two variances:
    t with 2N - 2 degrees of freedom.
    """
    if row["kind"] != "measured" or row["verdict"] not in DECIDED or claim.compare != "ours - baseline":
        return None
    pairs_N2 = np.array([(row["ours"][seed], row["baseline"][seed]) for seed in row["ours"]])
    difference_N, N = pairs_N2[:, 0] - pairs_N2[:, 1], len(pairs_N2)
    if not (pairs_N2.std(0).all() and difference_N.std()):
        return None
    unpaired = student_quantile(0.975, 2 * N - 2) * math.sqrt(pairs_N2.var(0, ddof=1).sum())
    paired = student_quantile(0.975, N - 1) * difference_N.std(ddof=1)
    return float(np.corrcoef(pairs_N2.T)[0, 1]), float(unpaired / paired)


# surprises -------------------------------------------------------------------------------------------------------

class Surprise(NamedTuple):
    """A row that came out against its statement, one sentence on its control, and the row that shows it (or "")."""

    id: str
    control: str
    shown_by: str


def load_surprises(path: Path | None = None) -> list[Surprise]:
    """The chosen surprises of surprises.toml."""
    rows = tomllib.loads(Path(path or SURPRISES).read_text(encoding="utf-8"))["surprise"]
    return [Surprise(row["id"], row["control"], row.get("shown_by", "")) for row in rows]
