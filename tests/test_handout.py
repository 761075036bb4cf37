"""`labkit handout`: a learner's copy that gives nothing away, an instructor's copy with notes from stored results,
slides that ask for no file; teaching.toml and TEACHING.md say what the notebooks say."""

import copy
import json
import re
import sys
import tomllib
from itertools import pairwise

import nbformat
import pytest
from notebooks_bad import build

from labkit import cli
from labkit.course import handout, handout_answers, handout_copies, handout_math, handout_read, handout_slides, header
from labkit.course import results as shipped
from labkit.course.header import find_notebook, header_of, read_notebook, text_of
from labkit.errors import LabError
from labkit.files import REPOSITORY

REAL = ("02", "08")
NOT_WRITTEN_YET = {"06", "14", "15", "16"}
ASKED = build._data("text/plain", "Predict before you run on: Who wins?\n- A\n- B")
FOUND = {"output_type": "stream", "name": "stdout", "text": "B is ahead by 0.1."}


def made() -> dict:
    """The good small lab with a stored question, a finding, and texts around them."""
    notebook = build.good()
    cells = notebook["cells"]
    cells[3]["outputs"], cells[5]["outputs"] = [ASKED], [FOUND]
    cells[7]["source"] = 'answer = 3\nlab.solution("98.1", answer)'
    told = build.text("B won, as the line above says.\n\n## 2. Exercises\n**98.1** How many?")
    cells.insert(6, told | {"id": "told"})
    return notebook


def real(number: str) -> dict:
    return read_notebook(find_notebook(number))


def sources(notebook: dict) -> str:
    return "\n".join(text_of(cell) for cell in notebook["cells"])


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A course of one lab, 98, without an exercise file: the check of 98.1 is put in place of `find`."""
    from labkit.course.check import Check

    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    build.write(notebooks / "98_lab.ipynb", made())
    monkeypatch.setattr(header, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(shipped, "RESULTS", tmp_path / "results")
    check = Check("How many?", 4, "easy", "Count.", lambda answer: None, wrong=[(2, "x")])
    monkeypatch.setattr(handout_copies, "find", lambda name: check)
    return notebooks / "98_lab.ipynb"


def test_a_copy_beside_a_lab_is_no_lab(tmp_path):
    """A learner's copy, or JupyterLab's Duplicate, must not be run or listed in the lab's place."""
    for name in ("02_a_lab", "02_a_lab.learner", "02_a_lab-Copy1", "03_other"):
        (tmp_path / f"{name}.ipynb").touch()
    assert [path.stem for path in header.labs(tmp_path)] == ["02_a_lab", "03_other"]


# the learner's copy --------------------------------------------------------------------------------------------------

def given_away(original: dict, learner: dict) -> list[str]:
    """Everything that a learner's copy still tells: outputs, counts, lines of solutions, open answers and findings."""
    told = [f"output in {cell['id']}" for cell in learner["cells"] if cell.get("outputs")]
    told += [f"count in {cell['id']}" for cell in learner["cells"] if cell.get("execution_count") is not None]
    kept = {line for cell in original["cells"] if "solution" not in handout_read.tags_of(cell)
            for line in text_of(cell).splitlines()}
    secret = {line for cell in original["cells"] if "solution" in handout_read.tags_of(cell)
              for line in text_of(cell).splitlines() if len(line.strip()) > 8} - kept
    told += [f"solution {line!r}" for line in sorted(secret & set(sources(learner).splitlines()))]
    told += [f"open answer in {cell['id']}" for cell in learner["cells"] if handout_read.calls(cell, "reveal")
             and not cell["metadata"].get("jupyter", {}).get("source_hidden")]
    for cell, below in pairwise(learner["cells"]):
        if handout_read.calls(cell, "reveal") and below["cell_type"] == "markdown":
            if not below["source"].startswith(("<details>", "#")):
                told.append(f"finding in {below['id']}")
    return told


@pytest.mark.parametrize("number", REAL)
def test_a_learners_copy_tells_nothing_and_keeps_what_is_asked(number):
    """No output, no line of a solution, answers folded; every prediction, exercise and other cell is still there."""
    original = real(number)
    learner = handout_copies.learner_copy(original, number)
    nbformat.validate(nbformat.from_dict(learner))
    assert given_away(original, learner) == []
    for tag in ("prediction", "exercise", "settings"):
        before, after = ([text_of(cell) for cell in each["cells"] if tag in handout_read.tags_of(cell)]
                         for each in (original, learner))
        assert before == after and before
    solutions = sum("solution" in handout_read.tags_of(cell) for cell in original["cells"])
    assert len(learner["cells"]) == len(original["cells"]) - solutions + 1  # the note
    assert header_of(learner) == header_of(original)


