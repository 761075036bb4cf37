"""The whole site in a real browser: every page, at the width of a phone and of a desk, as a file without a network.

`make test-site` builds the site once and drives Debian's Chromium over it. Every request is watched: one that leaves
the site's folder fails its page. Contrast and the other rules of WCAG 2.2, level AA, are judged by axe-core, which
axe-playwright-python ships. Skipped, with the reason, where Chromium or a tool is missing.
"""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from site_links import problems

from labkit.course import site
from labkit.course.ledger import claims_table
from labkit.course.site_map import read_labs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [tool for tool in (*site.TOOLS, "playwright", "axe_playwright_python") if not importlib.util.find_spec(tool)]
pytestmark = [pytest.mark.site, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed"),
              pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")]

BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync"]
WIDTHS = {"phone": (390, 844), "desk": (1440, 900)}
PAGES = ["index", "ledger", "teaching", "search", *(page for lab in read_labs() for page in (lab.page, lab.results))]
KINDS = ["index", "ledger", "search", "teaching", "02_token_superposition", "results_02"]  # one page of each kind
WCAG = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
NARROW = {"type": "rule", "values": ["scrollable-region-focusable", "target-size"]}  # what a width can change
READY = """async () => {
    if (window.MathJax) await MathJax.startup.promise;
    document.querySelectorAll("article details").forEach(fold => { fold.open = true; });
    await new Promise(done => setTimeout(done, 100));
}"""
# Sticking out of the page, and not inside a box that scrolls by itself.
TOO_WIDE = """() => [...document.querySelectorAll("article *")].filter(element => {
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.right <= innerWidth + 1) return false;
    for (let around = element.parentElement; around.nodeName !== "ARTICLE"; around = around.parentElement)
        if (getComputedStyle(around).overflowX !== "visible") return false;
    return true;
}).map(element => `${element.nodeName}.${element.className}: ${element.textContent.slice(0, 80)}`)"""
# For contrast one token of each colour is enough, and one row or claim of each verdict: a page has thousands.
THINNED = """() => {
    const seen = new Set();
    const first = key => !seen.has(key) && seen.add(key);
    document.querySelectorAll("pre span[class]").forEach(token =>
        first(token.className) || token.replaceWith(token.textContent));
    document.querySelectorAll("#ledger tbody tr, .claim").forEach(row =>
        first([...row.querySelectorAll(".verdict")].map(verdict => verdict.className).join()) || row.remove());
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The site, built once from the committed notebooks."""
    built = tmp_path_factory.mktemp("built") / "site"
    site.build_site(built)
    return built


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, folder):
    """Open a page of the site at a width; what the console says and what it asks for outside is collected."""
    contexts = []

    def open_page(name: str, width: str = "desk", mode: str = "light"):
        wide, high = WIDTHS[width]
        context = chromium.new_context(viewport={"width": wide, "height": high}, color_scheme=mode)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.trouble = []
        page.on("console", lambda said: page.trouble.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: page.trouble.append(str(error)))
        page.on("request", lambda asked: page.trouble.append(f"asked for {asked.url[:200]}")
                if not asked.url.startswith((folder.as_uri(), "data:")) else None)
        page.on("requestfailed", lambda asked: page.trouble.append(f"not there: {asked.url[:200]}"))
        page.goto(f"{folder.as_uri()}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()


def violations(page, rules: dict = WCAG) -> list[str]:
    """What axe-core finds against the rules, a line a place."""
    script = Path(importlib.util.find_spec("axe_playwright_python").origin).with_name("axe.min.js")
    page.evaluate(THINNED)
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("rules => axe.run({runOnly: rules, preload: false})", rules)
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}"
            for rule in found["violations"] for node in rule["nodes"][:3]]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_holds(name, width, opened):
    """Nothing outside is asked for, the console is clean, nothing sticks out sideways, every picture has a text, every
    formula is drawn, and axe finds nothing, also with everything unfolded."""
    page = opened(f"{name}.html", width)
    page.evaluate(READY)
    assert page.trouble == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0, page.evaluate(TOO_WIDE)
    assert page.evaluate("getComputedStyle(document.body).overflowX") == "visible"
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate("[...document.images].filter(image => !image.alt.trim()).map(image => image.src)") == []
    assert page.locator(".math").count() == page.locator("mjx-container").count()
    assert page.locator("mjx-merror").count() == 0
    assert violations(page, NARROW if width == "phone" and name not in KINDS else WCAG) == []


