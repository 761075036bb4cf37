"""The notebooks as web pages: one page a notebook, and an index. `make site` calls it.

The pages show what is stored in the notebooks; nothing is executed. The code of solutions is left out.
"""

import html
import shutil
import sys
from pathlib import Path

from labkit.errors import LabError
from labkit.files import whole_file

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>One-GPU Lab</title>
<style>body {{ font: 1.1rem/1.6 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }}</style>
</head><body><h1>One-GPU Lab</h1>
<p>Each lab teaches one LLM-training idea and measures its paper's claims in miniature. To run them:
<code>make lab</code>.</p>
<ol start="0">
{items}
</ol></body></html>
"""


def build_site(notebooks: Path, folder: Path) -> list[Path]:
    """Write a page for every notebook and index.html into `folder`; returns the pages. The old folder is replaced."""
    sources = sorted(notebooks.glob("*.ipynb"))
    if not sources:
        raise LabError(f"There are no notebooks in {notebooks}.", "Call `make site` in the repository's own folder.")
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pages = [write_page(source, fresh) for source in sources]
    items = "\n".join(f'<li value="{int(page.stem[:2])}"><a href="{page.name}">{html.escape(title)}</a></li>'
                      for page, title in pages)
    with whole_file(fresh / "index.html") as path:
        path.write_text(PAGE.format(items=items), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return [folder / page.name for page, _ in pages]


def write_page(source: Path, folder: Path) -> tuple[Path, str]:
    """Convert one notebook; returns its page and its title, which is the first heading."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(source, as_version=4)
    # the classic template is the one that writes the alt text of figures
    page, _ = HTMLExporter(template_name="classic").from_notebook_node(without_solutions(notebook))
    with whole_file(folder / f"{source.stem}.html") as path:
        path.write_text(page, encoding="utf-8")
    return folder / f"{source.stem}.html", title_of(notebook, source.stem)


def title_of(notebook, default: str) -> str:
    """The text of the first heading."""
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("# ")), default)


def without_solutions(notebook):
    """Leave out the source of cells tagged `solution`: their output stays, and the notebook has the code."""
    for cell in notebook.cells:
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata["transient"] = {"remove_source": True}
    return notebook


if __name__ == "__main__":
    try:
        for written in build_site(Path(sys.argv[1]), Path(sys.argv[2])):
            print(written)
    except LabError as error:
        sys.exit(str(error))
