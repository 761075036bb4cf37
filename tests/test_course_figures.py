"""The course's figures: arms differ by more than colour, labels don't collide, pictures have the promised size."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from labkit.course import figures


def test_no_two_arms_differ_by_colour_alone():
    """Dash and marker are different for every pair, so a grey print keeps them apart."""
    looks = [figures.look(i) for i in range(8)]
    for a, b in itertools.combinations(looks, 2):
        assert a.colour != b.colour and a.dash != b.dash and a.marker != b.marker
    assert figures.look("baseline") == looks[0] and figures.look(8) == looks[0]
    with pytest.raises(ValueError, match="no look for the arm 'nobody'"):
        figures.look("nobody")


def test_labels_can_be_read():
    """Yellow and sky blue are fine for a line and too pale for text; black stays black."""
    for name, colour in figures.PALETTE.items():
        assert 1.05 / (figures._luminance(np.array(figures.ink(colour))) + 0.05) >= 4.5, name
    assert figures.ink("#000000") == (0, 0, 0)


def test_seed_lines_draw_each_seed_thin_and_the_mean_bold():
    """One line a seed plus the mean; the mean's marker is in its label too; a single seed is drawn once."""
    fig, ax = figures.figure()
    mean = figures.seed_lines(ax, [0, 1], {0: [1.0, 2.0], 1: [3.0, 6.0]}, "plain", "baseline")
    assert mean.tolist() == [2.0, 4.0]
    assert [line.get_linewidth() for line in ax.lines] == [0.8, 0.8, 2.2]
    assert [note.get_text() for note in ax.texts] == ["● plain"]
    figures.seed_lines(ax, [0, 1], {0: [1.0, 2.0]}, "one", "method", end_label=False)
    assert len(ax.lines) == 4 and ax.get_legend_handles_labels()[1] == ["one"]
    figures.png(fig)


def test_end_labels_do_not_overlap():
    """Five curves that end at the same place: after rendering their labels are a line's height apart, and inside."""
    fig, ax = figures.figure()
    for i in range(5):
        figures.seed_lines(ax, [0, 1], {0: [i, 1 + 1e-3 * i]}, f"arm {i}", i)
    figures.png(fig)
    fig.draw_without_rendering()  # extents in the figure's own pixels again
    boxes = sorted((note.get_window_extent() for note in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(boxes))
    assert boxes[0].y0 >= ax.bbox.y0 - 2 and max(box.x1 for box in boxes) <= fig.bbox.x1


def test_pictures_have_twice_the_pixels_and_few_colours():
    """7.6 inches of 100 pixels, at scale 2; with a palette, less than half as heavy as what a widget sends."""
    fig, ax = figures.figure(width=7.6, height=4)
    ax.imshow(np.random.default_rng(0).random((40, 40)))
    small, full = figures.png(fig), figures.screen_png(fig, scale=2)
    assert Image.open(io.BytesIO(small)).size == (1520, 800)
    assert Image.open(io.BytesIO(small)).mode == "P" and len(small) < len(full) / 2


def test_interval_dots_read_from_top_to_bottom():
    """The first row is on top; the interval spans its bounds; the border is drawn."""
    fig, ax = figures.figure()
    rows = [("first", 1, 0, 2), ("second", -1, -2, 0, "baseline")]
    figures.interval_dots(ax, rows, zero_label="no effect", unit="nats")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["second", "first"]
    assert ax.lines[0].get_xdata()[0] == -2 and ax.lines[0].get_ydata()[0] == 0
    assert ax.get_xlabel() == "nats" and ax.texts[0].get_text() == "no effect"
    figures.png(fig)


def test_a_finding_is_wrapped_and_left_aligned():
    """A long sentence becomes several lines that fit the axes."""
    fig, ax = figures.figure(width=4)
    figures.finding(ax, "Bags of six tokens end well below the baseline at equal FLOPs and above it at equal data")
    figures.png(fig)
    title = ax.get_title(loc="left")
    assert title.count("\n") >= 2 and max(map(len, title.splitlines())) <= 44
