"""The claims ledger: rules are data, verdicts come from the whole interval, and nothing is dropped in silence.

The verdict tests are properties. Whatever the region, an interval inside it is reproduced, one apart from every region
is not, and a narrower interval can only move a verdict that was `inconclusive`.
"""

import dataclasses
import datetime
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from labkit.course.claims import LEAST_SEEDS, VERDICTS, Claim, decide, load_claims, read_claim, verdict
from labkit.course.ledger import KEYS, Ledger, claims_table, judge, shown
from labkit.course.results import read_results
from labkit.errors import LabError
from labkit.measure import interval

CLAIM = Claim(
    id="t.one", notebook="02", kind="measured", paper="p", source="code", statement="s", paper_value="v", setting="s",
    rule="r", written=datetime.date(2026, 11, 22), metric="m", compare="ours - baseline", reproduced=(-math.inf, 0.0),
    min_seeds=3, scales=("desk", "workstation"),
)  # fmt: skip
EXACT = dataclasses.replace(
    CLAIM, id="t.exact", kind="exact", compare="ours", reproduced=(0.0, 0.0), min_seeds=0, scales=("quick", "desk")
)
HOPELESS = dataclasses.replace(
    CLAIM, id="t.hopeless", kind="not_testable", compare="", reproduced=None, min_seeds=0, scales=(), reason="too large"
)
CLAIMS = {claim.id: claim for claim in (CLAIM, EXACT, HOPELESS)}
WON, BASE = {0: 1.0, 1: 1.1, 2: 1.2}, {0: 2.0, 1: 2.15, 2: 2.2}

number = st.floats(-10, 10)
pair = st.tuples(number, number).map(sorted).filter(lambda ends: ends[0] < ends[1]).map(tuple)


def claim_with(reproduced, partly=None):
    return dataclasses.replace(CLAIM, reproduced=reproduced, partly=partly)


# verdicts -------------------------------------------------------------------------------------------------------------


@given(pair, st.none() | pair, pair)
def test_the_verdict_is_what_the_prose_of_the_rule_says(reproduced, partly, ends):
    """Away from the borders the four cases are plain interval arithmetic, written here a second time."""
    low, high = ends
    borders = {*reproduced, *(partly or ())}
    assume(low not in borders and high not in borders)
    inside = reproduced[0] < low and high < reproduced[1]
    inside_partly = partly is not None and partly[0] < low and high < partly[1]
    apart = all(high < region[0] or region[1] < low for region in (reproduced, partly) if region)
    expected = "reproduced" if inside else "partly" if inside_partly else "not reproduced" if apart else "inconclusive"
    assert decide(claim_with(reproduced, partly), low, high) == expected


@given(pair, pair, st.floats(0, 1), st.floats(0, 1))
def test_a_narrower_interval_keeps_a_verdict(reproduced, ends, cut_low, cut_high):
    """Learning more never turns `reproduced` or `not reproduced` into anything else; only `inconclusive` may move."""
    low, high = ends
    middle = (low + high) / 2
    inner = (low + cut_low * (middle - low), high - cut_high * (high - middle))
    assume(low <= inner[0] <= inner[1] <= high)
    before, after = (decide(claim_with(reproduced), *each) for each in (ends, inner))
    assert before in ("inconclusive", after)


@given(pair, st.none() | pair, st.sampled_from([(-math.inf, 0.0), (0.0, math.inf), (-math.inf, math.inf)]))
def test_an_interval_without_a_bound_is_never_reproduced(reproduced, partly, ends):
    assert decide(claim_with(reproduced, partly), *ends) not in ("reproduced", "partly")
    assert decide(claim_with((-math.inf, 0.0), partly), *ends) not in ("reproduced", "partly")
    assert decide(claim_with((1.0, 2.0), (0.0, math.inf)), *ends) not in ("reproduced", "partly")


