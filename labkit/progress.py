"""Progress with the time left, shown where somebody looks and silent where nobody does.

A person at a notebook or a terminal sees a tqdm bar. A headless run (nbval, nbclient) sees nothing in its
outputs; `labkit run` names a file in LABKIT_PROGRESS_FILE, and the bar writes its state there instead.
"""

import contextlib
import contextvars
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm as terminal_bar

_hidden = contextvars.ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """No bars inside this block and thread: for a run that is one of many, whose bar counts the runs."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def interactive() -> bool:
    """Whether a person can answer: a front end that accepts input, or a terminal."""
    if "LABKIT_INTERACTIVE" in os.environ:
        return os.environ["LABKIT_INTERACTIVE"] == "1"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is not None:  # nbval and nbclient execute with allow_stdin = False, JupyterLab with True
        return bool(getattr(kernel, "_allow_stdin", False))
    return sys.stderr.isatty()


def bar(total: int, label: str, unit: str = "step"):
    """A progress bar to be used in a `with` block; call `.update(n)` and `.set_postfix_str(text)`."""
    path = os.environ.get("LABKIT_PROGRESS_FILE")
    if _hidden.get():
        return terminal_bar(total=total, disable=True)
    if path:
        return FileBar(path, total, label, unit)
    if interactive() and _in_notebook():
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(total=total, desc=label, unit=unit, leave=False)
    return terminal_bar(total=total, desc=label, unit=unit, leave=False, disable=not interactive())


def _in_notebook() -> bool:
    """Whether a widget can show: a kernel, with ipywidgets at hand. A terminal's bar would leave a red box there."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None and importlib.util.find_spec("ipywidgets") is not None


class FileBar:
    """A bar for another process to read: {label, done, total, unit, seconds, note} as JSON, at most twice a second."""

    def __init__(self, path: str, total: int, label: str, unit: str):
        self.path, self.total, self.label, self.unit = path, total, label, unit
        self.done, self.note, self.start, self.last = 0, "", time.monotonic(), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._write()

    def update(self, n: int = 1) -> None:
        self.done += n
        if time.monotonic() - self.last > 0.5:
            self._write()

    def set_postfix_str(self, note: str) -> None:
        self.note = note

    def _write(self) -> None:
        self.last = time.monotonic()
        state = {"label": self.label, "done": self.done, "total": self.total, "unit": self.unit,
                 "seconds": round(self.last - self.start, 2), "note": self.note}
        temporary = f"{self.path}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(state, file)
        os.replace(temporary, self.path)
