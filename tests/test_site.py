"""The site's pages before and after Sphinx: nothing missing, nothing told too early, nothing from outside.

Two small labs are built here. tests/test_site_pages.py drives a browser over the whole site (make test-site).
"""

import base64
import html
import importlib.util
import json
import re
import shutil
from collections import Counter

import pytest
from site_links import problems

from labkit.course import site, site_front, site_lab, site_ledger, site_map, site_results
from labkit.course.claims import load_claims
from labkit.course.handout_read import predictions_of
from labkit.course.header import NOTEBOOKS
from labkit.course.ledger import claims_table
from labkit.course.ledger_views import source_of
from labkit.course.results import RESULTS
from labkit.errors import LabError

nbformat = pytest.importorskip("nbformat.v4")
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
HEAD = """# {} · Bags & more: a lab

**The question.** Do $S$ bags win (arXiv 2605.06546)?

| scale | minutes | GB |
|---|---|---|
| quick | 1 | 1 |"""
QUESTION = "Predict before you run on: Who wins?\n- bags\n- tokens < bags"


def made_lab(folder, name: str):
    """A small lab with one of each: a formula, a figure, a prediction, its answer, an exercise, a solution."""
    def code(source, *outputs, tags=(), hidden=False):
        about = {"tags": list(tags)} | ({"jupyter": {"source_hidden": True}} if hidden else {})
        return nbformat.new_code_cell(source, outputs=list(outputs), metadata=about, execution_count=1)

    about = {"image/png": {"alt": 'bags "win" & lose', "width": 300}}
    picture = nbformat.new_output("display_data", {"image/png": PIXEL}, metadata=about)
    asked = nbformat.new_output("display_data", {"text/plain": QUESTION, "text/html": "<p>?</p>"})
    measured = nbformat.new_output("stream", name="stdout", text="bags by a mile")
    cells = [nbformat.new_markdown_cell(HEAD.format(name[:2])),
             code("lab.predict('who', ...)", asked, tags=["prediction"]),
             code("draw()", picture, tags=["figure"], hidden=True),
             code("lab.reveal('who', 'bags', 'They are bags.')", measured),
             code('lab.check("02.1", ...)', tags=["exercise"]),
             code("the_answer = 42", tags=["solution"], hidden=True)]
    folder.mkdir(exist_ok=True)
    about = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    (folder / name).write_text(json.dumps(nbformat.new_notebook(cells=cells, metadata=about)), encoding="utf-8")
    return folder


@pytest.fixture
def lab(tmp_path):
    """One small lab, read."""
    (made,) = site_map.read_labs(made_lab(tmp_path / "notebooks", "02_bags.ipynb"))
    return made


# the map -------------------------------------------------------------------------------------------------------------

def test_every_lab_stands_in_one_part():
    """The labs on the map are the notebooks that there are, each once."""
    labs = site_map.read_labs()
    mapped = [lab.path for found in site_map.by_part(labs).values() for lab in found]
    assert mapped == sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def test_a_lab_without_a_part_or_a_folder_without_labs_is_refused(tmp_path):
    """One sentence each, with what to do."""
    with pytest.raises(LabError, match="no notebooks"):
        site_map.read_labs(tmp_path)
    with pytest.raises(LabError, match=r"77_new.*PARTS"):
        site_map.read_labs(made_lab(tmp_path, "77_new.ipynb"))


# a lab's page --------------------------------------------------------------------------------------------------------

def folds(page: dict) -> list[str]:
    """For each code cell by which tags something of it is folded or left out, and "out" if it has outputs."""
    code = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    tags = [[tag for tag in cell["metadata"].get("tags", []) if tag.startswith(("hide-", "remove-"))] for cell in code]
    return [" ".join(each + ["out"] * bool(cell["outputs"])) for each, cell in zip(tags, code, strict=True)]


def test_what_is_to_be_thought_about_is_folded(lab, tmp_path):
    """Solution, result and figure's code are folded; the rest is open; the question has all its choices."""
    page = site_lab.lab_page(lab, tmp_path / "figures")
    figure, reveal = ["hide-input", "remove-input out"], ["", "remove-input hide-output out"]
    exercise, solution = "", "hide-cell"
    assert folds(page) == [*figure, *reveal, exercise, solution]
    texts = [cell["source"] for cell in page["cells"] if cell["cell_type"] == "markdown"]
    (question,) = [text for text in texts if "fieldset" in text]
    assert question.count("<input") == 2 and "tokens &lt; bags" in question and "lab.predict" not in json.dumps(page)
    (answer,) = [text for text in texts if "Compare your prediction" in text]
    assert answer.startswith("<details") and ">bags</b>. They are bags." in answer
    assert any("Show a hint" in text for text in texts)


