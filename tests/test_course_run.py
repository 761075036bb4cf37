"""`labkit run`: a run that ends well leaves its two files and, if asked, its notebook; any other leaves nothing.

Most cases use a notebook without torch, whose kernel starts in a second.
"""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from notebooks_bad import build

from labkit.course import header, results, run, run_progress
from labkit.errors import LabError
from labkit.files import REPOSITORY

LAB = """from labkit.course import Lab, choice, figures, slider
from labkit import progress
lab = Lab("98")"""
SHOW = """fig, ax = figures.figure(width=4)
ax.plot([0, 1], [0, 1])
lab.show(fig, "A rising line.")
lab.keep("line", [0, 1])
with progress.bar(3, "steps") as bar:
    bar.update(3)"""
KEPT = {"line": [0, 1], "answers": {"who": {"answer": "C", "sentence": ""}}}  # what LAB and ASK leave for figures
ASK = """lab.predict("who", "Who wins?", ["A & B", "C"], default="C")
lab.reveal("who", "C")
lab.check("02.2", ...)
lab.solution("02.2", 0.8)
lab.table([{"a": 1}])"""
PLAY = """def draw(slope):
    fig, ax = figures.figure(width=3)
    ax.plot([0, slope])
    return fig
lab.play(draw, lambda slope: f"Slope {slope}.", slope=slider(0, 4, 1, 2, "slope"))"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An own folder of notebooks and one of results."""
    monkeypatch.setattr(header, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LABKIT_PREDICTIONS", str(tmp_path / "predictions.json"))
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def lab_with(place, *sources: str):
    return build.write(place / "notebooks/98_lab.ipynb",
                       build.notebook(build.text("# Lab\n## The *end*"), *build.plain(*sources)["cells"]))


def everything(place) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_a_good_run_in_a_kernel_keeps_results_and_saves_the_notebook(place):
    """Both files arrive, the environment is as before, the notebook shows what a headless reader needs: pictures with
    alt text, the prediction's options, no widget, no bar; and no prediction was stored."""
    path, before = lab_with(place, LAB, SHOW, ASK, PLAY), dict(os.environ)
    outcome = run.run_notebook("98", "quick", save=True)
    assert dict(os.environ) == before
    assert [file.name for file in outcome.files] == ["98.json", "98.figures.json"]
    result = json.loads((place / "results/quick/98.json").read_text())
    assert set(result) == results.FIELDS and result["seconds"] == round(outcome.seconds, 1) > 0
    assert json.loads((place / "results/quick/98.figures.json").read_text()) == KEPT
    saved = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in saved.cells[1:]] == [1, 2, 3, 4]
    assert saved.metadata.language_info == {"name": "python"} and "widgets" not in saved.metadata
    outputs = [output for cell in saved.cells[1:] for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert [(picture.metadata["image/png"]["alt"], picture.data["text/plain"]) for picture in pictures] == \
        [("A rising line.", "A rising line."), ("Slope 2.", "Slope 2.")]
    words = " ".join(str(output.get("text") or output.data.get("text/html", "")) for output in outputs)
    for expected in ("A &amp; B", "02.2: not answered yet", "this solution passes", "move slope: 0 to 4"):
        assert expected in words
    assert "You said" not in words and not any(output.get("name") == "stderr" for output in outputs)
    assert not (place / "predictions.json").exists()


def test_the_same_notebook_in_plain_python(place, capsys):
    """Same files from the same cells, and not a word about predictions and exercises."""
    lab_with(place, LAB, SHOW, ASK, PLAY)
    run.run_notebook("98", "desk", in_process=True)
    assert json.loads((place / "results/desk/98.figures.json").read_text()) == KEPT
    assert json.loads((place / "results/desk/98.json").read_text())["scale"] == "desk"
    assert "Who wins" not in (said := capsys.readouterr().out) and "02.2" not in said


def test_plain_python_needs_no_jupyter(place):
    """A bare GPU server: with IPython, ipywidgets, nbformat, nbclient, triton and scipy out of reach it still runs."""
    lab_with(place, LAB, SHOW, ASK, PLAY)
    program = f"""
import sys, pathlib
class Missing:
    def find_spec(self, name, *_):
        if name in ("IPython", "ipykernel", "ipywidgets", "nbformat", "nbclient", "triton", "scipy", "jupyter_client"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from labkit.course import header, results, run
header.NOTEBOOKS, results.RESULTS = pathlib.Path({str(place / "notebooks")!r}), pathlib.Path({str(place / "out")!r})
run.run_notebook("98", "quick", in_process=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (place / "out/quick/98.json").is_file()


FAILURES = {
    "an exception": ("x = 1\nraise ValueError('boom')", r"Code cell 1 of 2, under “The \*end\*”, failed.*boom"),
    "a dead kernel": ("import os\nos.write(2, b'out of memory')\nos._exit(9)", "Code cell 1 of 2.*killed the kernel"),
    "a slow cell": ("import time\ntime.sleep(60)", "took longer than 1 seconds"),
    "no lab": ("x = 1", "left no results"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_run_is_one_sentence_and_leaves_nothing(place, name):
    """Whatever happens in the kernel: the cell is named, earlier results stay as they were, no new file appears."""
    source, words = FAILURES[name]
    lab_with(place, source, "y = 2")
    (place / "results/quick").mkdir(parents=True)
    (place / "results/quick/98.json").write_text("earlier")
    before = everything(place)
    with pytest.raises(LabError, match=f"(?s){words}"):
        run.run_notebook("98", "quick", save=True, timeout=1)
    assert everything(place) == before


def test_a_failing_cell_in_plain_python_shows_its_own_line(place):
    """The traceback names cell and source line, and nothing is kept."""
    lab_with(place, LAB, "values = []\nvalues[3]")
    with pytest.raises(LabError, match=r"(?s)Code cell 2 of 2.*values\[3\].*IndexError"):
        run.run_notebook("98", "quick", in_process=True)
    assert not (place / "results").exists()


def test_unknown_names_are_refused_before_anything_starts(place):
    """A sentence that lists what there is."""
    lab_with(place, "x = 1")
    for number, scale, words in (("97", "quick", "no notebook '97'.*98"), ("98", "huge", "no scale named 'huge'")):
        with pytest.raises(LabError, match=words):
            run.run_notebook(number, scale)
    for options in ({"scale": "desk"}, {"scale": "quick", "in_process": True}):
        with pytest.raises(LabError, match="Only a run at quick scale in a kernel can be saved"):
            run.run_notebook("98", save=True, **options)


def test_the_workstation_scale_without_a_gpu_is_one_sentence(place, monkeypatch):
    """Hours on a CPU under the name of a GPU help nobody: refused before a kernel starts, nothing written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LabError, match="needs a CUDA device"):
        run.run_notebook("98", "workstation")