def test_borders():
    sign = claim_with((-math.inf, 0.0))
    assert decide(sign, 0.0, 0.0) == "not reproduced", "exactly no difference is no win"
    assert decide(sign, -1.0, 0.0) == "inconclusive", "the interval holds 0"
    assert decide(sign, 0.0, 1.0) == "not reproduced"
    two = claim_with((-math.inf, 0.0), (0.0, 0.5))
    assert decide(two, 0.0, 0.0) == "partly", "a shared border belongs to `partly`"
    assert decide(two, 0.0, 0.5) == "partly"
    assert decide(two, -0.1, 0.4) == "inconclusive"
    assert decide(EXACT, 0.0, 0.0) == "reproduced"
    assert decide(EXACT, 1e-12, 1e-12) == "not reproduced"


@pytest.mark.parametrize(
    ("scale", "seeds", "expected"),
    [("desk", 3, "reproduced"), ("desk", 2, "inconclusive"), ("quick", 1, "live"), ("quick", 9, "live")],
)
def test_too_few_seeds_and_other_scales_give_no_verdict(scale, seeds, expected):
    found, note = verdict(CLAIM, scale, seeds, -2.0, -1.0)
    assert found == expected and bool(note) == (expected != "reproduced")


def test_one_seed_never_reproduces_whatever_the_rule():
    for claim in load_claims().values():
        if claim.kind == "measured":
            ours, baseline = {0: 1.0}, {0: 1.0} if claim.needs_baseline else None
            assert judge(claim, "desk", ours, baseline).verdict == "inconclusive"


# claims.toml ----------------------------------------------------------------------------------------------------------


def row(**changes):
    base = {
        "id": "t.one", "notebook": "02", "kind": "measured", "paper": "p", "source": "code", "statement": "s",
        "paper_value": "v", "setting": "s", "rule": "r", "written": datetime.date(2026, 11, 22), "metric": "m",
        "compare": "ours - baseline", "reproduced": [-math.inf, 0.0], "min_seeds": 3, "scales": ["desk"],
    }  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


LATER = {"date": datetime.date(2026, 12, 1), "reason": "r"}
UNTESTED = {"kind": "not_testable", "compare": None, "reproduced": None, "min_seeds": None, "scales": None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"id": "Loss"}, "`id`"),
        ({"notebook": "2"}, "`notebook`"),
        ({"kind": "guess"}, "`kind`"),
        ({"source": "hearsay"}, "`source`"),
        ({"statement": ""}, "`statement`"),
        ({"rule": None}, "`rule`"),
        ({"metric": None}, "`metric`"),
        ({"compare": "baseline - ours"}, "`compare`"),
        ({"reproduced": None}, "`reproduced`"),
        ({"reproduced": [1.0, 0.0]}, "`reproduced`"),
        ({"reproduced": [0.0, 0.0]}, "`reproduced`"),
        ({"reproduced": [math.nan, 0.0]}, "`reproduced`"),
        ({"reproduced": [-math.inf, math.inf]}, "`reproduced`"),
        ({"partly": [0.0]}, "`partly`"),
        ({"min_seeds": 1}, "`min_seeds`"),
        ({"scales": ["laptop"]}, "`scales`"),
        ({"scales": []}, "`scales`"),
        ({"written": "2026-11-22"}, "`written`"),
        ({"changes": [{"date": datetime.date(2026, 12, 1)}]}, "`changes`"),
        ({"changes": [{"date": datetime.date(2026, 1, 1), "reason": "r"}]}, "`changes`"),
        ({"colour": "red"}, "`colour`"),
        ({"kind": "exact"}, "`min_seeds`"),
        (UNTESTED, "`reason`"),
        ({**UNTESTED, "reason": "r", "scales": ["desk"]}, "`scales`"),
    ],
)
def test_a_bad_row_is_refused_by_name_and_field(changes, named):
    read_claim(row(changes=[LATER]))  # the row is good before the change, so the change is what is refused
    with pytest.raises(LabError, match=named):
        read_claim(row(**changes))


def test_the_same_id_twice_is_refused(tmp_path):
    text = '[[claim]]\nid = "t.a"\nnotebook = "02"\nkind = "not_testable"\npaper = "p"\nsource = "code"\n'
    text += 'statement = "s"\npaper_value = "v"\nsetting = "s"\nrule = "r"\nreason = "r"\nwritten = 2026-11-22\n'
    (tmp_path / "claims.toml").write_text(text * 2)
    with pytest.raises(LabError, match=r"t\.a.*twice"):
        load_claims(tmp_path / "claims.toml")
    (tmp_path / "claims.toml").write_text("[[claim]\n")
    with pytest.raises(LabError, match="can't be read"):
        load_claims(tmp_path / "claims.toml")


