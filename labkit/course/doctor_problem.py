"""One thing that `labkit doctor` found: what it is, what follows from it for the labs, and what mends it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from labkit.files import REPOSITORY

IN_OUR_ENVIRONMENT = Path(sys.prefix) == REPOSITORY / ".venv"
PIP = f"{sys.executable} -m pip install -c constraints.txt"
SETUP_FIX = "rm -f .venv/.installed-* && make install" if IN_OUR_ENVIRONMENT else f"{PIP} -e '.[dev]'"
REBUILD_FIX = "rm -rf .venv && make install" if IN_OUR_ENVIRONMENT else f"{PIP} --force-reinstall torch"
STAY_ON_CPU = "export LABKIT_SCALE=quick"
ON_THE_CPU = "Until then labs run on the CPU, at quick scale; LABKIT_SCALE=desk gives five seeds and verdicts."
NO_LAB = "No lab runs before that."


@dataclass(frozen=True)
class Problem:
    """What is missing, the command or setting that mends it, what follows, and whether the labs cannot run before."""

    what: str
    fix: str
    serious: bool
    follows: str = ""

    def __str__(self) -> str:
        follows = f"\n  What follows: {self.follows}" if self.follows else ""
        return f"{'Problem' if self.serious else 'Note'}: {self.what}{follows}\n  To mend it: {self.fix}"