@pytest.mark.parametrize("name", KINDS)
def test_the_dark_mode_has_contrast_too(name, opened):
    """One page of each kind in the colours that a reader's dark mode chooses."""
    page = opened(f"{name}.html", mode="dark")
    page.evaluate(READY)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert violations(page) == []


def test_every_link_of_the_site_resolves(folder):
    """To a page and a place in it, or by https to a host that tests/site_links.py names; all pages are there."""
    assert problems(folder) == []
    assert {path.stem for path in folder.glob("*.html")} == set(PAGES)


# by keyboard ---------------------------------------------------------------------------------------------------------

def focused(page) -> str:
    """What has the focus, in words."""
    return page.evaluate("""() => {
        const element = document.activeElement;
        return `${element.getAttribute("aria-label") ?? ""} ${element.textContent}`.trim();
    }""")


def tab_to(page, words: str, most: int = 40) -> None:
    """Press Tab until what has the focus says `words`."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if re.search(words, focused(page)):
            return
    raise AssertionError(f"{most} times Tab did not reach {words!r}; it is at {focused(page)[:80]!r}")


def test_search_by_keyboard_without_a_server(opened):
    """Ctrl+K, a word that one lab alone has in its text, Enter: that lab is found, with a quotation; Enter opens it."""
    page = opened("index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("lighthouse pyramid")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    page.locator("#search-results .context", has_text=re.compile("pyramid", re.I)).first.wait_for()
    tab_to(page, "03 · Lighthouse", most=60)
    page.keyboard.press("Enter")
    page.wait_for_url("**/03_lighthouse_attention.html*")
    assert page.trouble == []


@pytest.mark.parametrize("width", WIDTHS)
def test_navigation_by_keyboard(width, opened):
    """The first Tab skips to the text; a few more reach another lab in the side bar, on a phone through its button."""
    page = opened("teaching.html", width)
    page.keyboard.press("Tab")
    assert "Skip to main content" in focused(page)
    if width == "phone":
        tab_to(page, "primary sidebar")
        page.keyboard.press("Enter")
    tab_to(page, "^05 · ")
    page.keyboard.press("Enter")
    page.wait_for_url("**/05_architecture_warmup.html")
    page.locator("a.left-prev", has_text="04 ·").wait_for()
    page.locator("a.right-next", has_text="06 ·").wait_for()
    assert page.trouble == []


def test_the_ledger_is_filtered_by_keyboard(opened):
    """The rows left are those that the ledger has for the choice, and the count is said; Show all brings them back."""
    rows = claims_table()
    page = opened("ledger.html", "phone")
    page.locator("select[name=verdict]").focus()
    page.keyboard.type("inconc")
    page.keyboard.press("Tab")
    wanted = [row for row in rows if row["verdict"] == "inconclusive"]
    assert page.locator("#ledger tbody tr:visible").count() == len(wanted) > 0
    assert page.locator("#found").text_content().startswith(f"{len(wanted)} of {len(rows)} rows")
    page.locator("input[name=words]").focus()
    page.keyboard.type("no such words")
    assert page.locator("#ledger tbody tr:visible").count() == 0
    page.get_by_role("button", name="Show all").focus()
    page.keyboard.press("Enter")
    page.locator("#found", has_text=f"{len(rows)} of").wait_for()
    assert page.locator("#ledger tbody tr:visible").count() == len(rows)


def test_a_prediction_is_asked_before_its_answer(opened):
    """In lab 15 the answer is closed; ticked and opened by keyboard, it says what was predicted."""
    page = opened("15_g_zero.html")
    question, fold = page.locator("fieldset.prediction").first, page.locator("details[data-prediction]").first
    assert not fold.locator(".answer").is_visible()
    question.locator("input").first.focus()
    page.keyboard.press("Space")
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    fold.locator(".said", has_text=re.compile("^You predicted")).wait_for()


def test_solutions_and_measurements_start_closed(opened):
    """No solution's code and no revealed result can be seen before a click; one button opens all."""
    page = opened("02_token_superposition.html")
    solution = page.locator("div.tag_solution details").first
    assert not solution.locator("pre").first.is_visible()
    assert page.locator("article details[open]").count() == 0
    page.get_by_role("button", name="Open all folds").click()
    assert solution.locator("pre").first.is_visible()
