"""The claims ledger: a notebook records what it measured, and the rule of the claim decides.

    ledger = Ledger("02", "desk", "cpu")
    ledger.record("tst.loss", ours={0: 6.18, 1: 6.17, ...}, baseline={0: 6.33, 1: 6.32, ...})
`estimate` and its 95% interval come from labkit.measure.interval, paired by seed; the verdict from the whole interval
(labkit/course/claims.py). `claims_table()` joins the claims with the results that are shipped in data/results.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from pathlib import Path

from labkit.course.claims import COMPARISONS, Claim, load_claims, verdict
from labkit.course.results import read_results
from labkit.course.scale import check_scale
from labkit.errors import LabError
from labkit.measure.intervals import Seeded, interval

KEYS = (
    "id", "kind", "notebook", "paper", "source", "statement", "paper_value", "rule",
    "scale", "device", "ours", "baseline", "estimate", "low", "high", "seeds", "verdict",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Recorded values under a rule: the number that the rule compares, its interval, the verdict."""

    estimate: float
    low: float
    high: float
    seeds: list[int]
    verdict: str
    note: str


def judge(claim: Claim, scale: str, ours: Seeded | float, baseline: Seeded | float | None) -> Judged:
    """Estimate, interval and verdict of one claim. Raises LabError if the values don't suit the rule."""
    if claim.kind == "not_testable":
        raise LabError(f"Claim {claim.id} is marked as not testable.", "Give it a rule in claims.toml first.")
    if claim.needs_baseline != (baseline is not None):
        wanted = "needs a baseline" if claim.needs_baseline else "compares `ours` alone and takes no baseline"
        raise LabError(f"Claim {claim.id} {wanted}.", "Record what its `compare` in claims.toml asks for.")
    if claim.exact:
        value = _exact_value(claim, ours, baseline)
        return Judged(value, value, value, [], *verdict(claim, scale, 0, value, value))
    if not isinstance(ours, Mapping):
        raise LabError(f"Claim {claim.id} is measured over seeds.", "Record {seed: value}.")
    estimate, low, high = interval(ours, baseline, compare=COMPARISONS[claim.compare])
    return Judged(estimate, low, high, sorted(ours), *verdict(claim, scale, len(ours), low, high))


def _exact_value(claim: Claim, ours: object, baseline: object) -> float:
    for value in (ours, baseline) if claim.needs_baseline else (ours,):
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise LabError(f"Claim {claim.id} is exact; {value!r} is not a finite number.", "Record one number.")
    if claim.compare == "ours":
        return float(ours)
    if claim.compare == "ours - baseline":
        return float(ours) - float(baseline)
    if not baseline:
        raise LabError(f"Claim {claim.id} divides by a baseline of zero.", "Record a baseline that is not zero.")
    return float(ours) / float(baseline)


class Ledger:
    """The claims of one notebook in one run. It keeps the rows; labkit/course/record.py writes them.

    `rows` is a list of {id, ours, baseline, seeds}: what was measured, without a verdict.
    """

    def __init__(self, notebook: str, scale: str, device: str, *, claims: Mapping[str, Claim] | None = None):
        self.notebook, self.scale, self.device = notebook, check_scale(scale), str(device)
        everything = load_claims() if claims is None else claims
        self.claims = {name: claim for name, claim in everything.items() if claim.notebook == notebook}
        self.rows: list[dict] = []

    def record(self, claim_id: str, ours: Seeded | float, baseline: Seeded | float | None = None) -> Judged:
        """Judge and keep one claim's values: mappings seed -> value, or plain numbers for an exact claim.

        A later record of the same claim replaces the earlier one. Raises LabError, and keeps nothing, for an unknown
        claim or values that the rule can't take.
        """
        if claim_id not in self.claims:
            known = ", ".join(self.claims) or "none"
            raise LabError(f"Notebook {self.notebook} has no claim {claim_id!r}.", f"It has: {known}.")
        ours, baseline = _plain(ours), _plain(baseline)
        judged = judge(self.claims[claim_id], self.scale, ours, baseline)
        self.rows = [row for row in self.rows if row["id"] != claim_id]
        self.rows.append({"id": claim_id, "ours": ours, "baseline": baseline, "seeds": judged.seeds})
        return judged

    def table(self) -> list[dict]:
        """This run's recorded claims, with the keys of `claims_table`."""
        return [table_row(self.claims[row["id"]], self.scale, self.device, row) for row in self.rows]

    def table_rows(self, results_folder: Path | None = None) -> list[dict[str, str]]:
        """For readers: claim, paper, one column a scale (this run's says "just now"), and the verdicts."""
        table = claims_table(results_folder, claims=self.claims)
        shipped = [row for row in table if row["scale"] not in ("", self.scale)]
        return [self._table_row(claim, shipped) for claim in self.claims.values()]

    def _table_row(self, claim: Claim, shipped: list[dict]) -> dict[str, str]:
        rows = [row for row in [*shipped, *self.table()] if row["id"] == claim.id]
        cells = {"claim": claim.statement, "paper": claim.paper_value}
        for scale in ("quick", "desk", "workstation"):
            heading = f"{scale} (just now)" if scale == self.scale else scale
            cells[heading] = "; ".join(shown(row) for row in rows if row["scale"] == scale)
        return {**cells, "verdict": final_verdict(claim, rows)}


