"""What the terminal shows while a notebook runs: which cell, under which heading, how long, how long still.

Inside a long cell the notebook's own bar writes its state to a file (labkit/progress.py), and it is shown here.
Where nobody watches (a log file), there is one line a heading instead.
"""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text


class RunProgress:
    """`with RunProgress(...) as bar`; nbclient calls `start` and `finish`, `now` names the current cell."""

    def __init__(self, title: str, cells: list[tuple[int, str]], expected: float | None, folder: Path, *, live: bool):
        self.title, self.expected, self.watched = title, expected, live
        self.file = folder / "progress.json"
        self.order = {index: (number, heading) for number, (index, heading) in enumerate(cells, start=1)}
        self.total, self.now, self.began = len(cells), (0, len(cells), ""), time.monotonic()
        self.console = Console(stderr=True)
        self.live = None

    def __enter__(self) -> "RunProgress":
        if self.watched and self.console.is_terminal:
            self.live = Live(self, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def start(self, cell, cell_index: int, **_) -> None:
        """A cell begins (nbclient also calls this for markdown cells)."""
        if cell_index not in self.order:
            return
        before, (number, heading) = self.now[2], self.order[cell_index]
        self.now = (number, self.total, heading)
        self.file.unlink(missing_ok=True)  # the bar of the cell before
        if not self.live and heading != before:
            line = f"{self.title}: cell {number} of {self.total}, {heading} ({self._clock()})"
            self.console.print(line, highlight=False, markup=False)

    def finish(self, **_) -> None:
        """A cell has ended; its bar is no longer true."""
        self.file.unlink(missing_ok=True)

    def __rich__(self) -> Text:
        number, total, heading = self.now
        line = f"{self.title}: cell {number} of {total}" + (f", {heading}" if heading else "") + f"  {self._clock()}"
        inner = self._inner()
        return Text(f"{line}\n  {inner}" if inner else line, overflow="ellipsis", no_wrap=True)

    def _clock(self) -> str:
        elapsed = time.monotonic() - self.began
        if not self.expected:
            return duration(elapsed)
        left = self.expected - elapsed
        rest = f"about {duration(left)} left" if left > 0 else "longer than its header says"
        return f"{duration(elapsed)}, {rest}"

    def _inner(self) -> str:
        try:
            state = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return ""
        done, total, seconds = state["done"], state["total"], state["seconds"]
        left = f", {duration(seconds / done * (total - done))} left" if done and total else ""
        return f"{state['label']}: {done} of {total} {state['unit']}s{left}  {state['note']}".rstrip()


def duration(seconds: float) -> str:
    """75 → "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
