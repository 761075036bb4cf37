"""`Lab`: the one object that a notebook talks to.

It knows the scale and the device, asks for predictions, shows figures and widgets, checks exercises and hands
measurements to the claims ledger. Each method works in JupyterLab, in a headless run (nbval, nbclient), and in
plain Python without IPython (`labkit run --in-process`), where it is silent.

Nothing on disk changes unless LABKIT_RESULTS names a folder (`labkit run` does that); then NN.json and
NN.figures.json there are rewritten whole after each record, each keep and each cell.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from labkit import progress
from labkit.course import check, display, predict, record, widget_trial, widgets
from labkit.course.scale import SCALES, choose_scale, has_device
from labkit.errors import LabError


class Lab:
    """What notebook NN needs: `lab = Lab("02")` is its first line of code.

    `needs="triton"` says that nothing in it runs without Triton, which has wheels for Linux only.
    """

    def __init__(self, notebook: str, *, needs: str | None = None):
        import torch

        if needs and not importlib.util.find_spec(needs):
            raise LabError(f"Lab {notebook} needs {needs.capitalize()}, which is not installed.",
                           "It has wheels for Linux only: use Linux, or WSL on Windows; the other labs run without it.")
        self.notebook, choice, self._start = notebook, choose_scale(), time.monotonic()
        self.scale = choice.name
        cuda = has_device(self.scale)
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
        self.interactive = progress.interactive() and display.kernel() is not None
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
        self._kept: dict[str, object] = {}
        self._ledger = None
        self._announce(choice.reason)
        self._write_after_each_cell()

    def _announce(self, reason: str) -> None:
        type_name = str(self.dtype).removeprefix("torch.")
        print(f"Scale {self.scale}, because {reason}. Device: {self.device.type}, {type_name}.")

    # settings, figures, tables ------------------------------------------------------------------------------------

    def settings(self, **columns: tuple) -> SimpleNamespace:
        """This scale's column: every keyword holds three values, for quick, desk and workstation."""
        for name, values in columns.items():
            if not isinstance(values, tuple) or len(values) != len(SCALES):
                raise LabError(f"The setting {name!r} needs three columns, got {values!r}.",
                               f"Write {name}=(value for {', value for '.join(SCALES)}).")
        place = SCALES.index(self.scale)
        return SimpleNamespace(**{name: values[place] for name, values in columns.items()})

    def show(self, figure, alt: str) -> None:
        """Show a matplotlib figure once, with its finding as alternative text, and free it."""
        if not alt or not alt.strip():
            raise LabError("A figure has no alternative text.", "Give lab.show a sentence that says what it shows.")
        if display.kernel():
            from labkit.course import figures

            width = round(figure.get_figwidth() * figure.dpi)
            display.publish_png(figures.png(figure), " ".join(alt.split()), width)
            if self.interactive:
                display.publish_for_screen_readers(" ".join(alt.split()))
        widgets.close(figure)

    def table(self, rows: Sequence[Mapping | Sequence], columns: Sequence[str] | None = None,
              caption: str = "") -> None:
        """A small table from mappings, or from sequences with `columns` as heads."""
        display.publish_html(*display.table(rows, columns, caption))

    # predict, play, exercise --------------------------------------------------------------------------------------

    def predict(self, key: str, question: str, options: Sequence[str], *, default: str) -> None:
        """Ask the learner before the experiment. A headless run shows the question and stores nothing."""
        predict.ask(self.notebook, key, question, list(options), default, interactive=self.interactive)

    def prediction(self, key: str) -> str | None:
        """What the learner committed to under this key, or None."""
        return predict.answer(self.notebook, key) if self.interactive else None

    def reveal(self, key: str, truth: object, explain: str = "") -> None:
        """Put the learner's prediction beside what was measured; silent if there is nobody. The answer is kept with the
        run's results, for the instructor's copy."""
        self._kept.setdefault("answers", {})[key] = {"answer": str(truth), "sentence": explain}
        if self.interactive:
            predict.reveal(self.notebook, key, str(truth), explain)

    def play(self, draw: Callable, alt: str | Callable[..., str], **controls: widgets.Control) -> None:
        """Let the learner move `controls` and see `draw(**values)` follow; headless, the starting picture."""
        if how := widget_trial.wanted():
            widget_trial.try_all(self.notebook, draw, alt, controls, how)
        widgets.play(self, draw, alt, controls)

    def check(self, name: str, answer: object) -> None:
        """Say whether an exercise's answer is right and, if not, what to look at; never raises."""
        check.respond(name, answer)

    def solution(self, name: str, answer: object) -> None:
        """The same check for the course's own solution: a wrong one raises AssertionError."""
        check.confirm(name, answer)

    def hint(self, name: str) -> None:
        """The hint of an exercise."""
        check.show_hint(name)

    # results ------------------------------------------------------------------------------------------------------

    def record(self, claim_id: str, ours, baseline=None) -> None:
        """Hand a measurement to the ledger: mappings seed → value, or plain numbers for an exact claim."""
        self._rows_ledger().record(claim_id, ours, baseline)
        self.write_results()

    def keep(self, name: str, value: object) -> object:
        """Keep the data behind a figure under `name`; returns it as a later reader will get it (see record.plain)."""
        self._kept[name] = record.plain(name, value)
        self.write_results()
        return self._kept[name]

    def recorded(self, name: str, scale: str = "desk", device: str | None = None) -> object | None:
        """What the shipped run at `scale` kept under `name`, or None if there is none."""
        return record.recorded(self.notebook, name, scale, device)

    def ledger(self) -> None:
        """This notebook's claims: the paper, quick (just now), desk, workstation, verdict."""
        self.table(self._rows_ledger().table_rows(), caption=f"Claims ledger of notebook {self.notebook}")

    def _rows_ledger(self):
        if self._ledger is None:
            from labkit.course.ledger import Ledger

            self._ledger = Ledger(self.notebook, self.scale, record.device_name(self.device))
        return self._ledger

    def write_results(self) -> None:
        """Rewrite this run's result files, if `labkit run` asked for them."""
        folder = os.environ.get("LABKIT_RESULTS")
        if folder:
            rows = self._ledger.rows if self._ledger else []
            record.write(Path(folder), self.notebook, self.scale, self.device, rows, self._kept,
                         seconds=time.monotonic() - self._start)

    def _write_after_each_cell(self) -> None:
        """So that a notebook without claims leaves a result too, and the peak memory is that of its last cell."""
        kernel = display.kernel()
        if kernel and os.environ.get("LABKIT_RESULTS"):
            kernel.shell.events.register("post_run_cell", lambda *_: self.write_results())