# recording ------------------------------------------------------------------------------------------------------------


def test_record_keeps_what_was_measured_and_judges_it():
    ledger = Ledger("02", "desk", "cpu", claims=CLAIMS)
    judged = ledger.record("t.one", {seed: torch.tensor(value) for seed, value in WON.items()}, BASE)
    assert judged.verdict == "reproduced"
    assert (judged.estimate, judged.low, judged.high) == pytest.approx(interval(WON, BASE), rel=1e-6)
    ledger.record("t.exact", np.float64(0.0))
    assert [row["seeds"] for row in ledger.rows] == [[0, 1, 2], []]
    assert json.loads(json.dumps(ledger.rows))[1]["ours"] == 0.0, "tensors and numpy numbers become plain ones"
    assert ledger.table()[1]["verdict"] == "reproduced"


def test_a_second_record_replaces_the_first():
    ledger = Ledger("02", "desk", "cpu", claims=CLAIMS)
    ledger.record("t.one", WON, BASE)
    ledger.record("t.one", BASE, WON)
    assert [row["verdict"] for row in ledger.table()] == ["not reproduced"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("t.none", WON, BASE), "no claim 't.none'"),
        (("t.hopeless", 1.0), "not testable"),
        (("t.one", WON), "needs a baseline"),
        (("t.exact", 1.0, 1.0), "takes no baseline"),
        (("t.exact", WON), "exact"),
        (("t.exact", math.nan), "finite"),
        (("t.one", [1.0, 2.0], [1.0, 2.0]), "over seeds"),
        (("t.one", {0: 1.0}, {1: 1.0}), "partner"),
        (("t.one", {0: math.inf}, {0: 1.0}), "not finite"),
        (("t.one", {"a": 1.0}, {"a": 1.0}), "whole number"),
    ],
)
def test_a_bad_record_is_refused_and_keeps_nothing(arguments, said):
    ledger = Ledger("02", "desk", "cpu", claims=CLAIMS)
    with pytest.raises(LabError, match=said):
        ledger.record(*arguments)
    assert ledger.rows == []


def test_claims_of_another_notebook_are_unknown():
    with pytest.raises(LabError, match="no claim"):
        Ledger("03", "desk", "cpu", claims=CLAIMS).record("t.one", WON, BASE)
    with pytest.raises(LabError, match="scale"):
        Ledger("02", "laptop", "cpu", claims=CLAIMS)


# results and the table ------------------------------------------------------------------------------------------------


def write_result(root, scale, rows, notebook="02", device="cpu"):
    folder = root / scale / "gpu" if scale == "workstation" else root / scale
    folder.mkdir(parents=True, exist_ok=True)
    head = {"notebook": notebook, "scale": scale, "device": device, "commit": "c", "versions": {}, "seeds": [0]}
    result = {**head, "seconds": 1.0, "peak_gb": 0.1, "rows": rows}
    (folder / f"{notebook}.json").write_text(json.dumps(result))
    return folder / f"{notebook}.json"


@pytest.fixture
def shipped(tmp_path):
    """Results written by the ledger itself at two scales."""
    for scale, seeds in (("quick", [0]), ("desk", [0, 1, 2])):
        ledger = Ledger("02", scale, "cpu", claims=CLAIMS)
        ledger.record("t.one", {seed: WON[seed] for seed in seeds}, {seed: BASE[seed] for seed in seeds})
        write_result(tmp_path, scale, ledger.rows)
    return tmp_path


