"""The diagnosis of a distillation run as one picture: six gauges with their limits, and what each one says."""

import textwrap

from matplotlib.figure import Figure

from labkit.course.figures import PALETTE, figure
from labkit.measure.diagnosis import Diagnosis

VERDICTS = {True: ("FOUND", PALETTE["vermillion"]), False: ("no", PALETTE["blue"]), None: ("not measured", "#555555")}


def draw_diagnosis(diagnosis: Diagnosis) -> Figure:
    """One row a way to fail: its name, the verdict in words, and the sentence with the numbers."""
    rows = diagnosis.findings
    fig, ax = figure(width=8.4, height=0.72 * len(rows) + 0.7)
    ax.axis("off")
    ax.set(xlim=(0, 1), ylim=(len(rows), 0))
    found = [each.mode for each in rows if each.found]
    ax.set_title(f"This run shows: {', '.join(found)}" if found else "None of the six failures shows")
    for i, each in enumerate(rows):
        word, colour = VERDICTS[each.found]
        ax.axhspan(i + 0.04, i + 0.96, color="#FBEFE8" if each.found else "#F5F5F5", lw=0)
        ax.text(0.012, i + 0.5, each.mode, va="center", weight="bold")
        ax.text(0.155, i + 0.5, word, va="center", color=colour, weight="bold", fontsize=11)
        ax.text(0.285, i + 0.5, textwrap.fill(each.sentence, 76), va="center", fontsize=10)
    return fig