def test_saving_twice_gives_the_same_file(place):
    """No times, no random names: two equal runs don't show up in git."""
    path = lab_with(place, "print(1)", "print(1)", "x = 1")
    notebook = nbformat.read(path, as_version=4)
    run._save(notebook, path)
    first = path.read_bytes()
    run._save(nbformat.read(path, as_version=4), path)
    assert path.read_bytes() == first
    ids = [cell.id for cell in nbformat.read(path, as_version=4).cells]
    assert len(set(ids)) == len(ids)


def test_control_c_stops_the_kernel_and_keeps_nothing(place):
    """SIGINT to the command: status 130, one sentence, no file, and no kernel left behind."""
    tell = f"import os\nopen({str(place / 'pid')!r}, 'w').write(str(os.getpid()))"
    lab_with(place, tell, "import time\ntime.sleep(60)")
    program = f"""
import sys, pathlib
from labkit.course import header, results
from labkit import cli
header.NOTEBOOKS, results.RESULTS = pathlib.Path({str(place / "notebooks")!r}), pathlib.Path({str(place / "results")!r})
sys.argv = ["labkit", "run", "98", "--scale", "quick"]
cli.main()
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    for _ in range(300):
        if (place / "pid").exists() and (place / "pid").read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130 and "Stopped; no results were kept." in said and "Traceback" not in said
    assert not (place / "results").exists()
    for _ in range(50):
        try:
            os.kill(int((place / "pid").read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the kernel is still alive")


def test_progress_names_the_cell_and_shows_the_bar_inside(tmp_path):
    """A long cell's own bar is read from its file, with the time left; without one the header's minutes serve."""
    bar = run_progress.RunProgress("02_x", [(1, "Settings"), (4, "Train")], 600.0, tmp_path, live=False)
    bar.start(cell=None, cell_index=4)
    (tmp_path / "progress.json").write_text(json.dumps(
        {"label": "TST", "done": 50, "total": 200, "unit": "step", "seconds": 25.0, "note": "loss 3.1"}))
    text = bar.__rich__().plain
    assert text.startswith("02_x: cell 2 of 2, Train  0:00, about 9:5")
    assert text.endswith("TST: 50 of 200 steps, 1:15 left  loss 3.1")
    bar.finish()
    assert "\n" not in bar.__rich__().plain
