"""The first screen: `make lab` opens the welcome page, rendered, in a real browser; its links open the labs; no request
leaves the machine."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit import install
from labkit.course.header import NOTEBOOKS, header_of, read_notebook
from labkit.course.site_map import PARTS
from labkit.files import REPOSITORY

WELCOME = NOTEBOOKS / "WELCOME.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def test_every_lab_stands_on_the_welcome_page_once_in_its_part():
    """The list of labs: each notebook by number, in the parts and the order of the site; other links are files here."""
    text = WELCOME.read_text(encoding="utf-8")
    lists = {name: LINK.findall(rest) for name, rest in re.findall(r"^- \*\*([^*]+)\*\*: (\[.*)$", text, re.MULTILINE)}
    assert {name: tuple(words[:2] for words, _ in links) for name, links in lists.items()} == PARTS
    listed = [file for links in lists.values() for _, file in links]
    assert listed == sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))
    assert len(listed) == 17 and "Seventeen labs." in text
    assert all((NOTEBOOKS / file).exists() for _, file in LINK.findall(text))


def test_what_the_welcome_page_says_of_the_order_is_what_the_labs_ask_for():
    """A lab that needs lab 07 or 09 says so in its first cell ("You need"); the page names exactly those."""
    text = WELCOME.read_text(encoding="utf-8")
    first = {path.name[:2]: "".join(read_notebook(path)["cells"][0]["source"]) for path in NOTEBOOKS.glob("*.ipynb")}
    needs = {lab: re.search(r"\*\*You need\*\*.*", cell)[0] for lab, cell in first.items()}
    of_07 = sorted(lab for lab, words in needs.items() if "(lab 07)" in words)
    of_09 = sorted(lab for lab, words in needs.items() if re.search(r"lab 09 \(|\(lab 09\)", words))
    assert (of_07, of_09) == (["08", "11", "13", "15"], ["10", "11", "12"])
    assert "08, 11, 13 and 15 use the policy gradient of 07, and 10 to 12 the distillation loss of 09" in text


@pytest.fixture
def address(tmp_path) -> Iterator[str]:
    """What `make lab` starts, with this Python, on copies of the welcome page and lab 00; the address it prints."""
    plan = subprocess.run(["make", "-n", "lab", "VENV=/nowhere", "ARGS=--no-browser --port=0"], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=60).stdout.replace("\\\n", " ")
    (arguments,) = [line.partition(" -m jupyterlab ")[2] for line in plan.splitlines() if " -m jupyterlab " in line]
    settings = f"--LabApp.app_settings_dir={tmp_path}/share/jupyter/lab/settings"
    command = [sys.executable, "-m", "jupyterlab", *shlex.split(arguments), settings]
    (tmp_path / "notebooks").mkdir()
    for path in (WELCOME, next(NOTEBOOKS.glob("00_*.ipynb"))):
        shutil.copy(path, tmp_path / "notebooks")
    install.settle_jupyterlab(tmp_path)
    own = {f"JUPYTER{name}_DIR": str(tmp_path / name) for name in ("_CONFIG", "LAB_SETTINGS", "LAB_WORKSPACES")}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | own, stdout=log, stderr=log)
    try:
        yield _printed(tmp_path / "log", process)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)  # a kernel that is just starting holds it up; it ends with its server
        process.kill()
        process.wait()


def _printed(log: Path, process: subprocess.Popen, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\S+", log.read_text()):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab printed no address:\n{log.read_text()[-2000:]}")


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")
def test_make_lab_opens_the_welcome_page_and_it_opens_a_lab(address):
    """At the printed address: the page rendered, no question before it, no request elsewhere, no error; the first link
    opens lab 00."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong = []
    with (playwright.sync_playwright() as driver,
          driver.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
                else wrong.append(request.url))
        page.goto(address)
        page.locator(".jp-RenderedMarkdown h1", has_text="Welcome to One-GPU Lab").wait_for()
        assert page.locator(".jp-Dialog").count() == 0
        page.locator(".jp-RenderedMarkdown a[href*='00_start_here']").first.click()
        title = header_of(read_notebook(next(NOTEBOOKS.glob("00_*.ipynb")))).title
        page.locator(".jp-Notebook h1", has_text=title).wait_for()
    assert wrong == []
