"""Every widget of a lab in a real browser: its controls have names, and the keyboard takes each to its ends.

`walk` is called by test_browser.py once a lab has run. A slider goes to both ends and a step back, a list through all
its options; each move must give another picture with another text. The time of a move is from the key to the decoded
picture, by the page's own clock.

    python tests/browser_widgets.py FOLDER      the tables that a run with WIDGET_TIMES=FOLDER left there
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median

BOX = ".jp-OutputArea .widget-vbox:has(.widget-html-content > img, .widget-html-content table)"
UNNAMED = re.compile(r'^\s*- (slider|combobox|textbox|spinbutton|radio|checkbox|button)(?! ")', re.MULTILINE)
WATCH = """box => {
    const seen = box.seen = {pressed: 0, drawn: 0, count: 0};
    box.addEventListener("keydown", () => { seen.pressed = performance.now(); }, true);
    const content = [...box.querySelectorAll(".widget-html-content")].at(-1);
    new MutationObserver(async () => {
        await content.querySelector("img")?.decode().catch(() => {});  // replaced by the next: that one counts
        seen.drawn = performance.now();
        seen.count += 1;
    }).observe(content, {childList: true, subtree: true});
}"""


class Widget:
    """One widget on the page: what it shows now, and keys pressed on it with the time that each took."""

    def __init__(self, page, box):
        self.page, self.box, self.element, self.milliseconds = page, box, box.element_handle(), []
        page.evaluate(WATCH, self.element)

    def shown(self) -> tuple[str | None, ...]:
        """Picture and text, or the table."""
        image = self.box.locator(".widget-html-content > img")
        if image.count():
            return image.get_attribute("src"), image.get_attribute("alt")
        return (self.box.locator(".widget-html-content").last.inner_text(),)

    def press(self, control, key: str) -> None:
        """Press a key on a control, wait for the redraw, and note how long it took."""
        count = self.page.evaluate("box => box.seen.count", self.element)
        control.press(key)  # focuses it first
        self._wait(count)

    def press_to_move(self, control, key: str, value: Callable[[], str]) -> bool:
        """Press a key on a control; if that changes `value()`, picture and text must change too. Whether it did."""
        before, shown = value(), self.shown()
        count = self.page.evaluate("box => box.seen.count", self.element)
        control.press(key)  # focuses it first
        if value() == before:
            return False
        self._wait(count)
        self._until(lambda: not self._unchanged(shown))  # what was drawn may have been asked for by the key before
        same = self._unchanged(shown)
        assert not same, f"{key} took a control from {before} to {value()}, and {same[0][:60]!r} did not change"
        return True

    def wait_for(self, shown: tuple) -> None:
        """Wait until it shows this again: a picture still on its way would be taken for the answer to the next key."""
        self._until(lambda: self.shown() == shown)
        assert self.shown() == shown, f"back where it was it shows {self.shown()[-1]!r}, not {shown[-1]!r}"

    def _until(self, true: Callable[[], bool], seconds: float = 5.0) -> None:
        """Wait for it, at most so long: what is still false then is for the caller to name."""
        end = time.monotonic() + seconds
        while not true() and time.monotonic() < end:
            self.page.wait_for_timeout(50)

    def _unchanged(self, shown: tuple) -> list:
        """Of picture and text those that are still what was shown."""
        return [part for part, other in zip(self.shown(), shown, strict=True) if part == other]

    def _wait(self, count: int) -> None:
        self.page.wait_for_function("([box, count]) => box.seen.count > count", arg=[self.element, count])
        self.milliseconds.append(self.page.evaluate("box => box.seen.drawn - box.seen.pressed", self.element))
        assert "Nothing to draw" not in self.box.inner_text(), self.box.inner_text()


def walk(page, box) -> list[float]:
    """Take every control of the widget to its ends; returns the milliseconds of each move."""
    assert not (bare := UNNAMED.findall(box.aria_snapshot())), f"controls without a name: {bare}"
    widget = Widget(page, box)
    for number in range(box.locator(".noUi-handle").count()):
        _slide(widget, number)
    for number in range(box.locator("select").count()):
        _choose(widget, number)
    for field in ("input[type=text]", "input[type=number]"):
        if box.locator(field).count():
            widget.press(box.locator(field), "ArrowUp" if "number" in field else "e")
    return widget.milliseconds


def _slide(widget: Widget, number: int) -> None:
    """To both ends, a step back, and home to its start by typing the number."""
    shown = widget.shown()
    handle = widget.box.locator(".noUi-handle").nth(number)
    start = (readout := widget.box.locator(".widget-readout").nth(number)).inner_text()
    value = partial(handle.get_attribute, "aria-valuetext")
    moved = [widget.press_to_move(handle, key, value) for key in ("Home", "End")]
    assert any(moved), "neither Home nor End moves the slider"
    widget.press(handle, "ArrowLeft")
    if readout.inner_text() != start:
        readout.press("ControlOrMeta+A")
        widget.page.keyboard.type(start.replace("−", "-"))
        widget.press(readout, "Enter")
    assert readout.inner_text() == start
    widget.wait_for(shown)


def _choose(widget: Widget, number: int) -> None:
    """Through all options from the first to the last, then back to the one it had."""
    field = widget.box.locator("select").nth(number)
    shown, start, options = widget.shown(), field.input_value(), field.locator("option").count()
    widget.press_to_move(field, "Home", field.input_value)
    for _ in range(options - 1):
        assert widget.press_to_move(field, "ArrowDown", field.input_value), f"keys stop at {field.input_value()}"
    if start != field.input_value():
        field.select_option(start)
    widget.wait_for(shown)


# the tables of a run -------------------------------------------------------------------------------------------------

def tables(folder: Path) -> Iterator[str]:
    """Lines: each widget's redraw in the kernel, and its moves in the browser."""
    for row in _rows(folder / "kernel.jsonl"):
        yield (f"{row['notebook']} {row['widget']:24} in the kernel: {row['places']:4} places, median "
               f"{row['median_ms']:4} ms, worst {row['worst_ms']:4} ms at {row['at']}")
    browser = sorted(_rows(folder / "browser.jsonl"), key=lambda row: row["notebook"])
    for notebook, rows in groupby(browser, key=lambda row: row["notebook"]):
        for number, row in enumerate(rows, 1):
            yield (f"{notebook} widget {number} in the browser: {len(row['ms']):3} moves, median "
                   f"{median(row['ms']):4.0f} ms, worst {max(row['ms']):4.0f} ms")


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    print(*tables(Path(sys.argv[1])), sep="\n")
