"""nbval with the guard of notebooks/conftest.py: what it must catch, what it must leave alone, and that it is needed.

One run of pytest over a temporary folder serves all cases; the report is read from its JUnit file.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from notebooks_bad import build

GUARD = Path(__file__).parent.parent / "notebooks" / "conftest.py"
NBVAL = [sys.executable, "-m", "pytest", "-q", "-p", "no:python", "-p", "no:cacheprovider", "--nbval-lax",
         "--nbval-current-env", "--nbval-cell-timeout", "60", "--junitxml", "report.xml", "--rootdir", ".", "."]


def report(folder: Path) -> dict[str, ElementTree.Element]:
    """Run nbval over a folder: "notebook Cell n" → its JUnit entry (nbval counts cells from 0)."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    subprocess.run(NBVAL, cwd=folder, env=os.environ | {"LABKIT_SCALE": "quick"}, capture_output=True, timeout=120)
    cases = ElementTree.parse(folder / "report.xml").iter("testcase")
    return {f"{Path(case.get('classname')).stem} {case.get('name')}": case for case in cases}


def message(case: ElementTree.Element) -> str:
    """What the failure says; empty for a cell that passed."""
    return " ".join((failure.text or "") for failure in case.iter() if failure.tag in ("failure", "error"))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> dict[str, ElementTree.Element]:
    folder = tmp_path_factory.mktemp("guarded")
    shutil.copy(GUARD, folder / "conftest.py")
    build.write(folder / "dead.ipynb", build.plain("1 + 1", "import os\nos._exit(1)", "2 + 2"))
    build.write(folder / "magic.ipynb", build.plain("%nosuchmagic\nx = 1", "y = 2",
                                                    "# NBVAL_RAISES_EXCEPTION\n1 / 0",
                                                    "import time\ntime.sleep(1.6)", "1 / 0"))
    return report(folder)


def test_a_dead_kernel_is_reported_at_once(guarded):
    """The cell's time-out is 60 s; the report must name the death, in the right cell, in about two polls."""
    dead = guarded["dead Cell 1"]
    assert "The kernel died in this cell" in message(dead)
    assert float(dead.get("time")) < 3.5
    assert not message(guarded["dead Cell 0"])
    assert message(guarded["dead Cell 2"]), "cells after a dead kernel must not pass"


def test_an_unknown_magic_fails(guarded):
    """IPython prints a sentence and replies "error" without an error message; the guard believes the reply."""
    assert "failed without printing an error" in message(guarded["magic Cell 0"])


def test_other_cells_are_as_before(guarded):
    """Good cells pass, also when slower than one poll; a marked exception passes; an unmarked one fails as ever."""
    assert [message(guarded[f"magic Cell {i}"]) for i in (1, 2, 3)] == ["", "", ""]
    assert "ZeroDivisionError" in message(guarded["magic Cell 4"])


def test_nbval_alone_still_passes_the_magic(tmp_path):
    """The hole that the guard closes: when this fails, nbval has mended it and the guard can go."""
    build.write(tmp_path / "magic.ipynb", build.plain("%nosuchmagic\nx = 1"))
    assert not message(report(tmp_path)["magic Cell 0"])
