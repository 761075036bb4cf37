"""Lab 16's tools: views of the ledger lose nothing, the browser shows what it says, calibration is honest."""

import math
import statistics

import pytest

from labkit.course import calibration, display, ledger_browser, ledger_views, predict
from labkit.course.claims import decide, load_claims
from labkit.course.ledger import claims_table, table_row
from labkit.course.ledger_views import (
    DECIDED,
    OWN,
    beside_paper,
    distance,
    fullest,
    load_surprises,
    matching,
    pairing,
    paper_range,
    widened,
)
from labkit.errors import LabError
from labkit.measure import interval
from labkit.measure.intervals import student_quantile


@pytest.fixture(scope="module")
def claims():
    return load_claims()


@pytest.fixture(scope="module")
def rows():
    """The shipped ledger, whatever is in it today."""
    return claims_table()


def row(name="t.one", scale="desk", verdict="reproduced", **changes):
    base = {
        "id": name, "kind": "measured", "notebook": "02", "paper": "2605.06546 A Paper", "source": "code",
        "statement": f"Claim {name}.", "paper_value": "0.5", "rule": "r", "scale": scale, "device": "cpu",
        "ours": {0: 1.0, 1: 2.0, 2: 3.0}, "baseline": None, "estimate": -2.0, "low": -3.0, "high": -1.0,
        "seeds": [0, 1, 2], "verdict": verdict,
    }  # fmt: skip
    return {**base, **changes}


# views ------------------------------------------------------------------------------------------------------------

def test_each_claim_is_counted_once_at_its_fullest_scale(rows, claims):
    """Every claim of the file has exactly one row, and no quick row stands where a desk row exists."""
    chosen = fullest(rows)
    assert [each["id"] for each in chosen] == list(claims)
    at_desk = {each["id"] for each in rows if each["scale"] == "desk"}
    assert at_desk and all(each["scale"] in ("desk", "workstation") for each in chosen if each["id"] in at_desk)
    two = [row(scale="workstation", device="gpu"), row(scale="quick"), row(scale="desk")]
    assert fullest(two) == two[:1]


def test_filters_keep_what_they_name_and_only_that(rows):
    """For each filter the parts add up to the whole; words are all needed, in any case."""
    for key in ("notebook", "verdict", "scale", "device"):
        values = {each[key] for each in rows} - {""}
        empty = sum(not each[key] for each in rows)
        assert sum(len(matching(rows, **{key: value})) for value in values) == len(rows) - empty
    own = matching(rows, paper=OWN)
    assert own and all(each["paper"].startswith("One-GPU Lab") for each in own)
    found = matching(rows, text="BASELINE lower", verdict="reproduced")
    assert found and all("baseline" in (said := f"{each['id']} {each['statement']} {each['paper']}".lower())
                         and "lower" in said and each["verdict"] == "reproduced" for each in found)
    assert matching(rows) == rows and matching(rows, text="no such word at all") == []


def test_counts_lose_no_row_and_shares_are_of_decided_rows(rows):
    counted = ledger_views.counts(rows, ledger_views.source_of)
    assert sum(count.total() for count in counted.values()) == len(rows)
    assert set(ledger_views.source_names(rows)) == set(counted)
    assert sum(ledger_views.share(rows, verdict) for verdict in DECIDED) == pytest.approx(1)
    assert math.isnan(ledger_views.share([row(verdict="live")]))
    with pytest.raises(LabError, match="no verdict"):
        ledger_views.share(rows, "true")


@pytest.mark.parametrize(("text", "found"), [
    ("60", (60, 60)), ("about 60", (60, 60)), ("1 to 2 nats", (1, 2)), ("about 30%", (0.3, 0.3)),
    ("−1.25", (-1.25, -1.25)), ("8.6e8", (8.6e8, 8.6e8)), ("32,768", (32768, 32768)), ("54.9 against 51.2", None),
    ("at most 0.1 rad", None), ("O(T^4), worst case", None), ("none", None), ("2.6 to 0.4", None),
])  # fmt: skip
def test_a_printed_number_is_read_or_left_alone(text, found):
    """One number or one rising range; bounds and lists of numbers are no number to lie beside."""
    assert paper_range(text) == (pytest.approx(found) if found else None)


