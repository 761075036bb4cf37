"""A claim of a paper, the rule that decides it, and the verdict: read from claims.toml, decided by code.

A rule is data. `compare` says what is estimated; `reproduced` and `partly` are regions on that number. The verdict
looks at the *whole* 95% interval over seeds, not at the estimate:
    inside `reproduced` -> reproduced;  inside `partly` -> partly;  outside both -> not reproduced;  else inconclusive.
Borders. For a measured claim `reproduced` is open at its finite ends and `partly` is closed: under
`reproduced = [-inf, 0]` a difference of exactly 0 in every seed is no win (it lies outside), and a point on a border
that the two regions share is `partly`. For an exact claim both regions are closed: `reproduced = [0, 0]` can hold.
"""

import datetime
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from labkit.course.scale import SCALES
from labkit.errors import LabError

CLAIMS_FILE = Path(__file__).with_name("claims.toml")
KINDS = ("measured", "exact", "not_testable")
SOURCES = ("full text", "abstract", "code", "reader's note")  # how the paper's number was seen
COMPARISONS = {"ours - baseline": "difference", "ours / baseline": "ratio", "ours": "difference"}
VERDICTS = ("reproduced", "partly", "not reproduced", "inconclusive", "live", "not testable here", "not run yet")
LEAST_SEEDS = 3  # one seed never makes `reproduced`, and two have a Student interval that says next to nothing

Region = tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """One row of claims.toml; the head of that file says what each field means."""

    id: str
    notebook: str
    kind: str
    paper: str
    source: str
    statement: str
    paper_value: str
    setting: str
    rule: str
    written: datetime.date
    metric: str = ""
    compare: str = ""
    reproduced: Region | None = None
    partly: Region | None = None
    min_seeds: int = 0
    scales: tuple[str, ...] = ()
    reason: str = ""
    changes: tuple[Mapping[str, object], ...] = field(default=())

    @property
    def needs_baseline(self) -> bool:
        return self.compare != "ours"

    @property
    def exact(self) -> bool:
        return self.kind == "exact"


def load_claims(path: Path | None = None) -> dict[str, Claim]:
    """id -> Claim, in the file's order. Raises LabError naming the row and the field that is wrong."""
    path = Path(path or CLAIMS_FILE)
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("claim", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LabError(f"The claims in {path} can't be read: {error}.", "Every row is a [[claim]].") from error
    claims: dict[str, Claim] = {}
    for number, row in enumerate(rows, start=1):
        claim = read_claim(row, number)
        if claim.id in claims:
            _refuse(claim.id, "id", "stands twice in the file")
        claims[claim.id] = claim
    return claims


def read_claim(row: Mapping[str, object], number: int = 1) -> Claim:
    """One row checked and made a Claim."""
    name = str(row.get("id") or f"number {number}")
    known = {each.name: each for each in fields(Claim)}
    for key in row:
        if key not in known:
            _refuse(name, key, "is not a field of a claim")
    for key in ("id", "notebook", "kind", "paper", "source", "statement", "paper_value", "setting", "rule"):
        if not isinstance(row.get(key), str) or not row[key]:
            _refuse(name, key, "must be a text that is not empty")
    _check_words(name, row)
    _check_dates(name, row)
    {"measured": _check_measured, "exact": _check_exact, "not_testable": _check_not_testable}[row["kind"]](name, row)
    lists = {key: tuple(row[key]) for key in ("reproduced", "partly", "scales", "changes") if key in row}
    return Claim(**{**row, **lists})


def _refuse(name: str, key: str, problem: str) -> None:
    raise LabError(f"Claim {name}, field `{key}`: {problem}.", "Mend the row in labkit/course/claims.toml.")


def _check_words(name: str, row: Mapping) -> None:
    if not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9_]+)+", row["id"]):
        _refuse(name, "id", "must look like `tst.loss`")
    if not re.fullmatch(r"\d\d", row["notebook"]):
        _refuse(name, "notebook", 'must be two digits, like "02"')
    if row["kind"] not in KINDS:
        _refuse(name, "kind", f"must be one of {', '.join(KINDS)}")
    if not row["source"].startswith(SOURCES):
        _refuse(name, "source", f"must begin with how the number was seen: {', '.join(SOURCES)}")