def test_every_prediction_of_the_course_is_on_its_page(tmp_path):
    """As many questions as the notebooks ask, each before the fold that tells its answer."""
    for lab in site_map.read_labs():
        if not all(cell.get("outputs") for cell in lab.notebook["cells"] if "lab.predict(" in "".join(cell["source"])):
            continue  # a notebook that somebody has just cleared: the lint says so
        text = json.dumps(site_lab.lab_page(lab, tmp_path))
        asked = predictions_of(lab.notebook, lab.path.name)
        assert text.count("<fieldset") == len(asked) > 0
        for each in asked:
            told = text.find(f'data-prediction=\\"{lab.number}.{each.key}\\"')
            assert told == -1 or text.find(f'name=\\"{lab.number}.{each.key}\\"') < told


def test_a_picture_keeps_its_text_and_its_room(lab, tmp_path):
    """The file is the notebook's PNG; the <img> has its alternative text, escaped, its width, and its ratio."""
    page = json.dumps(site_lab.lab_page(lab, tmp_path / "figures"))
    (file,) = (tmp_path / "figures").iterdir()
    assert file.read_bytes() == base64.b64decode(PIXEL) and f"figures/{file.name}" in page
    assert 'alt=\\"bags &quot;win&quot; &amp; lose\\" width=\\"300\\" height=\\"300\\"' in page


def test_a_picture_without_a_text_is_refused(lab, tmp_path):
    """The site can't be built with a figure that some readers would miss."""
    lab.notebook["cells"][2]["outputs"][0]["metadata"] = {}
    with pytest.raises(LabError, match="no alternative text"):
        site_lab.lab_page(lab, tmp_path)


def test_numbers_of_arxiv_become_links():
    """With the word before it or in brackets; not a number that only looks like one."""
    linked = site_lab.with_arxiv_links("(arXiv 2605.06546), Gloeckle (2404.19737), loss 2605.06546 or 1234.5678")
    assert linked.count("](https://arxiv.org/abs/") == 2 and linked.endswith("loss 2605.06546 or 1234.5678")


# ledger and results --------------------------------------------------------------------------------------------------

def test_the_ledger_page_has_every_row_and_every_choice():
    """As many rows as the ledger, each with its verdict; each filter offers exactly what occurs."""
    rows, labs = claims_table(), site_map.read_labs()
    page = site_ledger.ledger_page(rows, labs)
    assert page.count("<tr data-notebook=") == len(rows)
    for key in site_ledger.FILTERS:
        counts = Counter(source_of(row) if key == "paper" else row[key] for row in rows)
        for value, count in counts.items():
            assert page.count(f'data-{key}="{html.escape(value)}"') == count
        choices = re.search(rf'<select name="{key}">(.*?)</select>', page)[1]
        assert set(re.findall(r'value="([^"]+)"', choices)) == {html.escape(value) for value in counts} - {""}


def test_every_link_of_the_ledger_has_its_place(tmp_path):
    """The row of a claim leads to the place on its lab's page where rule and seeds stand; the rule is there."""
    rows, claims, labs = claims_table(), load_claims(), site_map.read_labs()
    page = site_ledger.ledger_page(rows, labs)
    for lab in labs:
        results = site_results.claims_html([row for row in rows if row["notebook"] == lab.number], claims)
        asked = set(re.findall(rf'href="{lab.results}\.html#([^"]+)"', page))
        assert asked == set(re.findall(r'class="claim" id="([^"]+)"', results))
        assert results.count("<dt>Rule</dt>") == len(asked)


def test_results_of_every_scale_can_be_downloaded(tmp_path):
    """Each shipped file of a lab lies beside its page byte for byte, and the table says its minutes."""
    lab = next(lab for lab in site_map.read_labs() if lab.number == "02")
    table = site_results.runs_html(lab, tmp_path)
    for file in [*RESULTS.rglob("02.json"), *RESULTS.rglob("02.figures.json")]:
        place = f"data/{file.relative_to(RESULTS).as_posix()}"
        assert (tmp_path / place).read_bytes() == file.read_bytes() and f'href="{place}"' in table
    desk = json.loads((RESULTS / "desk" / "02.json").read_text(encoding="utf-8"))
    assert f">{desk['seconds'] / 60:.1f}<" in table