def test_beside_the_paper_means_divided_by_its_number(claims):
    """A two-ended region around the number, or a baseline that is the number; anything else is not compared."""
    around = claims["cot.rho"]
    assert around.compare == "ours" and around.reproduced[0] < 60 < around.reproduced[1]
    measured = table_row(around, "desk", "cpu", {"ours": {0: 90.0, 1: 120.0, 2: 150.0}, "baseline": None})
    found = beside_paper(measured, around)
    assert found.estimate == pytest.approx(2) and found.low < 2 < found.high and found.paper == (1, 1)
    assert beside_paper({**measured, "paper_value": "80"}, around) is None, "a number at the region's border is a bound"
    one_sided = claims["tst.loss"]
    arms = {"ours": {n: n / 100 for n in range(5)}, "baseline": {n: 0.5 for n in range(5)}}
    signed = table_row(one_sided, "desk", "cpu", arms)
    assert beside_paper({**signed, "paper_value": "-0.07"}, one_sided) is None, "a sign has no size"
    same = beside_paper({**signed, "paper_value": "0.5"}, one_sided)
    assert same.estimate == pytest.approx(0.02 / 0.5), "the baseline is the paper's number: ours lies beside it"
    assert beside_paper({**signed, "paper_value": "0"}, one_sided) is None
    assert beside_paper({**measured, "paper": "One-GPU Lab, a prediction of our own"}, around) is None, "no source"
    assert beside_paper({**measured, "paper_value": "60 in our plan's pilot"}, around) is None, "no source either"


def test_distance_and_verdict_agree_on_the_whole_ledger(rows, claims):
    """|x| > 1 exactly where the interval is on one side of the region's nearest border: a wrong sign or scale fails."""
    tested = 0
    for each in fullest(rows):
        if (x := distance(each, claims[each["id"]])) is None or abs(abs(x) - 1) < 1e-6:
            continue
        tested += 1
        said = decide(claims[each["id"]], each["low"], each["high"])
        assert (said == "reproduced") == (x > 1), each["id"]
        if said == "not reproduced":
            assert x < -1, each["id"]
    assert tested > 200


def test_a_widened_interval_keeps_its_middle_and_its_scale(rows, claims):
    """Factor 1 gives back every verdict; a ratio is widened on the log scale; wider never decides what was open."""
    judged = [each for each in fullest(rows) if each["kind"] == "measured" and each["verdict"] in DECIDED]
    for each in judged:
        claim = claims[each["id"]]
        assert widened(each, claim, 1.0) == each["verdict"], each["id"]
        wide = widened(each, claim, 3.0)
        assert wide in (each["verdict"], "inconclusive", "partly"), each["id"]
    ratio = next(claim for claim in claims.values() if claim.compare == "ours / baseline"
                 and claim.reproduced[0] == 0 and claim.reproduced[1] == 1 and not claim.partly)
    near = row(estimate=0.5, low=0.25, high=1.0 - 1e-9)
    assert widened(near, ratio, 0.5) == "reproduced" and widened(near, ratio, 1.5) == "inconclusive"
    assert widened(row(estimate=0.5, low=0.3, high=0.8), ratio, 1.4) == "reproduced", "log: up to 0.97, not 0.9"
    assert widened(row(estimate=0.5, low=0.3, high=0.8), ratio, 1.5) == "inconclusive", "log: up to 1.02, not 0.925"