def _check_dates(name: str, row: Mapping) -> None:
    if type(row.get("written")) is not datetime.date:
        _refuse(name, "written", "must be the day the rule was written, like 2026-11-22")
    for change in row.get("changes", []):
        whole = isinstance(change, dict) and set(change) == {"date", "reason"} and bool(change["reason"])
        if not whole or type(change["date"]) is not datetime.date:
            _refuse(name, "changes", "each change is {date = 2026-11-22, reason = \"...\"}")
        if change["date"] < row["written"]:
            _refuse(name, "changes", "a change can't be older than the rule")


def _check_rule(name: str, row: Mapping) -> None:
    """What measured and exact claims share: comparison, regions, metric, scales."""
    if row.get("compare") not in COMPARISONS:
        _refuse(name, "compare", f"must be one of {', '.join(COMPARISONS)}")
    if not row.get("metric"):
        _refuse(name, "metric", "must say which number is recorded, with its unit")
    scales = row.get("scales")
    if not scales or not set(scales) <= set(SCALES):
        _refuse(name, "scales", f"must be a list out of {', '.join(SCALES)}")
    for key in ("reproduced", "partly"):
        region = row.get(key)
        if region is None and key == "partly":
            continue
        numbers = isinstance(region, list) and len(region) == 2 and all(type(end) in (int, float) for end in region)
        if not numbers or not region[0] <= region[1]:  # also refuses nan, which compares false
            _refuse(name, key, "must be [low, high] with low <= high (inf is allowed)")
        if all(map(math.isinf, region)):
            _refuse(name, key, "holds every number, so no result could miss it")


def _check_measured(name: str, row: Mapping) -> None:
    _check_rule(name, row)
    if row["reproduced"][0] == row["reproduced"][1]:
        _refuse(name, "reproduced", "an open region needs low < high, or nothing can lie inside")
    if type(row.get("min_seeds")) is not int or row["min_seeds"] < LEAST_SEEDS:
        _refuse(name, "min_seeds", f"must be a whole number of at least {LEAST_SEEDS}")


def _check_exact(name: str, row: Mapping) -> None:
    _check_rule(name, row)
    if row.get("min_seeds", 0) != 0:
        _refuse(name, "min_seeds", "an exact claim needs no seeds; leave the field out")


def _check_not_testable(name: str, row: Mapping) -> None:
    if not row.get("reason"):
        _refuse(name, "reason", "must say why no scale of the course can test it")
    for key in ("compare", "reproduced", "partly", "min_seeds", "scales"):
        if key in row:
            _refuse(name, key, "has no place in a claim that is not testable")


def decide(claim: Claim, low: float, high: float) -> str:
    """The verdict of an interval [low, high], whatever the scale and the seeds. Borders: see the head of this file."""
    if _inside(claim.reproduced, low, high, open_ends=not claim.exact):
        return "reproduced"
    if claim.partly and _inside(claim.partly, low, high, open_ends=False):
        return "partly"
    if _outside(claim.reproduced, low, high, open_ends=not claim.exact) and (
        claim.partly is None or _outside(claim.partly, low, high, open_ends=False)
    ):
        return "not reproduced"
    return "inconclusive"


def _inside(region: Region, low: float, high: float, *, open_ends: bool) -> bool:
    """[low, high] within the region. An interval without a bound lies inside nothing: it has learned nothing there."""
    if math.isinf(low) or math.isinf(high):
        return False
    if open_ends:
        return region[0] < low and high < region[1]
    return region[0] <= low and high <= region[1]


def _outside(region: Region, low: float, high: float, *, open_ends: bool) -> bool:
    """No number is both in [low, high] and in the region."""
    if open_ends:
        return high <= region[0] or low >= region[1]
    return high < region[0] or low > region[1]


def verdict(claim: Claim, scale: str, seeds: int, low: float, high: float) -> tuple[str, str]:
    """(verdict, note): `decide` where the rule allows a verdict at all; the note says why where it does not."""
    if scale not in claim.scales:
        note = f"the rule is written for {' and '.join(claim.scales)}"
    elif not claim.exact and seeds < claim.min_seeds:
        note = f"{seeds} of the {claim.min_seeds} seeds that the rule asks for"
    else:
        return decide(claim, low, high), ""
    return ("live" if scale == "quick" else "inconclusive"), note