def final_verdict(claim: Claim, rows: list[dict]) -> str:
    """The verdicts with their scales, fullest scale first; `live` shows only where there is no other."""
    if claim.kind == "not_testable":
        return "not testable here"
    decided = [row for row in rows if row["verdict"] != "live"] or rows
    if len(verdicts := {row["verdict"] for row in decided}) == 1 and (claim.exact or verdicts == {"live"}):
        return verdicts.pop()
    order = ("workstation", "desk", "quick")
    decided = sorted(decided, key=lambda row: order.index(row["scale"]))
    return "; ".join(f"{row['verdict']} ({row['scale']})" for row in decided) or "not run yet"


def claims_table(results_folder: Path | None = None, *, claims: Mapping[str, Claim] | None = None) -> list[dict]:
    """One row a claim, scale and device that has a result, with exactly the keys KEYS; a claim without any has one row.

    `ours` and `baseline` are {seed: value}, or a number for an exact claim; a bound that one seed can't give is None.
    Raises LabError for a result whose claim does not exist, or exists for another notebook.
    """
    claims = load_claims() if claims is None else claims
    notebooks = {claim.notebook for claim in claims.values()}
    found: dict[str, list[dict]] = {name: [] for name in claims}
    for result in read_results(results_folder):
        for row in result["rows"] if result["notebook"] in notebooks else ():
            if row["id"] not in claims or claims[row["id"]].notebook != result["notebook"]:
                where = f"{result['notebook']}.json ({result['scale']})"
                raise LabError(
                    f"{where} has a result for {row['id']!r}, which is no claim of notebook {result['notebook']}.",
                    "Put the row back into claims.toml or run the notebook again: no result is dropped in silence.",
                )
            found[row["id"]].append(table_row(claims[row["id"]], result["scale"], result["device"], row))
    return [row for name, claim in claims.items() for row in found[name] or [_empty_row(claim)]]


def table_row(claim: Claim, scale: str, device: str, row: Mapping) -> dict:
    """One line of `claims_table` from recorded values."""
    judged = judge(claim, scale, row["ours"], row["baseline"])
    measured = {"scale": scale, "device": device, "ours": row["ours"], "baseline": row["baseline"]}
    bounds = {"low": _bound(judged.low), "high": _bound(judged.high)}
    decided = {"estimate": judged.estimate, **bounds, "seeds": judged.seeds, "verdict": judged.verdict}
    return {**_empty_row(claim), **measured, **decided}


def _empty_row(claim: Claim) -> dict:
    told = {key: getattr(claim, key) for key in KEYS[:8]}
    nothing = {"scale": "", "device": "", **dict.fromkeys(("ours", "baseline", "estimate", "low", "high")), "seeds": []}
    return {**told, **nothing, "verdict": "not testable here" if claim.kind == "not_testable" else "not run yet"}


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(arm: object) -> object:
    """Tensors and numpy numbers as plain ones, so that JSON can hold them; anything odd is left for `judge` to name."""
    if isinstance(arm, Mapping):
        try:
            return {index(seed): _plain(value) for seed, value in arm.items()}
        except TypeError as error:
            raise LabError("A seed is not a whole number.", "Record {seed: value} with the seeds that ran.") from error
    return arm.item() if getattr(arm, "shape", None) == () else arm


def where(row: Mapping) -> str:
    """The scale of a row, with its device on a GPU: 'desk', 'workstation (NVIDIA H200)'; '' if it was not run."""
    return row["scale"] + (f" ({row['device']})" if row["scale"] == "workstation" else "")


def shown(row: Mapping) -> str:
    """Estimate with its interval, to two significant digits of the interval's half width: '-0.147 [-0.160, -0.134]'."""
    if row["estimate"] is None:
        return ""
    if row["kind"] == "exact":
        whole = row["estimate"] == round(row["estimate"]) and abs(row["estimate"]) < 1e6
        return f"{row['estimate']:,.0f}" if whole else f"{row['estimate']:.4g}"
    seeds = f"{len(row['seeds'])} seed" + ("s" if len(row["seeds"]) != 1 else "")
    if row["low"] is None or row["high"] is None:
        return f"{row['estimate']:.3g} ({seeds}, no interval)"
    half = (row["high"] - row["low"]) / 2
    digits = min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    numbers_ = [f"{row[key]:.{digits}f}" for key in ("estimate", "low", "high")]
    return f"{numbers_[0]} [{numbers_[1]}, {numbers_[2]}], {seeds}"
