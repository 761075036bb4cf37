"""Run a notebook from the terminal, top to bottom, and keep its results only if it came to the end.

In a fresh kernel of this Python (nbclient), or with `in_process` in plain Python, where only the code cells count and
no Jupyter is needed. Results are made in a temporary folder and moved to data/results/<scale>/ at the end.
"""

import asyncio
import contextlib
import hashlib
import json
import linecache
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from labkit.course import record
from labkit.course.header import find_notebook, header_of, headings, read_notebook, text_of
from labkit.course.lab import Lab
from labkit.course.scale import check_scale, has_device
from labkit.errors import LabError
from labkit.files import REPOSITORY, whole_file, write_json

TIMEOUT_SECONDS = {"quick": 120, "desk": 40 * 60, "workstation": 40 * 60}  # for one cell


@dataclass(frozen=True)
class Outcome:
    """A run that came to its end."""

    notebook: str
    scale: str
    seconds: float
    files: list[Path]


class CellFailed(LabError):
    """A cell raised: which one, under which heading, and the last lines of what it said."""

    def __init__(self, place: str, lines: list[str]):
        last = "\n".join(lines[-12:])
        super().__init__(f"{place} failed:\n{last}\n", "Open the notebook there; no results were kept.")


def run_notebook(number: str, scale: str, *, in_process: bool = False, save: bool = False,
                 timeout: float | None = None) -> Outcome:
    """Execute notebook `number` at `scale` and keep its results under data/results.

    `save` also writes the executed notebook back in place (quick scale only: that is what is shipped).
    Raises LabError for an unknown notebook or scale, a failing cell, a dead kernel; then nothing is written.
    """
    from labkit.course.run_progress import RunProgress

    has_device(check_scale(scale))
    path = find_notebook(number)
    if save and (in_process or scale != "quick"):
        raise LabError("Only a run at quick scale in a kernel can be saved into the notebook.",
                       "Leave out --save, or use --scale quick without --in-process.")
    notebook, name = read_notebook(path), path.name[:2]
    with tempfile.TemporaryDirectory(prefix="labkit-run-") as folder, \
         _environment(_settings(scale, Path(folder), in_process)), \
         RunProgress(path.stem, _cells(notebook), _expected(notebook, scale), Path(folder), live=not in_process) as bar:
        start = time.monotonic()
        if in_process:
            executed = _in_process(notebook, path.parent, bar)
        else:
            executed = _in_kernel(path, bar, timeout or TIMEOUT_SECONDS[scale], Path(folder) / "kernel.log")
        seconds = time.monotonic() - start
        files = _keep(Path(folder), name, scale, seconds)
    if save:
        _save(executed, path)
    return Outcome(name, scale, seconds, files)


def _settings(scale: str, folder: Path, in_process: bool) -> dict[str, str]:
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    settings = {"LABKIT_SCALE": scale, "LABKIT_RESULTS": str(folder), "PYTHONPATH": python_path,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return settings if in_process else settings | {"LABKIT_PROGRESS_FILE": str(folder / "progress.json")}


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _cells(notebook: dict) -> list[tuple[int, str]]:
    """(index in the notebook, heading above it) of each code cell that has code."""
    above = headings(notebook)
    return [(index, above[index]) for index, cell in enumerate(notebook["cells"])
            if cell["cell_type"] == "code" and text_of(cell).strip()]


def _expected(notebook: dict, scale: str) -> float | None:
    """Seconds that this run should take: its header's minutes at this scale."""
    minutes = header_of(notebook).minutes.get(scale)
    return minutes * 60 if minutes else None


def _place(number: int, total: int, heading: str) -> str:
    return f"Code cell {number} of {total}" + (f", under “{heading}”," if heading else "")


# in a kernel ---------------------------------------------------------------------------------------------------------

def _in_kernel(path: Path, bar, timeout: float, log: Path):
    """Execute with nbclient; returns the notebook with its outputs. `log` gets what a crash prints."""
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_this_python())
    client = NotebookClient(notebook, km=manager, timeout=timeout, allow_errors=False, record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}}, on_cell_start=bar.start,
                            on_cell_executed=bar.finish)
    try:
        with open(log, "w", encoding="utf-8") as crash:
            _in_thread(client.async_execute(stderr=crash, cleanup_kc=True))  # the kernel ends with the run, always
    except DeadKernelError:
        raise LabError(f"{_place(*bar.now)} killed the kernel; most often memory ran out.{_last_words(log)}",
                       "Close other programs, or run it at a smaller scale; no results were kept.") from None
    except CellTimeoutError:
        raise LabError(f"{_place(*bar.now)} took longer than {timeout:g} seconds.",
                       "Give it more with --timeout, or use a smaller scale; no results were kept.") from None
    except CellExecutionError as error:
        raise CellFailed(_place(*bar.now), _plain(error.traceback).splitlines()) from None
    return notebook


