"""The course as a static site: every stored notebook, the whole ledger, the results of every scale. `make site`.

    python -m labkit.course.site _site/

Sphinx builds it, with MyST-NB for the notebooks and the theme of Sphinx Book. Nothing is executed, and no page asks
for anything outside its folder: the mathematics, the search and the filters work from a file:// address too.
The source is written into a temporary folder; a site that could not be built leaves the old one as it was.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from labkit.course.claims import load_claims
from labkit.course.header import NOTEBOOKS
from labkit.course.ledger import claims_table
from labkit.course.site_front import front_page
from labkit.course.site_lab import FIGURES, lab_page
from labkit.course.site_ledger import ledger_page
from labkit.course.site_map import FRONT, LEDGER, TEACHING, Lab, read_labs
from labkit.course.site_results import results_page
from labkit.course.site_search import write_texts
from labkit.errors import LabError

ASSETS = Path(__file__).with_name("site_assets")
TOOLS = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline")
MARK = ".one-gpu-lab"  # a file that says: this folder was built here, and may be built anew


def build_site(folder: Path, notebooks: Path = NOTEBOOKS) -> list[Path]:
    """Build the site into `folder` and return its pages. A site that is there is replaced once the new one is whole."""
    folder = Path(folder).absolute()
    may_be_replaced(folder)
    missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
    if missing:
        raise LabError(f"The site needs {', '.join(missing)}.", "`make install` brings everything that it needs.")
    labs = read_labs(notebooks)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        write_source(Path(work) / "source", labs, Path(notebooks))
        run_sphinx(Path(work) / "source", Path(work) / "site")
        write_texts(Path(work) / "site")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(work) / "site").rename(folder)
    return sorted(folder.glob("*.html"))


def may_be_replaced(folder: Path) -> None:
    """LabError if the folder holds anything that is not a site of ours."""
    if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} exists and was not built by `make site`.", "Move it away, or name another folder.")


def write_source(source: Path, labs: list[Lab], notebooks: Path) -> None:
    """Sphinx's source: a notebook a lab, markdown pages, pictures and data."""
    rows, claims, extra = claims_table(), load_claims(), source / "extra"
    here = {lab.number for lab in labs}
    rows = [row for row in rows if row["notebook"] in here]
    (source / "static").mkdir(parents=True)
    extra.mkdir()
    for lab in labs:
        page = lab_page(lab, extra / FIGURES)
        (source / f"{lab.page}.ipynb").write_text(json.dumps(page), encoding="utf-8")
        (source / f"{lab.results}.md").write_text(results_page(lab, rows, claims, extra), encoding="utf-8")
    (source / f"{FRONT}.md").write_text(front_page(rows, labs, source / "pictures"), encoding="utf-8")
    (source / f"{LEDGER}.md").write_text(ledger_page(rows, labs), encoding="utf-8")
    teaching = notebooks / "TEACHING.md"
    teaching = teaching if teaching.exists() else NOTEBOOKS / "TEACHING.md"
    shutil.copyfile(teaching, source / f"{TEACHING}.md")
    (extra / MARK).touch()
    copy_assets(source)


def copy_assets(source: Path) -> None:
    """Sphinx's settings, our style and scripts, and MathJax in one file that needs no fonts."""
    shutil.copyfile(ASSETS / "conf.py", source / "conf.py")
    for asset in [*ASSETS.glob("*.css"), *ASSETS.glob("*.js")]:
        shutil.copyfile(asset, source / "static" / asset.name)
    mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    shutil.copyfile(mathjax / "tex-svg.js", source / "static" / "tex-svg.js")


def run_sphinx(source: Path, site: Path) -> None:
    """Build, with warnings as errors. LabError with Sphinx's last lines where it fails."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-j", "2", "-b", "html",
               "-d", source.parent / "doctrees", source, site]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"Sphinx could not build the site: {done.stderr.strip()[-1500:]}", "Mend what it names.")


if __name__ == "__main__":
    try:
        pages = build_site(Path(sys.argv[1]))
        print(f"{len(pages)} pages. Open {pages[0].with_name('index.html')} in a browser.")
    except LabError as error:
        sys.exit(str(error))