# front page and folder -----------------------------------------------------------------------------------------------

def test_the_front_page_maps_the_course(tmp_path):
    """README's top with its picture copied, every lab with its question, the whole in the side bar."""
    rows, labs = claims_table(), site_map.read_labs()
    page = site_front.front_page(rows, labs, tmp_path / "pictures")
    assert page.startswith("# One-GPU Lab") and "make lab" in page
    for file in re.findall(r"!\[[^\]]+\]\((pictures/[^)]+)\)", page):
        assert (tmp_path / file).is_file()
    assert all(f"]({lab.path.name})" in page and lab.header.question in page for lab in labs)
    assert all(re.search(rf"^{page_name}$", page, re.M) for page_name in
               [*(lab.page for lab in labs), site_map.LEDGER, site_map.TEACHING])


def test_links_of_readme_into_the_repository_become_words(tmp_path):
    """The site has no such files; links to https stay; a picture that is missing is one sentence."""
    plain = site_front.with_pictures("[a](labkit/a.py), [b](https://arxiv.org/abs/1)", tmp_path)
    assert plain == "a, [b](https://arxiv.org/abs/1)"
    with pytest.raises(LabError, match=r"none\.png"):
        site_front.with_pictures("![what](none.png)", tmp_path)


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    """`make site` into a folder that holds a thesis must not cost anybody the thesis."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LabError, match="was not built by"):
        site.build_site(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


# two labs, built -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site of two small labs."""
    for tool in site.TOOLS:
        if not importlib.util.find_spec(tool):
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("small")
    made_lab(folder / "notebooks", "02_bags.ipynb")
    made_lab(folder / "notebooks", "15_play.ipynb")
    site.build_site(folder / "site", folder / "notebooks")
    return folder / "site"


def test_a_built_site_is_whole_and_closed(built):
    """Every page is there, every link resolves, nothing is loaded from outside, pictures have their texts."""
    names = {path.stem for path in built.glob("*.html")}
    assert names == {"index", "ledger", "teaching", "search", "02_bags", "15_play", "results_02", "results_15"}
    assert problems(built) == []
    page = (built / "02_bags.html").read_text(encoding="utf-8")
    assert 'alt="bags &quot;win&quot; &amp; lose"' in page and "Show the solution" in page and "tex-svg.js" in page
    assert '<a class="right-next" href="15_play.html"' in " ".join(page.split())
    assert "bags by a mile" in (built / "_static" / "texts" / "02_bags.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("broken, said", [
    ('<a href="nowhere.html">', "is not there"), ('<a href="index.html#nowhere">', "no such place"),
    ('<script src="https://cdn.example/x.js">', "from outside"), ('<a href="http://arxiv.org">', "no https"),
    ('<a href="https://unknown.example">', "does not stand in"), ('<img src="figures/none.png">', "is not there")])
def test_a_broken_link_is_found(built, tmp_path, broken, said):
    """The check that the sites must pass says no to each kind of bad link."""
    shutil.copytree(built, tmp_path / "site")
    with open(tmp_path / "site" / "teaching.html", "a", encoding="utf-8") as page:
        page.write(broken)
    (problem,) = problems(tmp_path / "site")
    assert said in problem


def test_a_site_that_fails_leaves_the_old_one(built, tmp_path, monkeypatch):
    """Where the build stops, nothing of the site that is there is replaced, and nothing half-made is left."""
    made_lab(tmp_path / "notebooks", "02_bags.ipynb")
    shutil.copytree(built, tmp_path / "site")

    def fails(*_):
        raise LabError("Sphinx could not build the site.", "Mend it.")

    monkeypatch.setattr(site, "run_sphinx", fails)
    with pytest.raises(LabError, match="could not build"):
        site.build_site(tmp_path / "site", tmp_path / "notebooks")
    assert (tmp_path / "site" / "15_play.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notebooks", "site"]


def test_a_warning_of_sphinx_stops_the_build(tmp_path):
    """A name that leads nowhere is one sentence that says which."""
    pytest.importorskip("sphinx")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "conf.py").write_text("html_theme = 'basic'", encoding="utf-8")
    (tmp_path / "source" / "index.rst").write_text("Title\n=====\n\n:doc:`99_gone`\n", encoding="utf-8")
    with pytest.raises(LabError, match="99_gone"):
        site.run_sphinx(tmp_path / "source", tmp_path / "site")