def test_the_table_has_a_row_a_claim_and_scale_with_exactly_the_agreed_keys(shipped):
    rows = claims_table(shipped, claims=CLAIMS)
    assert all(tuple(row) == KEYS for row in rows)
    assert [(row["id"], row["scale"], row["verdict"]) for row in rows] == [
        ("t.one", "quick", "live"),
        ("t.one", "desk", "reproduced"),
        ("t.exact", "", "not run yet"),
        ("t.hopeless", "", "not testable here"),
    ]
    assert rows[0]["low"] is None and rows[0]["high"] is None
    desk = rows[1]
    assert (desk["ours"], desk["baseline"], desk["seeds"]) == (WON, BASE, [0, 1, 2])
    assert (desk["estimate"], desk["low"], desk["high"]) == interval(WON, BASE)
    json.dumps(rows, allow_nan=False)  # strict JSON: no Infinity, no NaN


def test_the_verdict_is_computed_again_from_the_values(tmp_path):
    """A verdict written into the file by hand changes nothing; changed values do."""
    row = {"id": "t.one", "ours": BASE, "baseline": WON, "seeds": [0, 1, 2], "verdict": "reproduced"}
    write_result(tmp_path, "desk", [row])
    assert claims_table(tmp_path, claims=CLAIMS)[0]["verdict"] == "not reproduced"


def test_a_result_without_its_claim_is_an_error(shipped):
    """Deleting an unwelcome row from claims.toml must not make its result disappear quietly."""
    with pytest.raises(LabError, match=r"t\.one"):
        claims_table(shipped, claims={"t.exact": EXACT})
    elsewhere = dataclasses.replace(CLAIM, notebook="03")
    with pytest.raises(LabError, match=r"no claim of notebook 02"):
        claims_table(shipped, claims={"t.exact": EXACT, "t.one": elsewhere})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text(path.read_text()[:40]), "can't be read"),
        (lambda path: path.write_text("[]"), "lacks"),
        (lambda path: path.write_text(path.read_text().replace('"commit"', '"comet"')), "lacks commit"),
        (lambda path: path.write_text(path.read_text().replace('"desk"', '"quick"')), "another place"),
        (lambda path: path.write_text(path.read_text().replace('"ours"', '"theirs"')), "row without ours"),
    ],
)
def test_a_broken_results_file_is_named(shipped, spoil, said):
    path = shipped / "desk" / "02.json"
    spoil(path)
    with pytest.raises(LabError, match=said) as caught:
        read_results(shipped)
    assert str(path) in str(caught.value)


def test_a_notebooks_own_table_shows_all_scales(shipped):
    ledger = Ledger("02", "quick", "cpu", claims=CLAIMS)
    ledger.record("t.one", {5: 1.0}, {5: 2.0})
    rows = ledger.table_rows(shipped)
    assert list(rows[0]) == ["claim", "paper", "quick (just now)", "desk", "workstation", "verdict"]
    assert rows[0]["quick (just now)"] == "-1 (1 seed, no interval)", "the live value, not the shipped quick one"
    assert rows[0]["desk"].startswith("-1.017 [") and rows[0]["verdict"] == "reproduced (desk)"
    assert [row["verdict"] for row in rows[1:]] == ["not run yet", "not testable here"]


def test_numbers_are_shown_as_precisely_as_their_interval():
    row = {"kind": "measured", "estimate": -0.14712, "low": -0.16049, "high": -0.13375, "seeds": [0, 1, 2]}
    assert shown(row) == "-0.147 [-0.160, -0.134], 3 seeds"
    assert shown({**row, "estimate": 812.34, "low": 780.2, "high": 844.5}) == "812 [780, 844], 3 seeds"
    assert shown({**row, "kind": "exact", "estimate": 8.599e8}) == "8.599e+08"


# the shipped claims ---------------------------------------------------------------------------------------------------


def test_the_shipped_claims_are_valid_and_say_what_was_asked():
    claims = load_claims()
    assert {"tst.loss", "tst.equal_data", "tst.reinit", "tst.token_ledger", "tst.boolq", "hw.matmul"} <= set(claims)
    for claim in claims.values():
        assert claim.kind != "measured" or claim.min_seeds >= LEAST_SEEDS
        assert claim.kind != "exact" or claim.min_seeds == 0
        assert claim.kind != "not_testable" or claim.reason
        assert claim.written >= datetime.date(2026, 11, 22)


def test_the_shipped_results_fit_the_shipped_claims():
    assert {row["verdict"] for row in claims_table()} <= set(VERDICTS)
