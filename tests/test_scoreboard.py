"""README's scoreboard is what the claims and the shipped results say, and nothing in it is hidden or invented."""

import pytest

from labkit.course import picture, scoreboard
from labkit.course.claims import load_claims
from labkit.course.ledger import claims_table
from labkit.course.scoreboard import BEGIN, END, print_table, scoreboard_markdown, update_readme, with_scoreboard
from labkit.errors import LabError
from labkit.files import REPOSITORY


def row(name="t.one", scale="desk", verdict="reproduced", **changes):
    base = {
        "id": name, "kind": "measured", "notebook": "02", "paper": "p", "source": "code", "statement": f"Claim {name}.",
        "paper_value": "-0.07 | -0.13", "rule": "r", "scale": scale, "device": "cpu", "ours": {0: 1.0},
        "baseline": {0: 2.0}, "estimate": -0.147, "low": -0.16, "high": -0.134, "seeds": [0, 1, 2], "verdict": verdict,
    }  # fmt: skip
    return {**base, **changes}


def test_readme_holds_the_generated_scoreboard():
    """Fails as soon as a result, a claim or README changes without the others: `labkit claims --readme` mends it."""
    path = REPOSITORY / "README.md"
    text = path.read_text(encoding="utf-8")
    assert with_scoreboard(text, scoreboard_markdown(claims_table()), path) == text, "run `labkit claims --readme`"


def test_readme_shows_the_notebooks_own_figure():
    """The picture's bytes and text are those of the executed notebook: a stale picture fails."""
    png, alt = picture.chosen_figure()
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert picture.FILE.read_bytes() == png and picture.with_picture(text, alt) == text, "run `labkit claims --readme`"


def test_update_writes_between_the_marks_and_only_there(tmp_path, monkeypatch):
    monkeypatch.setattr(scoreboard, "claims_table", lambda folder: [row()])
    path = tmp_path / "README.md"
    path.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert update_readme(path) is True
    text = path.read_text()
    assert text.startswith(f"above\n{BEGIN}\n") and text.endswith(f"\n{END}\nbelow\n") and "old" not in text
    assert "| Claim t.one. | -0.07 \\| -0.13 | -0.147 [-0.160, -0.134], 3 seeds | desk | reproduced |" in text
    assert update_readme(path) is False, "a second time there is nothing to change"


@pytest.mark.parametrize("text", ["no marks", f"{BEGIN} only", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_its_marks_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(LabError, match="marks"):
        update_readme(path)
    assert path.read_text() == text


def test_every_verdict_is_counted_and_every_claim_has_its_line():
    rows = [row("t.a"), row("t.b", "desk", "not reproduced"), row("t.c", "desk", "inconclusive")]
    rows.append(row("t.d", "quick", "live"))
    text = scoreboard_markdown(rows)
    assert "4 claims: " in text and "1 reproduced, 1 not reproduced, 1 inconclusive, 1 live" in text
    assert all(text.count(f"Claim t.{letter}.") == 1 for letter in "abcd")


def test_a_quick_row_gives_way_to_a_fuller_one_only():
    rows = [row(scale="quick", verdict="live"), row(scale="desk"), row("t.b", "quick", "live")]
    text = scoreboard_markdown(rows)
    assert text.count("Claim t.one.") == 1 and "| desk |" in text
    assert text.count("Claim t.b.") == 1, "without a fuller row the quick one stays"


def test_each_gpu_has_its_own_line():
    rows = [row(scale="workstation", device=name, verdict="partly") for name in ("NVIDIA H200", "RTX PRO 6000")]
    text = scoreboard_markdown(rows)
    assert "workstation (NVIDIA H200)" in text and "workstation (RTX PRO 6000)" in text
    assert "1 claims in 2 rows (one a claim, scale and device)" in text


def test_the_legend_counts_exact_own_and_changed_rows():
    rows = [row("tst.loss") | {"kind": "exact"}, row("t.b") | {"paper": "One-GPU Lab, a prediction of our own"}]
    assert "1 of the reproduced" in (text := scoreboard.legend(rows)) and "1 rows are predictions of our own" in text
    changed = bool(load_claims()["tst.loss"].changes)
    assert f"({changed:d} of 1, many" in text


def test_the_terminal_table_keeps_brackets_and_ids(capsys):
    rows = [row(statement="Marked [bold] words.")]
    print_table([*rows, row("t.none", "", "not run yet", estimate=None, low=None, high=None, seeds=[])])
    out = capsys.readouterr().out
    assert "Marked [bold] words." in out
    assert "-0.147 [-0.160, -0.134], 3 seeds" in out and "t.none" in out and "1 reproduced, 1 not run yet" in out
