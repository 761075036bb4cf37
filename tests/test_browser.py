"""What a learner sees: labs run to the end in a real browser, and every widget follows the keyboard.

JupyterLab serves copies of the notebooks; Debian's Chromium, driven by playwright, opens them, runs all cells, takes
each control of each widget to its ends and answers a prediction. `make test` does lab 00, `make test-browser` all;
with WIDGET_TIMES=folder it also tries every corner in the kernel, and leaves its times there (browser_widgets.py).
Skipped, with its reason, where Chromium or playwright is missing.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser_widgets
import pytest

from labkit.course.header import labs, read_notebook, text_of
from labkit.files import REPOSITORY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")]

ALL = labs()
FIRST = ("00",)
LABS = [pytest.param(path, id=path.stem, marks=() if path.name[:2] in FIRST else pytest.mark.every_lab) for path in ALL]
WIDGETS = r"^(lab\.play|browse)\("
TIMES = os.environ.get("WIDGET_TIMES")
MOST_SECONDS = 900 if TIMES else 120
SERVER = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.token=", "--ServerApp.password=", "--allow-root",
          "--LabApp.news_url=",
          "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
          "--LabApp.expose_app_in_browser=True"]  # cells out of view are not in the page: ask the notebook's model
BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]
CELLS = "[...window.jupyterapp.shell.currentWidget.content.model.cells]"
LOADED = """count => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.content?.model?.cells.length === count && panel.sessionContext.session?.kernel?.status === "idle";
}"""
DONE = f"""() => {{
    const cells = {CELLS}.filter(cell => cell.type === "code" && cell.sharedModel.getSource().trim());
    return cells.every(cell => cell.executionCount > 0)
        || cells.some(cell => cell.outputs.toJSON().some(output => output.output_type === "error"));
}}"""
OUTPUTS = f"""() => {CELLS}.filter(cell => cell.type === "code").map(cell => (
    {{source: cell.sharedModel.getSource(), count: cell.executionCount, outputs: cell.outputs.toJSON()}}))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a folder with copies of the labs; its address and the file that gets the predictions."""
    folder = tmp_path_factory.mktemp("labs")
    for path in ALL:
        _copy_unexecuted(path, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER{name}_DIR": str(folder / name) for name in ("_CONFIG", "LAB_SETTINGS", "LAB_WORKSPACES")}
    settings = own | {"LABKIT_SCALE": "quick", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
                      "LABKIT_PREDICTIONS": str(folder / "predictions.json")}
    if TIMES:
        settings |= {"LABKIT_WIDGETS": "corners", "LABKIT_WIDGET_TIMES": str(Path(TIMES) / "kernel.jsonl")}
    command = [sys.executable, "-m", "jupyterlab", *SERVER, f"--port={port}", f"--ServerApp.root_dir={folder}"]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}", folder / "predictions.json"
    finally:
        process.terminate()  # JupyterLab ends its kernels
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        process.wait()


def _copy_unexecuted(path: Path, folder: Path) -> None:
    """Without outputs, so that what is found later was made in the browser."""
    notebook = read_notebook(path)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")


def _wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture
def page(server):
    """A fresh browser page that collects what the console reports as an error."""
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.console_errors = []
        page.on("console", lambda said: page.console_errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.console_errors.append(str(error)))
        yield page
        browser.close()


@pytest.mark.parametrize("path", LABS)
def test_a_lab_runs_in_the_browser(path, server, page):
    """Run All ends with every cell executed and no error or warning; each control of each widget has a name and goes to
    its ends by keyboard, where picture and alternative text are others; a prediction is committed by keyboard; the
    console stays clean."""
    address, predictions = server
    page.goto(f"{address}/lab/tree/{path.name}?reset")
    page.wait_for_function(LOADED, arg=len(read_notebook(path)["cells"]), polling=200)
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells >> nth=0")
    page.wait_for_function(DONE, timeout=MOST_SECONDS * 1000, polling=500)
    _no_problems(page)
    _walk_the_widgets(page, path)
    _commit_a_prediction(page, path, predictions)
    _no_problems(page)
    assert page.console_errors == []


def _no_problems(page) -> None:
    """No cell shows a traceback or anything on stderr, and each with code was executed."""
    for cell in page.evaluate(OUTPUTS):
        bad = [output for output in cell["outputs"]
               if output["output_type"] == "error" or output.get("name") == "stderr"]
        assert not bad, f"{cell['source'][:80]!r}: {bad[0]}"
        assert cell["count"] or not cell["source"].strip()


def _cells_with(path: Path, words: str) -> list[int]:
    """Where in the notebook the code cells stand whose source matches."""
    return [i for i, cell in enumerate(read_notebook(path)["cells"])
            if cell["cell_type"] == "code" and re.search(words, text_of(cell), re.MULTILINE)]


def _bring_into_view(page, index: int) -> None:
    """Scroll to a cell: JupyterLab keeps cells out of view out of the page."""
    page.evaluate("""async index => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = index;
        await notebook.scrollToItem(index, "start");
    }""", index)


def _walk_the_widgets(page, path: Path) -> None:
    """Each of them, and at most a second a move in the median: 0.2 s is for a machine that does nothing else."""
    cells = _cells_with(path, WIDGETS)
    assert cells, "a lab has something to play with"
    for index in cells:
        _bring_into_view(page, index)
        box = page.locator(f'.jp-Cell[data-windowed-list-index="{index}"] {browser_widgets.BOX}')
        box.wait_for()
        milliseconds = browser_widgets.walk(page, box)
        assert statistics.median(milliseconds) < 1000
        if TIMES:
            with open(Path(TIMES) / "browser.jsonl", "a") as file:
                file.write(json.dumps({"notebook": path.name[:2], "ms": milliseconds}) + "\n")


def _commit_a_prediction(page, path: Path, predictions: Path) -> None:
    _bring_into_view(page, _cells_with(path, r"lab\.predict\(")[0])
    widget = page.locator(".jp-OutputArea .widget-vbox:has(input[type=radio])").first
    widget.locator("input[type=radio]").first.focus()
    page.keyboard.press("Space")
    widget.locator("button").focus()
    page.keyboard.press("Enter")
    widget.get_by_text(re.compile("Your prediction")).wait_for()
    assert json.loads(predictions.read_text())[path.name[:2]]
