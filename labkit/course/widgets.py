"""Something to move: sliders and choices beside a picture that follows at once.

The picture is an HTML <img>, so that a screen reader gets its text and the text changes with it. The front end
sends the next position of a slider only when the last one was drawn, so a slow figure skips positions and never
falls behind. A value out of range can't be entered.
"""

import html
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labkit.course import display
from labkit.errors import LabError


@dataclass(frozen=True)
class Control:
    """One thing to move: its starting value, what it may be, and how an ipywidget for it is made."""

    value: object
    range_text: str
    widget: Callable


def slider(low: float, high: float, step: float, value: float, label: str) -> Control:
    """A slider over low … high in steps; whole numbers throughout give whole numbers."""
    if not (low < high and low <= value <= high and 0 < step <= high - low):
        raise LabError(f"The slider {label!r} needs low <= value <= high and a step that fits.",
                       f"It was given low {low}, high {high}, step {step}, value {value}.")

    def widget():
        import ipywidgets

        whole = all(isinstance(number, int) for number in (low, high, step, value))
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        return kind(min=low, max=high, step=step, value=value, description=label, continuous_update=True,
                    style={"description_width": "initial"}, layout=ipywidgets.Layout(width="32em", max_width="100%"))

    return Control(value, f"{label}: {low} to {high}", widget)


def choice(options: Sequence, value: object, label: str) -> Control:
    """A drop-down list; `options` are the values themselves, shown as text."""
    if value not in options:
        raise LabError(f"The choice {label!r} starts at {value!r}, which is not an option.",
                       f"Options: {', '.join(map(str, options))}.")

    def widget():
        import ipywidgets

        return ipywidgets.Dropdown(options=[(str(option), option) for option in options], value=value,
                                   description=label, style={"description_width": "initial"},
                                   layout=ipywidgets.Layout(width="max-content", max_width="100%"))

    return Control(value, f"{label}: {', '.join(map(str, options))}", widget)


def close(figure) -> None:
    """Free a figure, also one that pyplot manages; without this the front end would draw it a second time."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot:
        pyplot.close(figure)
    figure.clear()


def play(lab, draw: Callable, alt: str | Callable[..., str], controls: dict[str, Control]) -> None:
    """See Lab.play. A headless run draws the starting picture, so that a broken `draw` fails there."""
    values = {name: control.value for name, control in controls.items()}
    text = alt(**values) if callable(alt) else alt
    if lab.interactive:
        _interactive(draw, alt, controls)
    else:
        lab.show(draw(**values), text)
        if display.kernel():
            ranges = "; ".join(control.range_text for control in controls.values())
            print(f"Run this cell in JupyterLab to move {ranges}.")


def _interactive(draw: Callable, alt: str | Callable[..., str], controls: dict[str, Control]) -> None:
    import ipywidgets
    from IPython.display import display as show

    handles = {name: control.widget() for name, control in controls.items()}
    picture = ipywidgets.HTML(layout=ipywidgets.Layout(width="100%"))

    def redraw(_=None) -> None:
        picture.value = _picture(draw, alt, {name: handle.value for name, handle in handles.items()})

    for handle in handles.values():
        handle.observe(redraw, names="value")
    redraw()
    show(ipywidgets.VBox([*handles.values(), picture]))


def _picture(draw: Callable, alt: str | Callable[..., str], values: dict) -> str:
    """The <img> for these values, or the sentence of what went wrong: a widget never breaks."""
    from labkit.course import figures

    try:
        figure = draw(**values)
        text = alt(**values) if callable(alt) else alt
        markup = display.inline_image(figures.png(figure, scale=1.5, small=False), text,
                                      round(figure.get_figwidth() * figure.dpi))
        close(figure)
        return markup
    except Exception as error:
        at = ", ".join(f"{name} = {value}" for name, value in values.items())
        return f'<p role="alert">Nothing to draw at {html.escape(at)}: {html.escape(str(error))}</p>'