def _in_thread(execution: Coroutine) -> None:
    """Run it beside the main thread: then Ctrl-C is ours, and cancelling lets nbclient shut its kernel down."""
    running: list[asyncio.Task] = []

    async def main() -> None:
        running.append(asyncio.current_task())
        await execution

    with ThreadPoolExecutor(max_workers=1) as pool:  # leaving this block waits for the shutdown
        done = pool.submit(asyncio.run, main())
        try:
            done.result()
        except KeyboardInterrupt:
            for task in running:
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise


def _this_python():
    """Kernels of this very Python, whatever kernel called "python3" the user may have installed."""
    import ipykernel.kernelspec
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **ipykernel.kernelspec.get_kernel_dict())

    return ThisPython()


def _last_words(log: Path) -> str:
    """What a crash left on the kernel's stderr, without the kernel's own warnings."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
             if line.strip() and "IPKernelApp" not in line]
    return f" It said: {' / '.join(lines[:3])}." if lines else ""


def _plain(text: str) -> str:
    """Text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# in this process -----------------------------------------------------------------------------------------------------

def _in_process(notebook: dict, folder: Path, bar) -> None:
    """Execute the code cells in one namespace, here, with the notebook's folder as the current one."""
    space: dict = {"__name__": "__main__"}
    here, path = os.getcwd(), list(sys.path)
    sys.path.insert(0, str(REPOSITORY))
    os.chdir(folder)
    try:
        for index, _ in _cells(notebook):
            source, name = text_of(notebook["cells"][index]), f"<cell {index}>"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # tracebacks show code
            bar.start(cell=None, cell_index=index)
            exec(compile(source, name, "exec"), space)
            bar.finish(cell=None, cell_index=index, execute_reply=None)
        for lab in [value for value in space.values() if isinstance(value, Lab)]:
            lab.write_results()
    except LabError as error:
        raise CellFailed(_place(*bar.now), [str(error)]) from error
    except Exception as error:
        raise CellFailed(_place(*bar.now), traceback.format_exc().splitlines()) from error
    finally:
        os.chdir(here)
        sys.path[:] = path


# what is kept --------------------------------------------------------------------------------------------------------

def _keep(folder: Path, name: str, scale: str, seconds: float) -> list[Path]:
    """Move both result files to data/results; the time there is that of the whole run."""
    if not (folder / f"{name}.json").is_file():
        raise LabError(f"Notebook {name} came to its end and left no results.",
                       f'Its first code cell should be: lab = Lab("{name}")')
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    figures = json.loads((folder / f"{name}.figures.json").read_text(encoding="utf-8"))
    home = record.result_folder(scale, result["device"])
    files = [home / f"{name}.json", home / f"{name}.figures.json"]
    write_json(files[0], result | {"seconds": round(seconds, 1)})
    write_json(files[1], figures)
    return files


def _save(notebook, path: Path) -> None:
    """Write the executed notebook back, whole, with nothing in it that differs between two equal runs."""
    import nbformat

    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    taken: set[str] = set()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        name, copy = hashlib.sha256(cell.source.encode()).hexdigest()[:8], 0
        while f"{name}{copy or ''}" in taken:
            copy += 1
        cell.id = f"{name}{copy or ''}"
        taken.add(cell.id)
    nbformat.validate(notebook)
    with whole_file(path) as temporary:
        nbformat.write(notebook, temporary)