def test_pairing_compares_the_two_widths_of_one_row(rows, claims):
    """Against `interval`; independent of the seeds' order; None for one arm, for arms that do not vary, for ratios."""
    claim = claims["tst.loss"]
    ours, baseline = {0: 1.0, 1: 2.0, 2: 4.0}, {2: 3.5, 0: 1.0, 1: 1.5}
    rho, gain = pairing(row(ours=ours, baseline=baseline), claim)
    a, b = [1.0, 2.0, 4.0], [1.0, 1.5, 3.5]
    assert rho == pytest.approx(statistics.correlation(a, b))
    unpaired = student_quantile(0.975, 4) * math.sqrt((statistics.variance(a) + statistics.variance(b)) / 3)
    _, low, high = interval(ours, baseline)
    assert gain == pytest.approx(unpaired / ((high - low) / 2))
    assert pairing(row(ours=ours, baseline={0: 1.0, 1: 1.0, 2: 1.0}), claim) is None
    assert pairing(row(ours=ours, baseline={seed: x + 1 for seed, x in ours.items()}), claim) is None
    assert pairing(row(ours=ours, baseline=baseline, verdict="live"), claim) is None
    assert pairing(row(), claims["cot.rho"]) is None
    found = [each for one in fullest(rows) if (each := pairing(one, claims[one["id"]]))]
    assert len(found) > 200 and all(-1 <= rho <= 1.000001 and gain > 0 for rho, gain in found)


def test_every_surprise_is_a_row_that_came_out_against_its_statement(rows, claims):
    """Ids and controls exist, no verdict is another one, no sentence holds a number of ours, none stands twice."""
    by_id = {each["id"]: each for each in fullest(rows)}
    surprises = load_surprises()
    assert len({each.id for each in surprises}) == len(surprises) >= 8
    for each in surprises:
        assert by_id[each.id]["verdict"] == "not reproduced", each.id
        assert not each.shown_by or by_id[each.shown_by]["estimate"] is not None, each.id
        assert each.control.endswith(".") and not any(letter.isdigit() for letter in each.control), each.id


