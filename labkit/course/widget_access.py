"""Widgets for the keyboard and for screen readers: what ipywidgets in JupyterLab lacks, as of 8.1 and 4.6.

A slider's handle has no accessible name, and JupyterLab takes keys from a list, a radio button and a slider: arrows
up and down move to the next cell, and the letter x cuts the cell. A script beside the widget names each handle and
number after its label, and marks each control so that JupyterLab leaves its keys alone. Other front ends ignore it.
"""

from labkit.course import display

SCRIPT = """
const mend = area => area.querySelectorAll(".jupyter-widgets").forEach(widget => {
    const name = widget.querySelector(":scope > label")?.textContent;
    for (const part of widget.querySelectorAll(":scope .noUi-handle, :scope > .widget-readout")) {
        if (name) part.setAttribute("aria-label", name);
    }
    for (const part of widget.querySelectorAll("select, input, button, .noUi-handle")) {
        part.setAttribute("data-lm-suppress-shortcuts", "true");
    }
});
const begin = tries => {
    const area = element.closest?.(".jp-OutputArea");
    if (area) {
        new MutationObserver(() => mend(area)).observe(area, {childList: true, subtree: true});
        mend(area);
    } else if (tries) {
        setTimeout(begin, 100, tries - 1);
    }
};
begin(50);
"""


def show(box) -> None:
    """Display an ipywidget with its script."""
    from IPython.display import display as show_widget

    show_widget(box)
    if display.kernel():
        display.publish({"application/javascript": f"{{{SCRIPT}}}"})
