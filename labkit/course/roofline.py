"""The picture of `labkit bench`: the roofline, with each kernel where it stands, or where it is predicted to.

    attainable FLOP/s = min(peak, FLOP/byte x bandwidth)          Williams, Waterman, Patterson (CACM 2009)

A filled point is measured; a hollow one is a prediction and lies on the roof. How far a point is below the roof is the
whole story, so a small line joins the two. Numbers beside the points lead to a list at the right: a dozen kernels have
nearly the same FLOP/byte, and names would lie upon each other. Points that touch share a label, like "4-8".
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from labkit.course.figures import PALETTE, figure, finding, ink, png
from labkit.files import whole_file

CARD = "H200 SXM"  # of the two that are predicted, the one that is drawn
LOOKS = {"memory": ("o", PALETTE["blue"]), "compute": ("s", PALETTE["vermillion"]),
         "launch": ("^", PALETTE["green"])}
GAP, NEAR = 13.0, 10.0  # points between two numbers; points whose marks are nearer than this share a label
LEFT, RIGHT = 0.05, 1e4  # FLOP per byte


class Dot(NamedTuple):
    """One kernel in one direction: FLOP/byte, FLOP/s, and whether that was measured."""

    name: str
    direction: str
    intensity: float
    rate: float
    fraction: float | None
    bound: str


def bench_picture(report: dict) -> Figure:
    """The roofline of a report, of either kind. `alt_text` says in words what it shows."""
    dots, bandwidth, peak = dots_of(report)
    timed = report["header"]["timed"]
    fig, (ax, side) = figure(1, 2, width=10.6, height=6.2, gridspec_kw={"width_ratios": [1.75, 1]})
    drawn = [dot for dot in dots if dot.intensity >= LEFT]
    x = np.geomspace(LEFT, RIGHT, 500)
    ax.plot(x, np.minimum(peak, x * bandwidth), color=PALETTE["black"])
    for dot in drawn:
        marker, colour = LOOKS[dot.bound]
        roof = min(peak, dot.intensity * bandwidth)
        ax.plot([dot.intensity] * 2, [dot.rate, roof], color=colour, linewidth=1.0)
        ax.plot(dot.intensity, dot.rate, marker=marker, markersize=8, color=colour, linestyle="none",
                markerfacecolor=colour if timed else "white", markeredgewidth=1.6)
    ax.set(xscale="log", yscale="log", xlim=(LEFT, RIGHT), xlabel="FLOP per byte", ylabel="FLOP per second")
    ax.set_ylim(min([dot.rate / 6 for dot in drawn] + [LEFT * bandwidth / 2]), 4 * peak)
    ax.grid(which="minor", visible=False)
    _name_roof(ax, bandwidth, peak, report["header"])
    finding(ax, headline(report), width=62)
    _list(side, drawn, [dot for dot in dots if dot.intensity < LEFT], timed)
    fig.draw_without_rendering()
    _number(ax, drawn)
    return fig


def dots_of(report: dict) -> tuple[list[Dot], float, float]:
    """The points, sorted by intensity, and the two ceilings in bytes/s and FLOP/s."""
    header = report["header"]
    rates = header["ceilings"] if header["timed"] else header["cards"][CARD]
    bandwidth, peak = 1e12 * rates["copy_TBps"], 1e12 * rates["gemm_TFLOPs"]
    rows = [row for row in report["rows"] if row["impl"] == "ours" and not row.get("error") and row["flops"]]
    dots = [_dot(row, header["timed"], bandwidth, peak) for row in rows]
    return sorted(dots, key=lambda dot: (dot.intensity, dot.rate)), bandwidth, peak


def _dot(row: dict, timed: bool, bandwidth: float, peak: float) -> Dot:
    intensity = row["flops"] / row["bytes_floor"]
    if timed:
        return Dot(row["op"], row["direction"], intensity, 1e3 * row["flops"] / row["time_ms"]["p50"],
                   row["fraction_of_floor"], row["bound"])
    return Dot(row["op"], row["direction"], intensity, min(peak, intensity * bandwidth), None,
               row["predicted"][CARD]["bound"])


def headline(report: dict) -> str:
    """The finding, as a sentence."""
    rows = [row for row in report["rows"] if row["impl"] == "ours"]
    if not report["header"]["timed"]:
        bounds = [row["predicted"][CARD]["bound"] for row in rows]
        return (f"Prediction, not timed: memory limits {bounds.count('memory')} of {len(bounds)} passes on an H200, "
                f"arithmetic {bounds.count('compute')}, the launch itself {bounds.count('launch')}")
    good = [row for row in rows if not row["error"] and row["bound"] != "launch"]
    high = sum(row["fraction_of_floor"] >= 0.8 for row in good)
    device = report["header"]["device"]
    return f"{high} of {len(good)} passes that are not launch-bound reach 80% of what this {device} can do"


def alt_text(report: dict) -> str:
    """What the picture shows, for those who do not see it."""
    dots, bandwidth, peak = dots_of(report)
    what = "measured" if report["header"]["timed"] else "predicted"
    points = "; ".join(f"{dot.name} {dot.direction} {dot.intensity:.2g} FLOP/byte, {dot.bound}" + (
        f", {dot.fraction:.0%} of its floor" if dot.fraction is not None else "") for dot in dots)
    return (f"{headline(report)}. A roofline with ceilings of {bandwidth / 1e12:.2f} TB/s and {peak / 1e12:.0f} "
            f"TFLOP/s, and {what} points: {points}.")


def save_picture(report: dict, path: Path) -> None:
    """Write the PNG, whole, with its alternative text beside it."""
    picture = png(bench_picture(report))
    with whole_file(path) as temporary:
        temporary.write_bytes(picture)
    with whole_file(path.with_suffix(".txt")) as temporary:
        temporary.write_text(alt_text(report) + "\n", encoding="utf-8")


def _name_roof(ax: Axes, bandwidth: float, peak: float, header: dict) -> None:
    kind = "measured" if header["timed"] else f"{CARD}, data sheet"
    ridge = peak / bandwidth
    ax.annotate(f"{peak / 1e12:.0f} TFLOP/s ({kind})", (RIGHT, peak), xytext=(0, 6), textcoords="offset points",
                ha="right", fontsize=10)
    start, end = ax.transData.transform([(LEFT, LEFT * bandwidth), (ridge, peak)])
    angle = float(np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0])))
    middle = (4 * ridge) ** 0.5
    ax.annotate(f"{bandwidth / 1e12:.2f} TB/s", (middle, middle * bandwidth), xytext=(-6, 6),
                textcoords="offset points", rotation=angle, rotation_mode="anchor", ha="center", fontsize=10)


def _number(ax: Axes, dots: list[Dot]) -> None:
    """Numbers to the lower right of the points, one label for points that touch, pushed down from other labels."""
    scale = 72.0 / ax.figure.dpi
    places = [ax.transData.transform((dot.intensity, dot.rate)) * scale for dot in dots]
    taken: list[tuple[np.ndarray, float]] = []
    for group in touching(places):
        text, first = ranges(group), dots[group[0]]
        low = places[min(group, key=lambda i: places[i][1])]
        right = max(places[i][0] for i in group)
        width, spot = 7.0 * len(text), np.array([right + 8.0, low[1] - 9.0])
        while any(spot[0] < at[0] + wide and at[0] < spot[0] + width and abs(spot[1] - at[1]) < GAP
                  for at, wide in taken):
            spot = spot - (0.0, 3.0)
        taken.append((spot, width))
        anchor = places[group[0]]
        ax.annotate(text, (first.intensity, first.rate), xytext=spot - anchor, textcoords="offset points", ha="left",
                    va="center", fontsize=10, fontweight="bold")


def touching(places: list[np.ndarray]) -> list[list[int]]:
    """Indices of points, those in one list whose marks touch, directly or through others."""
    groups: list[list[int]] = []
    for i, place in enumerate(places):
        near = [group for group in groups if any(np.hypot(*(place - places[j])) < NEAR for j in group)]
        groups = [group for group in groups if group not in near] + [sorted([i, *(j for each in near for j in each)])]
    return sorted(groups)


def ranges(indices: list[int]) -> str:
    """Numbers from 1, neighbours joined: [0, 1, 2, 4] is "1-3, 5"."""
    runs: list[list[int]] = []
    for number in (i + 1 for i in indices):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _list(side: Axes, dots: list[Dot], absent: list[Dot], timed: bool) -> None:
    """Number, name, direction and fraction of each point; what has too little arithmetic to be drawn; the marks."""
    side.axis("off")
    glyph = {"memory": "●○", "compute": "■□", "launch": "▲△"}
    lines = [(f"{number:>2} {glyph[dot.bound][not timed]} {dot.name}, {dot.direction}"
              + (f"  {dot.fraction:.0%}" if dot.fraction is not None else ""), ink(LOOKS[dot.bound][1]))
             for number, dot in enumerate(dots, 1)]
    lines += [(f"not drawn: {dot.name}, {dot.direction}, {dot.intensity:.1g} FLOP/byte", "black") for dot in absent]
    lines += [("", "black"), *((f"{glyph[bound][not timed]} bound by {word}", ink(LOOKS[bound][1]))
                               for bound, word in (("memory", "memory"), ("compute", "arithmetic"),
                                                   ("launch", "the launch")))]
    step = min(0.05, 1.0 / len(lines))
    for place, (text, colour) in enumerate(lines):
        side.text(0.0, 1.0 - place * step, text, transform=side.transAxes, fontsize=9.5, color=colour, va="top")
