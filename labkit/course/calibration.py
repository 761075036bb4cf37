"""How good a reader's predictions are: stated chances beside what happened, and picked answers beside guessing.

Calibration: of the predictions stated with chance p, the share that came true should be p. Brier score:
mean (p - happened)^2; always saying 50% scores 0.25 (Brier 1950, "Verification of Forecasts Expressed in Terms of
Probability"). Shares carry Wilson's interval (1927), which stays within 0 and 1 and is honest at small counts.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labkit.course.ledger_views import DECIDED, OWN, source_of

CHANCES = {"5%": 0.05, "25%": 0.25, "50%": 0.50, "75%": 0.75, "95%": 0.95}
LEANING = ("It ", "So ", "The same ")  # how a statement begins that leans on the one before it
ASKED = "claim "  # a stated chance is kept under the key "claim <id>"

Pair = tuple[float, bool]  # (stated chance, whether it happened)


class Bin(NamedTuple):
    """All predictions of one stated chance."""

    stated: float
    share: float
    low: float
    high: float
    count: int


def claims_to_ask(rows: Sequence[Mapping], count: int = 8) -> list[Mapping]:
    """`count` measured rows of papers with a verdict, from as many labs as there are; the draw is a hash of the id.

    A row whose statement leans on the one before it, or whose source says nothing, can't be judged by itself.
    """
    suited = [row for row in rows if row["kind"] == "measured" and row["verdict"] in DECIDED and source_of(row) != OWN
              and not row["statement"].startswith(LEANING) and row["paper_value"] != "none"]
    shuffled = sorted(suited, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    turn = {row["id"]: sum(other["notebook"] == row["notebook"] for other in shuffled[:place])
            for place, row in enumerate(shuffled)}
    return sorted(shuffled, key=lambda row: turn[row["id"]])[:count]  # stable: within a turn the hash decides


def stated_chances(kept: Mapping[str, Mapping], rows: Sequence[Mapping]) -> list[Pair]:
    """(stated chance, reproduced or not) of a reader's stored answers, for claims that have a verdict."""
    verdict = {row["id"]: row["verdict"] for row in rows if row["verdict"] in DECIDED}
    answers = {key.removeprefix(ASKED): said["answer"] for key, said in kept.items() if key.startswith(ASKED)}
    return [(CHANCES[answer], verdict[name] == "reproduced") for name, answer in answers.items()
            if answer in CHANCES and name in verdict]


def picked_answers(kept: Mapping[str, Mapping[str, Mapping]]) -> list[dict]:
    """Every revealed prediction of all labs: lab, question, said, measured, right, and the chance of a blind guess."""
    return [{"lab": notebook, "question": said["question"], "said": said["answer"], "measured": said["measured"],
             "right": said["answer"] == said["measured"], "guess": 1 / said["options"] if said.get("options") else None}
            for notebook, by_key in sorted(kept.items()) for said in by_key.values() if "measured" in said]


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share `hits / count`."""
    p, spread = hits / count, z * z / count
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration(pairs: Sequence[Pair]) -> list[Bin]:
    """For each stated chance the share that happened, with its interval."""
    bins = []
    for stated in sorted({chance for chance, _ in pairs}):
        happened = [came for chance, came in pairs if chance == stated]
        bins.append(Bin(stated, sum(happened) / len(happened), *wilson(sum(happened), len(happened)), len(happened)))
    return bins


def brier(pairs: Sequence[Pair]) -> float:
    """Mean squared distance of the stated chance from what happened (0 or 1); lower is better."""
    return sum((chance - came) ** 2 for chance, came in pairs) / len(pairs)


def made_example() -> list[Pair]:
    """A made reader, too sure of everything: 75 predictions, five chances. Nobody's answers."""
    hits = {0.05: 3, 0.25: 5, 0.50: 8, 0.75: 9, 0.95: 11}
    return [(chance, place < hit) for chance, hit in hits.items() for place in range(15)]