def test_the_numbers_in_the_labs_findings_are_those_of_its_desk_run(rows):
    """Each finding's estimate and interval stand in the text as the ledger has them."""
    from labkit.course.header import NOTEBOOKS, read_notebook, text_of

    notebook = read_notebook(next(NOTEBOOKS.glob("16_*.ipynb")))
    text = "\n".join(text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    told = ("coverage", "coverage_skewed", "coverage_collapse", "shared_mean", "shared")
    for each in [each for name in told for each in matching(rows, scale="desk") if each["id"] == f"board.{name}"]:
        digits = 4 if "coverage" in each["id"] else 3
        told_as = [f"{each[key]:.{digits}f}" for key in ("estimate", "low", "high")]
        assert "{} [{}, {}]".format(*told_as) in text, each["id"]


# the browser ------------------------------------------------------------------------------------------------------

class Told:
    """What a lab in a headless run gets to show."""

    interactive = False

    def table(self, lines, columns, caption):
        self.lines, self.columns, self.caption = lines, columns, caption


def test_the_static_twin_shows_the_first_page_and_counts_all(rows):
    lab = Told()
    ledger_browser.browse(lab, rows, verdict="reproduced")
    found = matching(rows, verdict="reproduced")
    assert f"{len(found)} of {len(rows)} rows" in lab.caption and "Page 1 of" in lab.caption
    assert [line[0] for line in lab.lines] == [each["id"] for each in found[: ledger_browser.PAGE]]
    seen = [line[0] for page in range(1, ledger_browser.pages(len(found)) + 1)
            for line in ledger_browser.view(found, page)[1]]
    assert seen == [each["id"] for each in found], "the pages together hold each row once"
    assert ledger_browser.view(found, 10**6) == ledger_browser.view(found, ledger_browser.pages(len(found)))
    with pytest.raises(LabError, match="no filter colour"):
        ledger_browser.browse(lab, rows, colour="red")


def test_the_widget_follows_every_filter(rows, monkeypatch):
    """Choosing, typing, turning pages change the table; a filter goes back to page one; every control has a name."""
    boxes = []
    monkeypatch.setattr("IPython.display.display", boxes.append)
    ledger_browser._widget(rows, {"verdict": "reproduced"})
    *controls, picture = boxes[0].children
    named = {control.description: control for control in controls}
    assert set(named) == {*ledger_browser.FILTERS.values(), "Words", "Page"} and "" not in named
    assert f"{len(matching(rows, verdict='reproduced'))} of {len(rows)} rows" in picture.value
    named["Page"].value = 3
    assert "Page 3 of" in picture.value
    named["Verdict"].value = "not reproduced"
    assert named["Page"].value == 1 and named["Page"].max == ledger_browser.pages(
        len(matching(rows, verdict="not reproduced")))
    named["Words"].value = "<no such words>"
    assert f"0 of {len(rows)} rows" in picture.value and "&lt;no such words&gt;" in picture.value
    for name in ("Lab", "Source", "Verdict", "Scale", "Device"):
        assert named[name].options[0] == ("all", "") and len(named[name].options) > 1


# predictions ------------------------------------------------------------------------------------------------------

def test_claims_to_ask_come_from_different_labs_and_hardly_move_when_one_is_added(rows):
    """Drawn by a hash: a new lab's rows take their turn and do not redraw the others'."""
    chosen = fullest(rows)
    asked = calibration.claims_to_ask(chosen)
    assert len(asked) == 8 == len({each["notebook"] for each in asked})
    assert all(each["kind"] == "measured" and each["verdict"] in DECIDED for each in asked)
    leaning, silent = row("zz.it", statement="It is lower.", notebook="97"), row("zz.no", paper_value="none")
    unsuited = [leaning, silent]
    assert calibration.claims_to_ask([*unsuited, row("zz.new", notebook="99")]) == [row("zz.new", notebook="99")]
    more = [*chosen, row("zz.new", notebook="98"), row("zz.newer", notebook="98")]
    assert len({each["id"] for each in calibration.claims_to_ask(more)} & {each["id"] for each in asked}) >= 7


def test_stated_chances_are_joined_with_verdicts(rows):
    """Only answers to claims with a verdict count; "partly" and "inconclusive" are not "reproduced"."""
    ledger = [row("t.a"), row("t.b", verdict="inconclusive"), row("t.c", verdict="live")]
    said = {"a": "95%", "b": "25%", "c": "5%", "d": "5%"}
    kept = {f"claim t.{letter}": {"answer": answer} for letter, answer in said.items()}
    kept["share"] = {"answer": "over three quarters"}
    assert calibration.stated_chances(kept, ledger) == [(0.95, True), (0.25, False)]


def test_calibration_and_brier_on_known_answers():
    """A perfect reader has a Brier score of 0; always 50% scores 0.25; shares and counts are those of the bins."""
    assert calibration.brier([(1.0, True), (0.0, False)]) == 0
    assert calibration.brier([(0.5, True), (0.5, False)]) == 0.25
    bins = calibration.calibration([(0.75, True)] * 3 + [(0.75, False), (0.05, False)])
    assert [(each.stated, each.share, each.count) for each in bins] == [(0.05, 0.0, 1), (0.75, 0.75, 4)]
    assert all(0 <= each.low <= each.share <= each.high <= 1 for each in bins)
    low, high = calibration.wilson(15, 50)  # Wilson's interval by hand: centre 0.3143, half width 0.1233
    assert (low, high) == (pytest.approx(0.1910, abs=2e-4), pytest.approx(0.4375, abs=2e-4))


def test_revealed_predictions_come_back_with_what_was_measured(tmp_path, monkeypatch):
    """`reveal` keeps the measurement beside an answer, a new answer drops it, and without an answer nothing is kept."""
    monkeypatch.setenv("LABKIT_PREDICTIONS", str(tmp_path / "predictions.json"))
    monkeypatch.setattr(display, "publish_html", lambda markup, text: None)
    predict.commit("02", "dial", "Where?", "at 0 only", 4)
    predict.commit("03", "who", "Who?", "nobody")
    assert calibration.picked_answers(predict.kept()) == []
    predict.reveal("02", "dial", "at 0 and 0.1", "")
    predict.reveal("02", "never asked", "x", "")
    (found,) = calibration.picked_answers(predict.kept())
    assert found == {"lab": "02", "question": "Where?", "said": "at 0 only", "measured": "at 0 and 0.1",
                     "right": False, "guess": 0.25}
    predict.commit("02", "dial", "Where?", "at 0 and 0.1", 4)
    assert calibration.picked_answers(predict.kept()) == []
