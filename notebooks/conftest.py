"""A guard for nbval: a kernel that dies is reported at once, and a cell that failed does not pass.

nbval waits for a dead kernel until the cell's time-out, and passes a cell whose reply says "error" if no error was
printed (an unknown magic, a magic's usage error). It touches nbval's inner names, so nbval is pinned to 0.11;
tests/test_nbval_guard.py holds both cases.
"""

import time
from queue import Empty

from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

POLL_SECONDS = 1.0


class KernelDied(Exception):
    """The kernel's process ended while a cell was running."""


def await_reply(self: RunningKernel, msg_id: str, timeout: float | None = None) -> None:
    """Wait for the reply like nbval, but look once a second whether the kernel is still there."""
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    while True:
        try:
            reply = self.get_message("shell", timeout=max(0.0, min(POLL_SECONDS, end - time.monotonic())))
        except Empty:
            if not self.is_alive():
                raise KernelDied from None
            if time.monotonic() >= end:
                raise
            continue
        if reply["parent_header"].get("msg_id") == msg_id:
            self.reply_status = reply["content"]["status"]
            return


def runtest(self: IPyNbCell) -> None:
    """Run the cell like nbval, then believe the reply's status."""
    self.parent.kernel.reply_status = "ok"
    try:
        nbval_runtest(self)
    except KernelDied:
        self.raise_cell_error("The kernel died in this cell, most often because memory ran out.")
    if self.parent.kernel.reply_status != "ok" and not self.options["check_exception"]:
        self.raise_cell_error("The cell failed without printing an error: an unknown magic, or wrong use of one.")


nbval_runtest, IPyNbCell.runtest, RunningKernel.await_reply = IPyNbCell.runtest, runtest, await_reply
