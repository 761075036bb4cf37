"""One look for every figure: readable at half size, in grey, and by readers who do not see all colours.

An arm of an experiment keeps its colour, dash and marker in all notebooks (`look`), so that two plots can be
compared, and no two arms differ by colour alone. Colours: Okabe and Ito (2008), "Color universal design".
Figures are made without pyplot: nothing is drawn twice, and no front end is needed.
"""

import functools
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox
from PIL import Image

PALETTE = {"black": "#000000", "blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73",
           "purple": "#CC79A7", "orange": "#E69F00", "sky": "#56B4E9", "grey": "#767676"}
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (7, 2, 1.5, 2, 1.5, 2)), (0, (1, 1)),
          (0, (10, 3)), (0, (4, 1, 4, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖★", strict=True))  # a label carries its line's marker, for readers in grey

STYLE = {
    "figure.dpi": 100, "figure.facecolor": "white", "font.size": 12, "axes.titlesize": 13, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.labelsize": 12, "xtick.labelsize": 11,
    "ytick.labelsize": 11, "legend.fontsize": 11, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "lines.linewidth": 2.2, "lines.markersize": 6, "axes.formatter.useoffset": False,
}


class Look(NamedTuple):
    """How an arm is drawn everywhere: a colour, a dash, a marker."""

    colour: str
    dash: str | tuple
    marker: str


_LOOKS = {name: Look(PALETTE[colour], DASHES[i], MARKERS[i]) for i, (name, colour) in enumerate([
    ("baseline", "black"), ("method", "vermillion"), ("control", "blue"), ("peer", "green"),
    ("variant", "purple"), ("variant 2", "orange"), ("variant 3", "sky"), ("reference", "grey")])}


def look(arm: str | int) -> Look:
    """The fixed look of a role ("baseline", "method", "control", "peer", "variant", "variant 2", "variant 3",
    "reference") or of the i-th of several equal arms."""
    if isinstance(arm, int):
        return list(_LOOKS.values())[arm % len(_LOOKS)]
    if arm not in _LOOKS:
        raise ValueError(f"no look for the arm {arm!r}; use a number or one of {', '.join(_LOOKS)}")
    return _LOOKS[arm]


def figure(rows: int = 1, cols: int = 1, *, width: float = 7.6, height: float | None = None, **subplots):
    """A figure in the course's style and its axes: one `Axes`, or an array as pyplot.subplots gives.

    `width` and `height` are in inches of 100 pixels; a notebook's column has room for about 9.
    """
    matplotlib.rcParams.update(STYLE)
    height = height or 1.2 + 2.9 * rows * min(1.0, (width / cols) / 6.0 + 0.35)
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, cols, **subplots)


def finding(ax: Axes, sentence: str, width: int | None = None) -> None:
    """The axes' title: a sentence that states the finding, left-aligned and wrapped to the axes. A given height of 1
    spares matplotlib its search for ticks above the axes, a tenth of all drawing."""
    inches = ax.get_position().width * ax.figure.get_figwidth()
    ax.set_title(textwrap.fill(sentence, width or max(18, int(inches * 11.5))), loc="left", y=1.0)


def seed_lines(ax: Axes, x: Sequence[float], y_by_seed: Mapping[int, Sequence[float]], label: str,
               arm: str | int = "method", *, end_label: bool = True) -> np.ndarray:
    """One thin line a seed and their mean in bold, named at its right end; returns the mean.

    All seeds are measured at the same `x`. With `end_label=False` the name goes to the legend instead.
    """
    colour, dash, marker = look(arm)
    runs = np.array([np.asarray(run, dtype=float) for run in y_by_seed.values()])
    x = np.asarray(x, dtype=float)
    if len(runs) > 1:
        for run in runs:
            ax.plot(x, run, color=colour, linewidth=0.8, alpha=0.45)
    mean = runs.mean(axis=0)
    step = max(1, len(x) // 6)
    marks = sorted({*range(MARKERS.index(marker) * step // 8, len(x), step), len(x) - 1})  # staggered by arm
    ax.plot(x, mean, color=colour, linestyle=dash, marker=marker, markevery=marks, label=None if end_label else label)
    if end_label:
        label_end(ax, x[-1], mean[-1], f"{_GLYPHS[marker]} {label}", colour)
    return mean


def ink(colour: str) -> tuple[float, float, float]:
    """The colour darkened until text in it has a contrast of 4.5 to white (WCAG 2.2, level AA)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    while 1.05 / (_luminance(rgb) + 0.05) < 4.5:
        rgb = rgb * 0.95
    return tuple(rgb)


def _luminance(rgb: np.ndarray) -> float:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def label_end(ax: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Write `text` beside the end of a line; `finish` moves labels apart that would overlap."""
    labels = getattr(ax, "_end_labels", [])
    note = ax.annotate(text, (x, y), xytext=(8, 0), textcoords="offset points", color=ink(colour), va="center",
                       annotation_clip=False, fontweight="bold", fontsize=11)
    ax._end_labels = [*labels, note]


def _spread(ax: Axes, gap: float = 15.0) -> None:
    """Push end labels apart until they are `gap` points from each other, keeping their order."""
    scale = 72.0 / ax.figure.dpi
    height = {note: ax.transData.transform(note.xy)[1] * scale for note in ax._end_labels}
    notes = sorted(height, key=height.get)
    placed = np.array([height[note] for note in notes])
    for _ in range(60):
        for i in range(1, len(placed)):
            overlap = max(0.0, gap - (placed[i] - placed[i - 1]))
            placed[i - 1] -= overlap / 2
            placed[i] += overlap / 2
    placed += max(0.0, ax.bbox.y0 * scale + gap / 2 - placed[0])  # not below the axes, where the tick labels are
    for note, place in zip(notes, placed, strict=True):
        note.set_position((8, place - height[note]))


def boxes(ax: Axes, sides: Sequence[tuple[float, float, float, float]], **style) -> None:
    """Boxes of one look, each given by its left, lower, right and upper side, as one artist: a hundred of their own,
    hatched one by one, take six times as long. The limits of the axes are for the caller to set."""
    if sides:
        corners = np.array([[(a, b), (a, d), (c, d), (c, b)] for a, b, c, d in sides])
        ax.add_artist(PathPatch(Path.make_compound_path_from_polys(corners), **style))


def interval_dots(ax: Axes, rows: Sequence[tuple], *, zero: float = 0.0, zero_label: str = "", unit: str = "") -> None:
    """A forest plot: rows of (label, estimate, low, high[, arm]) from top to bottom, and a line at no effect."""
    for place, (_, estimate, low, high, *arm) in enumerate(reversed(rows)):
        colour, _dash, marker = look(arm[0] if arm else "method")
        ax.plot([low, high], [place, place], color=colour, marker="|", markersize=12, markeredgewidth=2)
        ax.plot([estimate], [place], marker=marker, markersize=8, color=colour, markeredgecolor="white")
    ax.axvline(zero, color=PALETTE["grey"], linewidth=1.2, linestyle=(0, (4, 3)))
    if zero_label:
        ax.annotate(zero_label, (zero, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                    textcoords="offset points", color=PALETTE["grey"], fontsize=10, va="top")
    ax.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    above = len(rows) * 16 / points if zero_label else 0.0  # room for the label's line of text, in rows
    ax.set_ylim(-0.6, len(rows) - 0.4 + above)
    ax.grid(axis="y", visible=False)
    if unit:
        ax.set_xlabel(unit)


def png(fig: Figure, *, scale: float = 2.0) -> bytes:
    """Render at `scale` times the figure's pixels, in 256 colours: notebooks get three times lighter."""
    if any(hasattr(ax, "_end_labels") for ax in fig.axes):
        fig.draw_without_rendering()  # limits and layout are final only now
        _spread_all(fig)
    buffer, lighter = io.BytesIO(), io.BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi * scale)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(lighter, format="png")
    return lighter.getvalue()


def screen_png(fig: Figure, *, scale: float = 1.5) -> bytes:
    """The same for a widget, which has to follow a hand: measured and laid out once, all colours (a hurried palette
    makes bands of a heat map), packed lightly. Leaves the figure changed: its dpi, its layout, the small ticks of its
    logarithmic axes."""
    fig.set_dpi(fig.dpi * scale)
    simple = all(ax.get_aspect() == "auto" and not ax.get_axes_locator() for ax in fig.axes)
    for ax in fig.axes:
        _leave_out_of_layout(ax)
        _fewer_ticks(ax)
        if simple:
            _measure_once(ax)
    if any(hasattr(ax, "_end_labels") for ax in fig.axes):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        _spread_all(fig)
    canvas, buffer = FigureCanvasAgg(fig), io.BytesIO()
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _leave_out_of_layout(ax: Axes) -> None:
    """What lies within the axes needs no room beside them, and measuring it takes a tenth of the time."""
    for spine in ax.spines.values():
        spine.set_in_layout(False)
    legend = ax.get_legend()
    if legend and legend.get_bbox_to_anchor() is ax.bbox:  # else it stands somewhere outside
        legend.set_in_layout(False)


def _measure_once(ax: Axes) -> None:
    """The layout measures what surrounds the axes twice, since labels may change as the axes move. For a widget once
    is enough, and spares a seventh of the drawing: the second time they get the margins of the first. (Not for a colour
    bar or a given aspect, whose axes find their size only as they are drawn.)"""
    measured = ax.get_tightbbox

    @functools.cache
    def margins(*rest, **options) -> np.ndarray:
        around = measured(*rest, **options)
        return None if around is None else around.extents - ax.bbox.extents

    def around(*rest, **options) -> Bbox | None:
        sides = margins(*rest, **options)
        return None if sides is None else Bbox.from_extents(*(ax.bbox.extents + sides))

    ax.get_tightbbox = around


def _fewer_ticks(ax: Axes) -> None:
    """Each small tick of a logarithmic axis is an artist of its own, and dozens of them cost more than the curves.
    From two decades on none has a label."""
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        if axis.get_scale() == "log" and high >= 100 * low:
            axis.set_minor_locator(NullLocator())


def _spread_all(fig: Figure) -> None:
    for ax in fig.axes:
        if hasattr(ax, "_end_labels"):
            _spread(ax)
