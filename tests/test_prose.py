"""The gates of the prose: numbers have a source, links lead somewhere, words are spelt; each gate can fail."""

import json
import random
import re

import pytest

from labkit.course import prose, prose_expressions, prose_links, prose_numbers
from labkit.course.header import NOTEBOOKS, labs
from labkit.errors import LabError
from labkit.files import REPOSITORY

LABS = labs()
PAGES = [*sorted(NOTEBOOKS.glob("*.md")), *sorted(REPOSITORY.glob("*.md")), REPOSITORY / "data" / "SOURCES.md"]
KNOWN = prose_numbers.Known([0.0641, 17203, 0.4799, 38], [(0.0641, 0.038, 0.0897), (-0.28, -0.41, -0.16)], {})


@pytest.mark.parametrize("path", LABS + PAGES, ids=lambda path: path.stem)
def test_the_prose_of_the_course_passes(path):
    assert [*prose.misspelled(path), *prose_links.broken(path), *prose_numbers.unexplained(path)] == []


@pytest.mark.parametrize("written", [
    "0.064", "0.06", "6%", "17,203", "17,200", "17,000", "48%", "38", "0.064 [0.038, 0.090]", "[0.04, 0.09]",
    "6.4% [3.8, 9.0]", "−0.064 [−0.090, −0.038]", "-0.28 [-0.41, -0.16]", "+0.28 [0.16, 0.41]", "[−0.41 to −0.16]"])
def test_roundings_of_known_numbers_are_explained(written):
    assert prose_numbers.explained(written, KNOWN)


@pytest.mark.parametrize("written", [
    "0.065", "0.05", "7%", "17,204", "18,000", "0.064 [0.038, 0.091]", "0.064 [−0.038, 0.090]", "0.063 [0.038, 0.090]",
    "[0.16, 0.42]", "39", "0.0642"])
def test_other_numbers_are_not(written):
    assert not prose_numbers.explained(written, KNOWN)


def test_numbers_are_read_as_they_are_written():
    """Formulas, code, addresses and arXiv's numbers are no prose; years and small counts are words."""
    text = prose.plain_text("In 2026 all 5 runs: −0.28 [−0.41, −0.16] of $0.5$ and `0.6`; 48% of 17,203, 1e-3, "
                            "2.5 times; [here](https://x.org/0.7), F1.5, 0.41 to 0.81.")
    assert prose_numbers._numbers(text) == ["−0.28 [−0.41, −0.16]", "48%", "17,203", "1e-3", "2.5", "0.41", "0.81"]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A function that writes a lab with one sentence, and sources for its numbers, and returns the gate's problems."""
    def check(sentence: str, sources: dict[str, str] | None = None) -> list[str]:
        path = tmp_path / "09_a_lab.ipynb"
        cells = [{"cell_type": "markdown", "source": f"# A lab\n\n## One\n{sentence}"},
                 {"cell_type": "code", "source": "n = 1_234",
                  "outputs": [{"output_type": "stream", "text": "p is 0.75"}]}]
        path.write_text(json.dumps({"nbformat": 4, "cells": cells}), encoding="utf-8")
        marks = {"09": prose_numbers.results_mark("09")}
        monkeypatch.setattr(prose_numbers, "_sources", lambda: {"09": sources or {}, "read_against": marks})
        return list(prose_numbers.unexplained(path))
    return check


def test_a_number_needs_a_source(lab):
    """Code and outputs are sources, so is the ledger; a number from nowhere is named; a stale source too."""
    assert lab("With 1,234 runs, 0.75 of them; gap recovery 1.03 [0.99, 1.07].") == []
    assert "'0.7531' has no source" in lab("It is 0.7531.")[0]
    assert "'1.03 [0.99, 1.08]' has no source" in lab("It is 1.03 [0.99, 1.08].")[0]
    assert lab("It is 0.7531.", {"0.7531": "table 3 of the paper"}) == []
    assert "the text does not have it" in lab("It is.", {"0.7531": "table 3 of the paper"})[0]


def test_an_expression_is_computed_again(lab):
    """Right, wrong, and one that can't be computed."""
    source = "= mean(ours('menu.compatible').values())"
    value = prose_expressions.evaluate(source[1:].strip(), "09")[0]
    assert lab(f"It is {value:.4f}.", {f"{value:.4f}": source}) == []
    assert "is written, and" in lab(f"It is {value + 0.001:.4f}.", {f"{value + 0.001:.4f}": source})[0]
    with pytest.raises(LabError, match="can't be computed"):
        lab("It is 0.7531.", {"0.7531": "= ours('no.such.claim')"})
    with pytest.raises(LabError, match="can't be computed"):
        lab("It is 0.7531.", {"0.7531": "= __import__('os')"})


def test_other_results_ask_for_another_reading(lab, monkeypatch):
    monkeypatch.setattr(prose_numbers, "results_mark", lambda number: next(marks))
    marks = iter(["1234abcd", "5678abcd"])
    assert 'put 09 = "5678abcd"' in lab("All is well.")[0]


def test_most_wrong_numbers_are_caught():
    """Each number of the course, made wrong in its last digit: almost all intervals are caught, and a quarter of the
    single decimals (the others are a rounding of something else in the same lab; hence the mark of the results)."""
    dice, caught = random.Random(0), {True: [], False: []}
    for path in LABS:
        known = prose_numbers.known_numbers(path)
        for written in prose_numbers._numbers(prose_numbers._text(path)):
            if "." in written and written not in known.quoted:
                changed = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + dice.randint(1, 9)) % 10), written)
                caught["[" in written].append(not prose_numbers.explained(changed, known))
    shares = {kind: sum(found) / len(found) for kind, found in caught.items()}
    print({kind: (len(found), round(shares[kind], 3)) for kind, found in caught.items()})
    assert shares[True] > 0.97 and shares[False] > 0.25


@pytest.fixture
def page(tmp_path):
    """A function that writes a page and returns the problems of one gate."""
    def check(gate, text: str) -> list[str]:
        path = tmp_path / "page.md"
        path.write_text(text, encoding="utf-8")
        return list(gate(path))
    return check


def test_misspelt_words_are_named_outside_code(page):
    assert page(prose.misspelled, "The teacher `teh` is right: $recieve$.") == []
    assert "recieve ==> receive" in page(prose.misspelled, "They recieve it.")[0]


@pytest.mark.parametrize("text, part", [
    ("[x](nowhere.md)", "leads to no file"), ("[x](#no-heading)", "leads to no heading"),
    ("[x](http://example.org)", "not https"), ("<https://nohost>", "not https"), ("See lab 77.", "lab 77"),
    ("arXiv 2613.12345", "not the number of a paper")])
def test_broken_links_are_named(page, text, part):
    assert part in page(prose_links.broken, f"# A heading\n{text}")[0]


def test_good_links_pass(page):
    text = "# A heading\n[a](#a-heading) [b](page.md#a-heading) https://arxiv.org lab 07 (arXiv 2605.08738)"
    assert page(prose_links.broken, text) == []


def test_the_command_counts_and_fails(tmp_path, capsys):
    (tmp_path / "page.md").write_text("They recieve [it](gone.md).", encoding="utf-8")
    assert prose.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "1 files, 2 problems" in said.out and "gone.md" in said.err and "recieve" in said.err
    (tmp_path / "page.md").write_text("All is well.", encoding="utf-8")
    assert prose.main([str(tmp_path)]) == 0
