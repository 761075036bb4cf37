"""Something to move: sliders and choices beside a picture that follows at once.

The picture is an HTML <img>, so that a screen reader gets its text and the text changes with it. The front end
sends the next position of a slider only when the last one was drawn, so a slow figure skips positions and never
falls behind. A value out of range can't be entered.
"""

import gc
import html
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labkit.course import display, widget_access
from labkit.errors import LabError


@dataclass(frozen=True)
class Control:
    """One thing to move: its starting value, all it can be moved to in order, and how an ipywidget for it is made."""

    value: object
    values: Sequence
    range_text: str
    widget: Callable


def slider(low: float, high: float, step: float, value: float, label: str) -> Control:
    """A slider over low … high in steps; whole numbers throughout give whole numbers."""
    if not (low < high and low <= value <= high and 0 < step <= high - low):
        raise LabError(f"The slider {label!r} needs low <= value <= high and a step that fits.",
                       f"It was given low {low}, high {high}, step {step}, value {value}.")

    def widget():
        import ipywidgets

        wide = {"style": {"description_width": "initial"}, "layout": ipywidgets.Layout(width="32em", max_width="100%")}
        about = {"min": low, "max": high, "step": step, "value": value, "description": label, "tooltip": label} | wide
        if all(isinstance(number, int) for number in (low, high, step, value)):
            return ipywidgets.IntSlider(**about)
        return ipywidgets.FloatSlider(**about, readout_format=f".{_digits(low, step)}f")

    return Control(value, _steps(low, high, step), f"{label}: {low} to {high}", widget)


def _digits(*numbers: float) -> int:
    """Digits behind the point, so that the number beside a slider is where it stands."""
    return max(len(f"{number:.6f}".rstrip("0").split(".")[1]) for number in numbers)


def _steps(low: float, high: float, step: float) -> tuple[float, ...]:
    """Where the keyboard takes a slider: every step from the low end, and the high end."""
    return (*(round(low + i * step, 12) for i in range(math.ceil((high - low) / step - 1e-9))), high)


def choice(options: Sequence, value: object, label: str) -> Control:
    """A drop-down list; `options` are the values themselves, shown as text."""
    if value not in options:
        raise LabError(f"The choice {label!r} starts at {value!r}, which is not an option.",
                       f"Options: {', '.join(map(str, options))}.")

    def widget():
        import ipywidgets

        return ipywidgets.Dropdown(options=[(str(option), option) for option in options], value=value,
                                   description=label, tooltip=label, style={"description_width": "initial"},
                                   layout=ipywidgets.Layout(width="max-content", max_width="100%"))

    return Control(value, tuple(options), f"{label}: {', '.join(map(str, options))}", widget)


def close(figure) -> None:
    """Free a figure, also one that pyplot manages; without this the front end would draw it a second time."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot:
        pyplot.close(figure)
    figure.clear()


def play(lab, draw: Callable, alt: str | Callable[..., str], controls: dict[str, Control]) -> None:
    """See Lab.play. A headless run draws the starting picture, so that a broken `draw` fails there."""
    if lab.interactive:
        _interactive(draw, alt, controls)
        return
    values = {name: control.value for name, control in controls.items()}
    lab.show(draw(**values), _text(alt, values))
    if display.kernel():
        ranges = "; ".join(control.range_text for control in controls.values())
        print(f"Run this cell in JupyterLab to move {ranges}.")


def _interactive(draw: Callable, alt: str | Callable[..., str], controls: dict[str, Control]) -> None:
    import ipywidgets

    handles = {name: control.widget() for name, control in controls.items()}
    picture = ipywidgets.HTML(layout=ipywidgets.Layout(width="100%"))

    def redraw(_=None) -> None:
        picture.value = _markup(draw, alt, {name: handle.value for name, handle in handles.items()})

    for handle in handles.values():
        handle.observe(redraw, names="value")
    spare_the_collector()
    redraw()
    widget_access.show(ipywidgets.VBox([*handles.values(), picture]))


def spare_the_collector() -> None:
    """Python's garbage collector looks again at all that is alive, 0.1 to 0.3 s with torch loaded, and a redraw can be
    what sets it off. Of what is alive now it need not look at anything before the next widget is made."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def rendered(draw: Callable, alt: str | Callable[..., str], values: dict) -> tuple[bytes, str, int]:
    """(PNG, alternative text, width in CSS pixels) of the figure for these values."""
    from labkit.course import figures

    figure = draw(**values)
    width = round(figure.get_figwidth() * figure.dpi)
    png = figures.screen_png(figure)
    close(figure)
    return png, _text(alt, values), width


def _markup(draw: Callable, alt: str | Callable[..., str], values: dict) -> str:
    """The <img> for these values, or the sentence of what went wrong: a widget never breaks."""
    try:
        return display.inline_image(*rendered(draw, alt, values))
    except Exception as error:
        at = ", ".join(f"{name} = {value}" for name, value in values.items())
        return f'<p role="alert">Nothing to draw at {html.escape(at)}: {html.escape(str(error))}</p>'


def _text(alt: str | Callable[..., str], values: dict) -> str:
    return " ".join((alt(**values) if callable(alt) else alt).split())