FAULTS = {  # what a careless copy would do → part of the sentence that names it
    "output": (lambda cells: cells[2].update(outputs=[FOUND]), "output in"),
    "count": (lambda cells: cells[2].update(execution_count=2), "count in"),
    "solution": (lambda cells: cells[-1].update(source="answer = 3"), "solution 'answer = 3'"),
    "open answer": (lambda cells: cells[6]["metadata"].clear(), "open answer in"),
    "finding": (lambda cells: cells[7].update(source="B won, as the line above says."), "finding in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_thing_given_away_would_be_seen(fault):
    """The search above finds nothing in the small lab's copy, and each planted fault by name."""
    original = made()
    learner = handout_copies.learner_copy(original, "98")
    assert given_away(original, learner) == []
    plant, words = FAULTS[fault]
    plant(learner["cells"])
    assert words in " ".join(given_away(original, learner))


def test_findings_are_folded_up_to_the_next_heading():
    """What tells a result is behind a line to click, the exercise below it is not; text before the question is not."""
    learner = handout_copies.learner_copy(made(), "98")
    told = next(text_of(cell) for cell in learner["cells"] if cell["id"] == "told")
    assert told.startswith("<details>") and told.index("B won") < told.index("</details>") < told.index("## 2.")
    notebook = made()
    notebook["cells"][2]["outputs"] = [FOUND]  # before the first prediction nothing can be given away
    notebook["cells"].insert(3, build.text("What the settings mean.") | {"id": "before"})
    cells = {cell["id"]: text_of(cell) for cell in handout_copies.learner_copy(notebook, "98")["cells"]}
    assert cells["before"] == "What the settings mean." and cells["told"].startswith("<details>")


def test_a_copy_that_would_not_run_is_refused():
    """A later cell that needs a name from a solution: the learner's copy would stop there."""
    notebook = made()
    notebook["cells"][-1]["source"] = "lab.ledger()\nprint(answer)"
    with pytest.raises(LabError, match="uses 'answer' from a solution"):
        handout_copies.learner_copy(notebook, "98")
    notebook["cells"][-1]["source"] = "answer = 2\nprint(answer)"
    handout_copies.learner_copy(notebook, "98")


def test_every_lab_runs_without_its_solutions():
    """No lab of the course defines in a solution what a later cell needs."""
    for path in header.labs():
        assert list(handout_copies.names_from_solutions(read_notebook(path))) == [], path.name


# the instructor's copy -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", REAL)
def test_an_instructors_copy_keeps_all_and_adds_notes(number):
    """Outputs as stored, solutions open, before each prediction and each exercise its note."""
    original = real(number)
    copied = handout_copies.instructor_copy(original, number, number)
    nbformat.validate(nbformat.from_dict(copied))
    own = [cell for cell in copied["cells"] if "handout" not in handout_read.tags_of(cell)]
    assert [cell.get("outputs") for cell in own] == [cell.get("outputs") for cell in original["cells"]]
    assert not any(cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in own
                   if "solution" in handout_read.tags_of(cell))
    for note, cell in pairwise(copied["cells"]):
        for key in handout_read.calls(cell, "predict"):
            assert f"prediction `{key}`" in note["source"] and "that tempt" in note["source"]
            assert "as stored" in note["source"] or "Recorded" in note["source"]
        if "exercise" in handout_read.tags_of(cell):
            assert re.search(r"exercise \d\d\.\d\*\*, (easy|medium|hard), about \d+ minutes", note["source"])
            assert note["source"].count("\n> - `") >= 2
    times = copied["cells"][1]["source"]
    for scale, minutes in header_of(original).minutes.items():
        assert f"| {scale} | {handout_copies.shown(minutes)} |" in times


def test_wrong_answers_carry_what_their_checks_say():
    """The sentences are those of the checks, run now; an answer is shown as it is written."""
    known = handout_answers.wrong_answers("02")
    assert known["02.1"][0][0] == "lambda r, s: r * s" and "phase 1 only" in known["02.1"][0][1]
    assert known["02.4"][1][0] == "math.log2" and known["02.4"][1][1].startswith("That is in bits or")
    assert handout_answers.wrong_answers("97") == {}


def test_recorded_answers_come_from_results_then_from_the_notebooks_words(lab):
    """A kept answer at each scale; without one, what the call states, if it is a choice; else the stored output."""
    notebook = read_notebook(lab)
    (prediction,) = handout_read.predictions_of(notebook, lab.name)
    assert (prediction.question, prediction.options) == ("Who wins?", ["A", "B"])
    stated = handout_answers.recorded_answers(notebook, "98", prediction)
    assert [(each.source, each.option) for each in stated] == [("the notebook's text", "A")]
    assert handout_answers.shown_output(notebook, prediction) == ["B is ahead by 0.1."]
    for scale, option in (("quick", "B"), ("desk", "A")):
        (shipped.RESULTS / scale).mkdir(parents=True)
        kept = {"answers": {"who": {"answer": option, "sentence": "By 0.1."}}}
        (shipped.RESULTS / scale / "98.figures.json").write_text(json.dumps(kept))
    recorded = handout_answers.recorded_answers(notebook, "98", prediction)
    assert [(each.source, each.option, each.sentence) for each in recorded] == [
        ("quick", "B", "By 0.1."), ("desk", "A", "By 0.1.")]
    for shelf in ("quick", "desk"):
        (shipped.RESULTS / shelf / "98.figures.json").unlink()
    notebook["cells"][5]["source"] = 'lab.reveal("who", "C")'  # no choice that was offered
    assert handout_answers.recorded_answers(notebook, "98", prediction) == []
    notebook["cells"][5]["source"] = 'lab.reveal("who", winner)'
    assert handout_answers._stated(notebook, prediction) == ("", "")


def test_a_recorded_answer_is_not_called_a_mistake(lab, monkeypatch):
    """A choice that a run made the right one is not listed among those that tempt."""
    monkeypatch.setattr(handout_read, "tempting", lambda number, key: {"A": "why A", "B": "why B"})
    notebook = read_notebook(lab)
    note = handout_copies.prediction_note(notebook, "98", *handout_read.predictions_of(notebook, lab.name))
    assert "Recorded (the notebook's text): **A**" in note and "why A" not in note and "why B" in note


def test_slow_cells_are_listed_if_the_notebook_has_times():
    """Times as JupyterLab stores them, longest first; none stored, none listed."""
    notebook = made()
    assert handout_read.slow_cells(notebook) == []
    for place, seconds in ((1, 5), (2, 12), (3, 0)):
        notebook["cells"][place]["metadata"]["execution"] = {
            "iopub.execute_input": "2026-11-22T10:00:00.000000Z",
            "shell.execute_reply": f"2026-11-22T10:00:{seconds:02d}.500000Z"}
    assert handout_read.slow_cells(notebook) == [(2, 12.5), (1, 5.5)]


# slides --------------------------------------------------------------------------------------------------------------

def requests_of(page: str) -> list[str]:
    """What a browser would fetch for this page: sources, style sheets, imports, fonts."""
    loaders = r"<(?:script|link|img|iframe|source|object|embed)\b[^>]*?(?:src|href|data)"
    found = re.findall(loaders + r"\s*=\s*[\"']([^\"']+)", page)
    found += re.findall(r"(?:@import|url\()\s*[\"']?([^\"')\s;]+)", page)
    found += re.findall(r"\b(?:fetch|import|require)\(\s*[\"']([^\"']+)", page)
    return [address for address in found if not address.startswith("data:")]


@pytest.mark.parametrize("number", REAL)
def test_slides_hold_one_idea_each_and_ask_for_nothing(number):
    """No address is fetched; figures have alternative text; predictions and exercises stand alone; no solution."""
    original = real(number)
    page = handout_slides.slides_page(original, number)
    assert requests_of(page) == [] and "default-src 'none'" in page
    assert "Claims ledger of notebook" in json.dumps(original) and "Claims ledger of notebook" not in page
    pictures = re.findall(r"<img\b[^>]*>", page)
    assert pictures and all(re.search(r'\balt="[^"]{20,}"', tag) for tag in pictures)
    slides = list(handout_slides.slides_of(original, number))
    kinds = [slide.kind for slide in slides]
    assert kinds[0] == "title" and kinds.count("prediction") == len(handout_read.predictions_of(original, number))
    assert kinds.count("exercise") == sum("exercise" in handout_read.tags_of(cell) for cell in original["cells"])
    for slide in slides:
        if slide.kind == "figure":
            assert slide.body.count("<img") == 1
        assert slide.kind == "prediction" or "Predict before you run on" not in slide.body
    for cell in original["cells"]:
        if "solution" in handout_read.tags_of(cell):
            assert text_of(cell).splitlines()[0] not in page


def test_the_output_of_a_solution_is_on_no_slide():
    """A table below a finding has its slide, one below a solution has none."""
    notebook = made()
    for place, words in ((5, "the finding"), (8, "the solution")):
        table = build._data("text/html", f"<table><tr><td>{words}</td></tr></table>")
        notebook["cells"][place]["outputs"] = [table]
    page = handout_slides.slides_page(notebook, "98")
    assert "the finding" in page and "the solution" not in page


@pytest.mark.parametrize("line", [
    '<script src="https://cdn.example/reveal.js"></script>', "<img src='http://a/b.png'>",
    '<link rel="stylesheet" href="//cdn.example/x.css">', "<style>@import 'x.css';</style>"])
def test_a_request_would_be_seen(line):
    """The search above finds what nbconvert's own slides would load."""
    assert requests_of(handout_slides.slides_page(made(), "98")) == []
    assert requests_of(handout_slides.slides_page(made(), "98").replace("</body>", line + "</body>"))


def test_texts_are_cut_between_paragraphs_and_short_ones_join():
    """At most WORDS words a slide unless one paragraph has more; a lead stands above its figure."""
    text = "\n\n".join(" ".join(["word"] * 40) for _ in range(5))
    assert len(list(handout_slides._text_slides("Title", text))) == 3
    slides = [handout_slides.Slide("text", "T", "<p>Here:</p>"), handout_slides.Slide("code", "T", "<pre>x</pre>"),
              handout_slides.Slide("text", "U", "<p>Here:</p>"), handout_slides.Slide("code", "V", "<pre>y</pre>"),
              handout_slides.Slide("text", "W", "<p>Here:</p>", 4),
              handout_slides.Slide("code", "W", "<pre>z</pre>", 6)]
    assert [slide.kind for slide in handout_slides.with_leads(slides)] == ["code", "text", "code", "text", "code"]


def test_a_code_slide_shows_the_functions_alone():
    """The mechanism, not the lines that try it; folded cells, long ones and cells without a function give no slide."""
    cell = build.code("x = 1\n\n\ndef half(x):\n    return x / 2\n\n\nprint(half(x))", 1)
    (slide,) = handout_slides._code_slides(cell, "T")
    assert "def half" in slide.body and "print" not in slide.body
    long = build.code("def f(x):\n" + "    x += 1\n" * 20, 1)
    folded = build.code("def f(x):\n    return x", 1) | {"metadata": {"jupyter": {"source_hidden": True}}}
    for other in (long, folded, build.code("x = 1", 1)):
        assert handout_slides._code_slides(other, "T") == []


@pytest.mark.parametrize("tex", [r"\frac1S\sum_{j=0}^{S-1} E[x_{iS+j}]", r"\sqrt\lambda", r"\mathbb E\bigl[A^2\bigr]",
                                 r"\underbrace{d_t}_{\text{now}}", r"t \bmod 4 = 3", r"\tfrac{1+\pi}2\,(r_0-r)"])
def test_formulas_are_drawn_with_their_tex_as_label(tex):
    """An SVG with a path and a label; TeX that can't be drawn stays as text, escaped."""
    drawn = handout_math.formula(tex, block=False)
    assert drawn.startswith("<svg") and "<path d=" in drawn and "aria-label=" in drawn
    assert handout_math.formula(r"\begin{cases}a<b\end{cases}", block=False).startswith('<code class="tex">')


# files and the command -----------------------------------------------------------------------------------------------

def test_files_are_written_whole_and_never_over_somebodys_work(lab, tmp_path):
    """Twice into the same folder is fine; a changed file or a strange one stops it, and nothing is touched."""
    folder = tmp_path / "out"
    (made_lab,) = handout.make_handouts(["98"], folder)
    assert made_lab["solutions_removed"] == 1 and made_lab["learner"].endswith("98_lab.learner.ipynb")
    assert {file.name for file in folder.iterdir()} == {
        "98_lab.learner.ipynb", "98_lab.instructor.ipynb", "98_lab.slides.html", "handout.json"}
    handout.make_handouts([], folder)
    worked = folder / "98_lab.learner.ipynb"
    worked.write_text(worked.read_text() + " ")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(LabError, match="was changed since it was made"):
        handout.make_handouts(["98"], folder)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(LabError, match="was not made by labkit handout"):
        handout.make_handouts(["98"], tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_one_bad_lab_and_no_file_is_written(lab, tmp_path):
    """Two labs are asked for, one has no outputs: neither is written, and no temporary folder is left."""
    cleared = copy.deepcopy(made())
    cleared["cells"][2].update(execution_count=None)
    build.write(lab.with_name("99_bare.ipynb"), cleared)
    with pytest.raises(LabError, match="99_bare.ipynb is not stored with the outputs"):
        handout.make_handouts([], tmp_path / "out")
    unasked = made()
    unasked["cells"][3]["outputs"] = []
    build.write(lab.with_name("99_bare.ipynb"), unasked)
    with pytest.raises(LabError, match="does not store the question of its prediction who"):
        handout.make_handouts(["98", "99"], tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notebooks"]


def test_the_command(lab, tmp_path, monkeypatch, capsys):
    """Help, the table, JSON, and an unknown lab as one sentence with status 1."""
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["labkit", "handout", *words])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "120")
    assert "labkit handout" in call("--help")[1]
    status, out, _ = call("98", "--out", str(tmp_path / "a"))
    assert status == 0 and "A lab" in out
    (summary,) = json.loads(call("98", "--out", str(tmp_path / "b"), "--json")[1])
    assert (summary["predictions"], summary["exercises"]) == (1, 1)
    status, _, said = call("77", "--out", str(tmp_path / "c"))
    assert status == 1 and "There is no notebook '77'" in said and not (tmp_path / "c").exists()


# what was written by hand --------------------------------------------------------------------------------------------

def test_teaching_toml_holds_the_notebooks_own_choices():
    """Every prediction of every lab has choices that tempt, all of them offered, at least one left as the answer."""
    teaching = tomllib.loads(handout_read.TEACHING.read_text(encoding="utf-8"))
    for path in header.labs():
        number = path.name[:2]
        if number not in teaching:
            assert number in NOT_WRITTEN_YET, f"teaching.toml lacks lab {number}"
            continue
        notebook = read_notebook(path)
        predictions = handout_read.predictions_of(notebook, path.name)
        assert set(teaching[number]) == {each.key for each in predictions}, path.name
        for each in predictions:
            choices = teaching[number][each.key]
            assert choices and set(choices) < set(each.options), f"{path.name}, {each.key}"
            assert all(len(why.split()) >= 8 for why in choices.values())
            right = {answer.option for answer in handout_answers.recorded_answers(notebook, number, each)}
            assert not right or set(choices) - right, f"{path.name}, {each.key}: nothing is left that tempts"
    assert set(teaching) <= {path.name[:2] for path in header.labs()}


def planned_minutes(text: str) -> list[tuple[str, str, float]]:
    """(lab, scale, minutes) wherever TEACHING.md states the minutes of a run: "02 quick: 1.2 min"."""
    return [(lab, scale, float(minutes)) for lab, scale, minutes in
            re.findall(r"\b(\d\d) (quick|desk): ([\d.]+) min", text)]


def clock_faults(text: str) -> list[str]:
    """Rows `| 0:15 | 20 | ...` whose start is not the end of the row before, table by table."""
    faults = []
    for table in re.split(r"\n(?!\|)", text):
        rows = [(int(hours) * 60 + int(minutes), int(length)) for hours, minutes, length in
                re.findall(r"^\| (\d+):(\d\d) \| (\d+) \|", table, re.MULTILINE)]
        faults += [f"{start} after {earlier}+{length}" for (earlier, length), (start, _) in pairwise(rows)
                   if earlier + length != start]
    return faults


def test_teaching_md_states_the_headers_minutes():
    """Each stated run time is the header's, the clock adds up, each lab and each exercise named is there."""
    text = (REPOSITORY / "notebooks/TEACHING.md").read_text(encoding="utf-8")
    planned = planned_minutes(text)
    assert len({lab for lab, _, _ in planned}) >= 8
    for lab, scale, minutes in planned:
        assert header_of(real(lab)).minutes[scale] == minutes, f"lab {lab} at {scale}"
    assert len(re.findall(r"^\| \d+:\d\d \| \d+ \|", text, re.MULTILINE)) > 15 and clock_faults(text) == []
    assert clock_faults("| 0:00 | 10 | a |\n| 0:15 | 5 | b |\n") and planned_minutes("02 quick: 9 min")
    from labkit.course.check import find

    for name, minutes in re.findall(r"\b(\d\d\.\d) \((\d+) min\)", text):
        assert find(name).minutes == int(minutes), name
    for key, lab in re.findall(r"prediction `([\w.]+)` of (\d\d)", text):
        assert key in {each.key for each in handout_read.predictions_of(real(lab), lab)}


def test_agents_md_asks_for_the_prediction_first():
    """The rules for a tutor and the commands for a contributor, each of which exists."""
    text = (REPOSITORY / "AGENTS.md").read_text(encoding="utf-8")
    assert text.index("prediction") < text.index("contributor")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:labkit|tests|notebooks|data|\.ci)/[\w./*<>-]*)`", text):
        assert "<" in path or list(REPOSITORY.glob(path)), path
