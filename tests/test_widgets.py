"""Widgets hold: each is tried at its ends and corners, timed, and named for those who do not see or click."""

import gc
import io
import json
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from labkit import progress
from labkit.course import display, figures, predict, widget_access, widget_trial, widgets
from labkit.course.header import labs, read_notebook, text_of
from labkit.errors import LabError

CONTROLS = {"n": widgets.slider(1, 30, 1, 4, "n"), "share": widgets.slider(0.0, 1.0, 0.25, 0.5, "share"),
            "kind": widgets.choice(("a", "b", "c"), "b", "kind")}


def draw(n, share, kind):
    fig, ax = figures.figure(width=3, height=2)
    ax.plot([0, n], [0, share])
    ax.set_title(kind)
    return fig


def said(n, share, kind):
    return f"{n} {share} {kind}"


def tried(draw=draw, alt=said, controls=CONTROLS, how="ends"):
    return widget_trial.try_all("99", draw, alt, controls, how)


# where a widget is tried ---------------------------------------------------------------------------------------------

def test_a_control_knows_all_its_places():
    """Both ends, and every step between as the keyboard makes them, without a float's dust; a range that is no whole
    number of steps still ends at its end."""
    assert CONTROLS["share"].values == (0.0, 0.25, 0.5, 0.75, 1.0) and CONTROLS["kind"].values == ("a", "b", "c")
    assert widgets.slider(0.0, 1.0, 0.1, 0.3, "s").values[3] == 0.3
    assert widgets.slider(0, 5, 2, 2, "s").values == (0, 2, 4, 5)
    assert len(CONTROLS["n"].values) == 30


def test_ends_move_one_control_at_a_time_and_corners_all():
    start = {"n": 4, "share": 0.5, "kind": "b"}
    ends = list(widget_trial.places(CONTROLS, "ends"))
    assert ends == [(name, start | {name: value}) for name, value in (
        ("n", 1), ("n", 30), ("share", 0.0), ("share", 1.0), ("kind", "a"), ("kind", "c"))]
    corners = [values for _, values in widget_trial.places(CONTROLS, "corners")]
    assert {tuple(values.values()) for values in corners} >= {
        (n, share, kind) for n in (1, 30) for share in (0.0, 1.0) for kind in ("a", "c")}
    assert sum(name is not None for name, _ in widget_trial.places(CONTROLS, "corners")) == len(ends)
    assert 1 + sum(values["n"] not in (1, 4, 30) for values in corners) <= widget_trial.MOST_VALUES


def test_a_control_that_starts_at_an_end_goes_to_the_other_and_one_option_is_no_trouble():
    one = {"s": widgets.slider(0, 4, 1, 0, "s"), "k": widgets.choice(("only",), "only", "k")}
    assert list(widget_trial.places(one, "ends")) == [("s", {"s": 4, "k": "only"})]
    assert [values["s"] for _, values in widget_trial.places(one, "corners")][:4] == [1, 2, 3, 4]


# what it must do there -----------------------------------------------------------------------------------------------

