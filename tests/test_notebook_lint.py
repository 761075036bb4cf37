"""The lint finds nothing in a good lab, and names each defect in a lab that has just that one.

The bad labs differ from the good one in a single place, so a rule that is deleted lets exactly its notebook pass.
"""

import json

import pytest
from notebooks_bad import build

from labkit.course import header, notebook_lint, results


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A quick run of lab 98 that took 0.3 minutes and 0.5 GB."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    (tmp_path / "results/quick").mkdir(parents=True)
    (tmp_path / "results/quick/98.json").write_text(json.dumps({"seconds": 18.0, "peak_gb": 0.5}))


@pytest.mark.usefixtures("measured")
def test_a_good_lab_has_no_problems(tmp_path, capsys):
    """Also through the command line, which must then exit with 0 and count what it read."""
    path = build.write(tmp_path / "98_good.ipynb", build.good())
    assert notebook_lint.lint(path) == []
    assert notebook_lint.main([str(tmp_path)]) == 0
    assert "1 notebooks, 0 problems" in capsys.readouterr().out


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("defect", build.BAD)
def test_each_defect_is_named(defect, tmp_path):
    """Exactly one kind of sentence comes back, and it names the file and the defect."""
    content, words = build.bad(defect)
    path = build.write(tmp_path / "98_bad.ipynb", content)
    problems = notebook_lint.lint(path)
    assert any(words in problem for problem in problems), problems
    assert all(problem.startswith("98_bad.ipynb: ") for problem in problems)
    assert notebook_lint.main([str(path)]) == 1


@pytest.mark.parametrize("line", ["# NBVAL_CHECK_OUTPUT", "    # NBVAL_SKIP", "# the output is checked by nbval itself",
                                  'x = "# NBVAL_SKIP is a marker"', "# ignore the output of this cell"])
def test_right_markers_and_prose_pass(line, tmp_path):
    """Exact spellings are allowed; prose in which the words occur is no marker, except for the name nbval-something."""
    source = f"if True:\n{line}\n    x = 1" if line.startswith(" ") else f"{line}\nx = 1"
    notebook = build.plain(source)
    problems = list(notebook_lint.markers(notebook))
    assert bool(problems) == ("by nbval" in line), problems


def test_other_notebooks_owe_no_anatomy(tmp_path):
    """A learner's own notebook in the folder needs no header and no ledger."""
    assert notebook_lint.lint(build.write(tmp_path / "scratch.ipynb", build.plain("1 + 1"))) == []


def test_broken_files_and_empty_folders_are_sentences(tmp_path, capsys):
    """No traceback, exit status 1; an empty folder must not look like a clean one."""
    (tmp_path / "98_torn.ipynb").write_text('{"nbformat": 4, "cells": [')
    assert notebook_lint.main([str(tmp_path)]) == 1
    assert "can't be read as a notebook" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert notebook_lint.main([str(tmp_path / "empty")]) == 1
    assert notebook_lint.main([]) == 1


def test_header_is_read_as_written():
    """Title, question and both columns of the budget; "not run yet" is None, and units in a cell do no harm."""
    found = header.header_of(build.notebook(build.text(build.HEADER.replace("0.5", "0.5 min"))))
    assert (found.title, found.question) == ("A lab", "Does it hold?")
    assert found.minutes == {"quick": 0.5, "desk": None, "workstation": None}
    assert found.gigabytes["quick"] == 0.6


def test_the_shipped_notebooks_pass():
    """The course's own notebooks, as they are committed, against the results that are shipped with them."""
    paths = sorted(header.NOTEBOOKS.glob("*.ipynb"))
    assert paths, "the course has no notebooks"
    assert [problem for path in paths for problem in notebook_lint.lint(path)] == []
