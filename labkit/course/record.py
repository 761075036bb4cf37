"""What a run leaves behind: NN.json (rows of the ledger, machine, versions, time) and NN.figures.json.

Written only into the folder that `labkit run` names; read back from data/results/<scale>/ (a GPU's results:
data/results/workstation/<device>/) when a notebook shows an earlier full run beside the live one.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path

from labkit import __version__
from labkit.course import results
from labkit.course.header import text_of
from labkit.course.scale import SCALES, check_scale
from labkit.errors import LabError
from labkit.files import REPOSITORY, write_json


def plain(name: str, value: object) -> object:
    """`value` as JSON will give it back: lists, dicts with text keys, floats of six significant digits.

    Tensors and arrays become lists, numbers that are not finite become None (matplotlib draws a gap).
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(name, item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise LabError(f"lab.keep({name!r}) holds a {type(value).__name__}, which a JSON file cannot.",
                   "Keep numbers, text, lists, dicts, arrays or tensors.")


def device_name(device) -> str:
    """The name that results carry: the GPU's own, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return _processor()


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return f"{found[1].strip() if found else platform.processor() or platform.machine()}, CPU"


def device_slug(name: str) -> str:
    """A folder's name for a device: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measured_at(notebook: str) -> dict[str, list[Path]]:
    """Scale → the shipped result files of a notebook there (one a device for the workstation)."""
    found = {scale: sorted((results.RESULTS / scale).rglob(f"{notebook}.json")) for scale in SCALES}
    return {scale: files for scale, files in found.items() if files}


def result_folder(scale: str, device: str) -> Path:
    """Where the shipped results of a scale live."""
    folder = results.RESULTS / check_scale(scale)
    return folder / device_slug(device) if scale == "workstation" else folder


def recorded(notebook: str, name: str, scale: str, device: str | None = None) -> object | None:
    """One kept value of the shipped run; for the workstation the named device's, or the first there is."""
    folder, file = results.RESULTS / check_scale(scale), f"{notebook}.figures.json"
    if scale == "workstation":
        file = f"{device_slug(device) if device else '*'}/{file}"
    for path in sorted(folder.glob(file)):
        return json.loads(path.read_text(encoding="utf-8")).get(name)
    return None


def versions() -> dict[str, str | None]:
    """The versions a result depends on; None where a package is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {"labkit": __version__}


def commit() -> str:
    """The repository's commit, with a mark if code or data were changed or added since; "unknown" without git.

    Results and the stored outputs of notebooks don't count: a run writes them itself.
    """
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = (_git("status", "--porcelain", "--", "labkit", "data", ":!data/results")
                   or _git("ls-files", "--others", "--exclude-standard", "--", "notebooks/[0-9][0-9]_*.ipynb")
                   or any(map(_code_changed, _git("diff", "--name-only", "HEAD", "--", "notebooks/*.ipynb").split())))
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _code_changed(notebook: str) -> bool:
    """Whether a notebook that git knows has other code than at the last commit, or is gone."""
    file = REPOSITORY / notebook
    return not file.exists() or _code(file.read_text(encoding="utf-8")) != _code(_git("show", f"HEAD:{notebook}"))


def _code(notebook: str) -> list[str]:
    return [text_of(cell) for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


_COMMIT: list[str] = []  # asked once a process, before the run itself can change a file


def write(folder: Path, notebook: str, scale: str, device, rows: list[dict], kept: dict, *, seconds: float) -> None:
    """Write both result files, whole."""
    from labkit.measure.memory import peak_gigabytes  # needs torch, for which readers of results should not wait

    if not _COMMIT:
        _COMMIT.append(commit())
    seeds = sorted({seed for row in rows for seed in row.get("seeds") or []})
    result = {"notebook": notebook, "scale": scale, "device": device_name(device), "commit": _COMMIT[0],
              "versions": versions(), "seeds": seeds, "seconds": round(seconds, 1),
              "peak_gb": round(peak_gigabytes(device), 2), "rows": rows}
    os.makedirs(folder, exist_ok=True)
    write_json(folder / f"{notebook}.json", result)
    write_json(folder / f"{notebook}.figures.json", kept)
