"""`Lab` where nobody watches: settings, results, figures, widgets. What a kernel shows is in test_course_run."""

import json

import pytest
import torch

from labkit.course import Lab, display, predict, results, widgets
from labkit.course.scale import choose_scale
from labkit.errors import LabError


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    """Notebook 02 at desk scale, with its results and predictions in a temporary folder."""
    monkeypatch.setenv("LABKIT_SCALE", "desk")
    monkeypatch.setenv("LABKIT_RESULTS", str(tmp_path / "run"))
    monkeypatch.setenv("LABKIT_PREDICTIONS", str(tmp_path / "predictions.json"))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "shipped")
    lab = Lab("02")
    lab.greeting = capsys.readouterr().out
    return lab


def test_scale_is_chosen_with_its_reason(lab, monkeypatch):
    """The variable wins; without it the hardware decides; an unknown scale is a sentence that lists the three."""
    assert lab.greeting == "Scale desk, because LABKIT_SCALE=desk says so. Device: cpu, float32.\n"
    assert (lab.scale, lab.device.type, lab.interactive) == ("desk", "cpu", False)
    monkeypatch.setenv("LABKIT_SCALE", "huge")
    with pytest.raises(LabError, match="quick, desk, workstation"):
        choose_scale()
    monkeypatch.delenv("LABKIT_SCALE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_scale().name == "quick"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    assert choose_scale().name == "workstation" and "Test GPU" in choose_scale().reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))  # no bf16: its first lab would crash
    assert choose_scale().name == "quick" and "the Test GPU is too old" in choose_scale().reason


def test_settings_take_the_column_of_the_scale(lab):
    """The second of three; anything but three columns is a mistake that is named."""
    assert vars(lab.settings(steps=(1, 2, 3), names=("a", "b", "c"))) == {"steps": 2, "names": "b"}
    for wrong in ((1, 2), [1, 2, 3], 5):
        with pytest.raises(LabError, match="'steps' needs three columns"):
            lab.settings(steps=wrong)


def test_kept_values_come_back_as_they_were_returned(lab, tmp_path):
    """`keep` returns what `recorded` will read later, so one plotting cell serves live and shipped data."""
    kept = lab.keep("curve", {0: torch.tensor([1.0, float("nan")]), "n": (1, True, None, 1 / 3)})
    assert kept == {"0": [1.0, None], "n": [1, True, None, 0.333333]}
    assert lab.recorded("curve") is None  # nothing is shipped yet
    (tmp_path / "shipped").mkdir()
    (tmp_path / "run").rename(tmp_path / "shipped/desk")
    assert lab.recorded("curve") == kept
    assert lab.recorded("other") is None and lab.recorded("curve", scale="workstation") is None
    with pytest.raises(LabError, match="holds a Lab"):
        lab.keep("bad", [lab])


def test_workstation_results_are_found_by_device(lab, tmp_path):
    """One folder a GPU; without a name the first one."""
    for slug, value in (("nvidia-a", 1), ("nvidia-b", 2)):
        folder = tmp_path / "shipped/workstation" / slug
        folder.mkdir(parents=True)
        (folder / "02.figures.json").write_text(json.dumps({"x": value}))
    assert lab.recorded("x", scale="workstation") == 1
    assert lab.recorded("x", scale="workstation", device="NVIDIA B") == 2
    assert lab.recorded("x", scale="workstation", device="NVIDIA C") is None


def test_a_result_file_says_where_it_comes_from(lab, tmp_path):
    """All fields that the reader of results insists on, with sensible values."""
    lab.keep("x", 1)
    result = json.loads((tmp_path / "run/02.json").read_text())
    assert set(result) == results.FIELDS
    assert (result["notebook"], result["scale"], result["rows"], result["seeds"]) == ("02", "desk", [], [])
    assert 0.05 < result["peak_gb"] < 20 and result["seconds"] >= 0 and result["versions"]["torch"] == torch.__version__


def test_nothing_is_written_without_a_results_folder(lab, tmp_path, monkeypatch):
    """A learner's session changes no file."""
    monkeypatch.delenv("LABKIT_RESULTS")
    lab.keep("x", 1)
    lab.predict("p", "Which?", ["a", "b"], default="a")
    lab.reveal("p", "a")
    assert list(tmp_path.iterdir()) == []


def test_figures_need_alternative_text_and_are_freed(lab):
    """An empty alt is refused; a shown figure holds no axes any more."""
    from labkit.course import figures

    fig, _ = figures.figure()
    with pytest.raises(LabError, match="no alternative text"):
        lab.show(fig, "  ")
    lab.show(fig, "A line.")
    assert fig.axes == []


def test_tables_are_escaped_and_aligned():
    """HTML for the notebook, aligned text for a terminal, numbers to four digits."""
    markup, text = display.table([{"name": "<b>", "loss": 1.23456, "ok": True}], None, "A & B")
    assert "<td" in markup and "&lt;b&gt;" in markup and "A &amp; B" in markup
    assert text.splitlines() == ["A & B", "name  loss   ok", "----  -----  ---", "<b>   1.235  yes"]
    assert display.table([("x", 1)], ["a", "b"], "")[1].splitlines()[-1] == "x  1"


def test_predictions_are_kept_whole_and_compared_in_words(lab, tmp_path, monkeypatch):
    """Commit, reopen, reveal: the words put both side by side and blame nobody."""
    shown = []
    monkeypatch.setattr(display, "publish_html", lambda markup, text: shown.append(text))
    predict.commit("02", "who", "Who wins?", "TST")
    predict.commit("03", "who", "Who wins?", "nobody")
    assert predict.answer("02", "who") == "TST" and predict.answer("02", "else") is None
    predict.reveal("02", "who", "TST", "")
    predict.reveal("02", "who", "the baseline", "By 0.1.")
    predict.reveal("02", "else", "a tie", "")
    assert shown == ["You said “TST”, and so it was measured.",
                     "You said “TST”; measured: “the baseline”. By 0.1.",
                     "You made no prediction here. Measured: a tie."]
    kept = json.loads((tmp_path / "predictions.json").read_text())["02"]["who"]
    assert kept["question"] == "Who wins?" and kept["time"].startswith("20")
    (tmp_path / "predictions.json").write_text("{torn")
    with pytest.raises(LabError, match="can't be read as JSON"):
        predict.answer("02", "who")


def test_a_prediction_needs_distinct_options_and_a_default_among_them(lab):
    for options, default in ((["a", "b"], "c"), (["a", "a"], "a")):
        with pytest.raises(LabError, match="needs options that differ"):
            lab.predict("p", "Which?", options, default=default)


def _controls(widget) -> dict[str, object]:
    return {type(child).__name__: child for child in widget.children}


def test_the_prediction_widget_asks_commits_and_remembers(lab, monkeypatch):
    """Nothing chosen: it asks to choose. Committed: kept and locked. Opened again: shown, and can be made again."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    predict._widget("02", "who", "Who wins?", ["TST", "baseline"])
    first = _controls(shown[0])
    first["Button"].click()
    assert predict.answer("02", "who") is None and "Choose one" in shown[0].children[-1].value
    first["RadioButtons"].value = "baseline"
    first["Button"].click()
    assert predict.answer("02", "who") == "baseline" and first["RadioButtons"].disabled
    predict._widget("02", "who", "Who wins?", ["TST", "baseline"])
    again = _controls(shown[1])
    assert again["RadioButtons"].value == "baseline" and "baseline" in shown[1].children[-1].value
    again["Button"].click()
    again["RadioButtons"].value = "TST"
    again["Button"].click()
    assert predict.answer("02", "who") == "TST"


def test_a_widget_redraws_and_survives_a_broken_figure(lab, monkeypatch):
    """Each move gives another picture with its own alternative text; an error becomes a sentence; bounds hold."""
    from labkit.course import figures

    def draw(slope: int):
        if slope == 4:
            raise ValueError("no line <here>")
        fig, ax = figures.figure(width=3)
        ax.plot([0, 1], [0, slope])
        return fig

    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    control = widgets.slider(0, 4, 1, 1, "slope")
    widgets._interactive(draw, lambda slope: f"Slope {slope}.", {"slope": control})
    handle, picture = shown[0].children
    before = picture.value
    handle.value = 2
    assert 'alt="Slope 2."' in picture.value and picture.value != before
    handle.value = 4
    assert "Nothing to draw at slope = 4: no line &lt;here&gt;" in picture.value
    handle.value = 99
    assert handle.value == 4


def test_controls_out_of_range_are_refused():
    """When the notebook is written, not when the learner moves them."""
    for low, high, step, value in ((2, 1, 1, 1), (0, 4, 1, 5), (0, 4, 0, 1), (0, 4, 9, 1)):
        with pytest.raises(LabError, match="'s' needs low"):
            widgets.slider(low, high, step, value, "s")
    with pytest.raises(LabError, match="is not an option"):
        widgets.choice([1, 2], 3, "s")


def test_play_draws_once_when_nobody_is_there(lab):
    """So that a broken `draw` fails in a headless run instead of in the learner's hands."""
    with pytest.raises(ZeroDivisionError):
        lab.play(lambda s: 1 / s, "x", s=widgets.slider(0, 4, 1, 0, "s"))
