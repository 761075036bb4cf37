"""What a learner sees: the first labs run to the end in a real browser, and a widget follows the keyboard.

JupyterLab serves copies of the notebooks; Debian's Chromium, driven by playwright, opens them, runs all cells, answers
a prediction and moves a slider with the arrow key. Skipped, with its reason, where Chromium or playwright is missing.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.course.header import NOTEBOOKS, read_notebook, text_of
from labkit.files import REPOSITORY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser,
              pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")]

LABS = [path for number in ("00", "02") for path in NOTEBOOKS.glob(f"{number}_*.ipynb")]
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
    for path in LABS:
        _copy_unexecuted(path, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER{name}_DIR": str(folder / name) for name in ("_CONFIG", "LAB_SETTINGS", "LAB_WORKSPACES")}
    settings = own | {"LABKIT_SCALE": "quick", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
                      "LABKIT_PREDICTIONS": str(folder / "predictions.json")}
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


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_lab_runs_in_the_browser(path, server, page):
    """Run All ends with every cell executed and no error or warning; the first slider's arrow key redraws its figure,
    whose alternative text follows; a prediction is committed by keyboard; the console stays clean."""
    address, predictions = server
    page.goto(f"{address}/lab/tree/{path.name}?reset")
    page.wait_for_function(LOADED, arg=len(read_notebook(path)["cells"]), polling=200)
    page.click("text=Run >> nth=0")
    page.click("text=Run All Cells >> nth=0")
    page.wait_for_function(DONE, timeout=120_000, polling=500)
    _no_problems(page)
    _move_a_slider(page, path)
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


def _bring_into_view(page, path: Path, words: str) -> None:
    """Scroll to the first cell whose source contains `words`: JupyterLab keeps cells out of view out of the page."""
    index = next(i for i, cell in enumerate(read_notebook(path)["cells"])
                 if cell["cell_type"] == "code" and words in text_of(cell))
    page.evaluate("""async index => {
        const notebook = window.jupyterapp.shell.currentWidget.content;
        notebook.activeCellIndex = index;
        await notebook.scrollToItem(index, "start");
    }""", index)


def _move_a_slider(page, path: Path) -> None:
    _bring_into_view(page, path, "slider(")
    widget = page.locator(".jp-OutputArea .widget-vbox:has(.noUi-handle):has(img)").first
    widget.wait_for()
    image, handle = widget.locator("img"), widget.locator(".noUi-handle").first
    before, alt = image.get_attribute("src"), image.get_attribute("alt")
    assert before.startswith("data:image/png;base64,") and alt
    handle.focus()
    for key in ("ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_function("([element, src]) => element.querySelector('img').src !== src",
                               arg=[widget.element_handle(), before])
        assert image.get_attribute("alt")
        before = image.get_attribute("src")


def _commit_a_prediction(page, path: Path, predictions: Path) -> None:
    _bring_into_view(page, path, "lab.predict(")
    widget = page.locator(".jp-OutputArea .widget-vbox:has(input[type=radio])").first
    widget.locator("input[type=radio]").first.focus()
    page.keyboard.press("Space")
    widget.locator("button").focus()
    page.keyboard.press("Enter")
    widget.get_by_text(re.compile("Your prediction")).wait_for()
    assert json.loads(predictions.read_text())[path.name[:2]]