def test_a_good_widget_passes_and_says_what_it_took(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_WIDGET_TIMES", str(tmp_path / "times"))
    found = tried()
    assert found["places"] == 6 and 0 < found["median_ms"] <= found["worst_ms"]
    assert [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()] == [found]


def deaf(n, share, kind):
    return draw(n, 0.5, kind)


def silent(n, share, kind):
    return f"{n} {kind}"


def broken(n, share, kind):
    if n == 30 and kind == "c":
        raise ValueError("nothing fits")
    return draw(n, share, kind)


def grumbling(n, share, kind):
    warnings.warn("a division by zero", RuntimeWarning, stacklevel=2)
    return draw(n, share, kind)


@pytest.mark.parametrize(("faulty", "how", "words"), [
    ({"draw": grumbling}, "ends", "grumbling can't be drawn at .*a division by zero"),
    ({"draw": deaf}, "ends", "shows the same picture after share was moved to 0.0"),
    ({"alt": silent}, "ends", "shows the same alternative text after share"),
    ({"alt": "fixed"}, "ends", "shows the same alternative text after n"),
    ({"draw": broken}, "corners", "broken can't be drawn at .*'n': 30.*'kind': 'c'.*nothing fits"),
])
def test_a_widget_that_breaks_or_stays_still_is_named(faulty, how, words):
    with pytest.raises(LabError, match=words):
        tried(**faulty, how=how)
    if how == "corners":
        tried(**faulty)  # the ends alone do not show it


def test_a_slow_widget_is_refused_by_its_own_time_and_only_if_it_is_slow_again(monkeypatch):
    """By a clock in the test's hands: at the ends a redraw of 0.5 s fails, one that was slow once passes."""
    monkeypatch.setattr(widget_trial.time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(widgets, "rendered", lambda draw, alt, values: (str(values).encode(), str(values), 300))
    ticks = (0.5 * i for i in range(1000))
    with pytest.raises(LabError, match=r"draw takes 0.50 s at .* a redraw may take 0.4"):
        tried()
    costs = iter([0.01, 0.5, *[0.01] * 99])  # the start is not counted; the first end is slow, and then it is not
    ticks = (each for start in range(999) for each in (start, start + next(costs)))
    assert tried()["worst_ms"] == 10


def test_only_known_ways_to_try_are_taken(monkeypatch):
    assert widget_trial.wanted() is None
    monkeypatch.setenv("LABKIT_WIDGETS", "corner")
    with pytest.raises(LabError, match="ends, corners"):
        widget_trial.wanted()


def test_play_tries_the_widget_if_it_is_asked_to(monkeypatch, capsys):
    from labkit.course import Lab

    monkeypatch.setenv("LABKIT_SCALE", "quick")
    lab = Lab("99")
    lab.play(draw, silent, **CONTROLS)
    monkeypatch.setenv("LABKIT_WIDGETS", "ends")
    with pytest.raises(LabError, match="alternative text after share"):
        lab.play(draw, silent, **CONTROLS)


# how it is drawn -----------------------------------------------------------------------------------------------------

def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) / 255


@pytest.mark.parametrize("end_labels", [True, False])
def test_the_screen_gets_the_same_figure_as_the_notebook(end_labels):
    """Two ways to render, one picture: at the same scale they differ by less than 0.2% in the mean, with a legend, end
    labels, a wrapped title and a logarithmic axis. One curve less, or no layout, makes more of a difference."""
    def figure(curves=2):
        fig, ax = figures.figure(width=6)
        for arm in range(curves):
            figures.seed_lines(ax, [1, 10, 100], {0: [1, 2 + arm, 3]}, f"arm {arm}", arm, end_label=end_labels)
        ax.plot([1, 100], [1, 3], label="line")
        ax.set(xscale="log", ylabel="loss")
        ax.legend(loc="upper left")
        figures.finding(ax, "A finding that is so long that it has to be wrapped into two lines at the least")
        return fig

    static = pixels(figures.png(figure(), scale=1.5))
    screen = pixels(figures.screen_png(figure()))
    (unplaced := figure()).set_layout_engine("none")
    others = [pixels(figures.screen_png(each)) for each in (figure(1), unplaced)]
    assert screen.shape == static.shape == (round(figure().get_figheight() * 150), 900)
    assert np.abs(screen - static).mean() < 0.002 < min(np.abs(screen - other).mean() for other in others)


def test_a_heat_map_and_its_colour_bar_are_placed_as_in_the_notebook():
    """Their axes find their size as they are drawn: margins kept from before would shift them."""
    def figure():
        fig, (ax, _other) = figures.figure(1, 2, width=9)
        fig.colorbar(ax.imshow(np.eye(5)), ax=ax, label="a name")
        return fig

    static, screen = (pixels(render(figure())) for render in (partial(figures.png, scale=1.5), figures.screen_png))
    assert np.abs(screen - static).mean() < 0.002


def test_a_legend_outside_the_axes_keeps_its_room():
    """Only what lies within the axes is left out of the layout."""
    fig, (ax, other) = figures.figure(1, 2)
    ax.plot([1, 2], label="a")
    other.plot([1, 2], label="b")
    below = ax.legend(bbox_to_anchor=(0.5, -0.3), loc="upper center")
    within = other.legend()
    figures.screen_png(fig)
    assert below.get_in_layout() and not within.get_in_layout()
    assert below.get_window_extent().y0 >= 0


def test_the_collector_is_spared_what_was_alive_and_freed_of_it_by_the_next():
    """After a widget is made the collector looks at new objects only, so a full look is short; made again, it first
    looks at everything once more, so that no garbage stays for good."""
    widgets.spare_the_collector()
    try:
        assert gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < 5_000
        first, loops = gc.get_freeze_count(), [[] for _ in range(20_000)]
        for loop in loops:
            loop.append(loop)
        del loop, loops
        widgets.spare_the_collector()
        assert gc.get_freeze_count() < first + 5_000
    finally:
        gc.unfreeze()


# for whom it is drawn ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", ["play", "ask", "browse"])
def test_every_widget_comes_with_the_script_that_names_its_controls(make, monkeypatch, tmp_path):
    """Beside the box: the script, in its own braces, so that two widgets in one page do not meet."""
    from labkit.course import ledger_browser

    monkeypatch.setenv("LABKIT_PREDICTIONS", str(tmp_path / "predictions.json"))
    boxes, scripts = [], []
    monkeypatch.setattr("IPython.display.display", boxes.append)
    monkeypatch.setattr(display, "kernel", lambda: object())
    monkeypatch.setattr(display, "publish", scripts.append)
    {"play": lambda: widgets._interactive(draw, said, CONTROLS),
     "ask": lambda: predict._widget("99", "who", "Who?", ["a", "b"]),
     "browse": lambda: ledger_browser._widget([], {})}[make]()
    assert len(boxes) == 1
    assert scripts == [{"application/javascript": f"{{{widget_access.SCRIPT}}}"}]
    gc.unfreeze()


def test_the_number_beside_a_slider_shows_every_step():
    """0.375 in steps of 0.025 would read 0.38 with two digits, and 0.999 as 1.00."""
    formats = {(0.05, 1.0, 0.025, 0.375): ".3f", (0.9, 0.999, 0.001, 0.98): ".3f", (0.0, 4.0, 0.5, 1.0): ".1f",
               (0.05, 0.95, 0.02, 0.17): ".2f"}
    for numbers, wanted in formats.items():
        assert widgets.slider(*numbers, "s").widget().readout_format == wanted


def test_a_bar_in_a_notebook_is_a_widget_before_any_other_was_made(monkeypatch):
    """A terminal's bar writes to stderr, which a notebook shows as a red box; at a prompt without a kernel it is
    right."""
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setattr(progress, "interactive", lambda: True)
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    monkeypatch.setattr("tqdm.auto.tqdm", lambda **_: "a widget")
    assert progress.bar(3, "steps") == "a widget"
    monkeypatch.setattr(progress, "terminal_bar", lambda **_: "a line")
    shell.kernel = None
    assert progress.bar(3, "steps") == "a line"


# every notebook ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", labs(), ids=lambda path: path.stem)
def test_every_widget_of_a_lab_has_a_static_twin(path):
    """The stored cell of each lab.play holds a picture with its text, and says what can be moved."""
    played = [cell for cell in read_notebook(path)["cells"]
              if cell["cell_type"] == "code" and "\nlab.play(" in "\n" + text_of(cell)]
    assert played
    for cell in played:
        pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        told = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert len(pictures) == 1 and pictures[0]["metadata"]["image/png"]["alt"], text_of(cell)[:60]
        assert "Run this cell in JupyterLab to move" in told, text_of(cell)[:60]
