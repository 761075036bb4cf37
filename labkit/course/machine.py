"""What machine is this, what will it run, and what is missing: the card of `labkit doctor` and of notebook 00.

Nothing here needs more than torch and the standard library, and a broken or missing torch is reported, not raised.
What it reads, and how, is in system.py. Units: GB are 10^9 bytes.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.course.scale import choose_scale
from labkit.course.system import GB, Gpu, core_count, cpu_name, find_gpus, memory_gb, system_name
from labkit.errors import LabError
from labkit.files import REPOSITORY
from labkit.toolchain import c_compiler

NEEDED = ("torch", "numpy", "matplotlib", "safetensors", "tokenizers", "tqdm", "rich", "typer")
FOR_NOTEBOOKS = ("jupyterlab", "ipywidgets", "nbclient", "nbval")
SHOWN = ("torch", "triton", "numpy", "jupyterlab", "ipywidgets", "nbval", "labkit")
WORKSTATION_GB = 24  # the memory that workstation settings are written for
IN_OUR_ENVIRONMENT = Path(sys.prefix) == REPOSITORY / ".venv"
PIP = f"{sys.executable} -m pip install -c constraints.txt"
SETUP_FIX = "rm -f .venv/.installed-* && make install" if IN_OUR_ENVIRONMENT else f"{PIP} -e '.[dev]'"
REBUILD_FIX = "rm -rf .venv && make install" if IN_OUR_ENVIRONMENT else f"{PIP} --force-reinstall torch"
STAY_ON_CPU = "export LABKIT_SCALE=quick"


@dataclass(frozen=True)
class Problem:
    """What is missing, the command that mends it, and whether the labs cannot run before that."""

    what: str
    fix: str
    serious: bool


@dataclass(frozen=True)
class Machine:
    """This machine, the scale that labs will choose on it, and why."""

    system: str
    cpu: str
    cores: int
    memory_gb: float | None
    disk_free_gb: float
    python: str
    versions: dict[str, str | None]
    cuda: str | None
    gpus: tuple[Gpu, ...]
    scale: str
    reason: str
    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """No serious problem: what `labkit doctor`'s exit status says."""
        return not any(problem.serious for problem in self.problems)

    def rows(self) -> list[tuple[str, str, str]]:
        """The card: (name, value, note)."""
        memory = "unknown" if self.memory_gb is None else f"{self.memory_gb:.1f} GB"
        rows = [("system", self.system, ""),
                ("CPU", self.cpu, f"{self.cores} core{'s' * (self.cores != 1)} for this process"),
                ("memory", memory, ""),
                ("free disk", f"{self.disk_free_gb:.0f} GB", "where the course lies"),
                ("Python", self.python, "")]
        rows += [(name, version or "missing", self._note(name)) for name, version in self.versions.items()]
        rows += [("GPU", gpu.name, f"{gpu.memory_gb:.0f} GB, compute capability {gpu.capability}, driver {gpu.driver}"
                  + ("" if gpu.usable else "; torch cannot use it")) for gpu in self.gpus]
        if not self.gpus:
            rows.append(("GPU", "none", "no NVIDIA GPU was found; every lab also runs on the CPU"))
        return [*rows, ("scale", self.scale, self.reason)]

    def _note(self, name: str) -> str:
        if name == "torch" and self.versions[name]:
            return f"built for CUDA {self.cuda}" if self.cuda else "CPU build"
        if name == "triton" and self.versions[name] is None:
            return "only kernel labs need it" if platform.system() == "Linux" else "Linux only; labs use plain torch"
        return ""

    def as_json(self) -> dict:
        """The same as plain data."""
        return {**asdict(self), "healthy": self.healthy}


def inspect_machine() -> Machine:
    """Look at everything once. Never raises: what cannot be read is named among the problems."""
    torch, torch_problem = import_torch()
    versions = {name: version_of(name) for name in SHOWN}
    gpus = find_gpus(torch)
    scale, reason, scale_problem = scale_here(torch)
    disk, memory = shutil.disk_usage(REPOSITORY).free / GB, memory_gb()
    problems = [*torch_problem, *scale_problem, *package_problems(), *version_problems(versions),
                *gpu_problems(gpus, torch, scale), *resource_problems(disk, memory)]
    return Machine(system=system_name(), cpu=cpu_name(), cores=core_count(), memory_gb=memory, disk_free_gb=disk,
                   python=platform.python_version(), versions=versions,
                   cuda=torch.version.cuda if torch else None, gpus=gpus, scale=scale, reason=reason,
                   problems=tuple(problems))


def import_torch() -> tuple[object | None, list[Problem]]:
    """torch, or None and the reason: a missing package, or one whose libraries do not load."""
    try:
        import torch
    except Exception as error:  # a torn installation raises OSError, ImportError or AttributeError
        cause = "torch is not installed." if version_of("torch") is None else f"torch does not load: {error}"
        return None, [Problem(cause, REBUILD_FIX if version_of("torch") else SETUP_FIX, serious=True)]
    return torch, []


def scale_here(torch: object | None) -> tuple[str, str, list[Problem]]:
    """The scale that a lab would choose now, and why."""
    if torch is None and not os.environ.get("LABKIT_SCALE"):
        return "none", "torch is missing", []
    try:
        choice = choose_scale()
    except LabError as error:
        return "none", error.problem, [Problem(error.problem, f"unset LABKIT_SCALE   ({error.fix})", serious=True)]
    return choice.name, choice.reason, []


def version_of(package: str) -> str | None:
    """The installed version, or None. A bare server imports labkit by PYTHONPATH, without an installation."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "labkit":
            from labkit import __version__

            return __version__
        return None


def package_problems() -> list[Problem]:
    """Missing packages: those every lab needs, and those only JupyterLab and the tests need."""
    missing = [name for name in NEEDED if name != "torch" and version_of(name) is None]
    problems = [Problem(f"{name} is not installed.", SETUP_FIX, serious=True) for name in missing]
    absent = [name for name in FOR_NOTEBOOKS if version_of(name) is None]
    if absent:
        problems.append(Problem(f"{', '.join(absent)} not installed: notebooks run only by labkit run --in-process.",
                                SETUP_FIX, serious=False))
    if platform.system() == "Linux" and version_of("triton") is None:
        problems.append(Problem("triton is not installed: labs use their plain torch references.", SETUP_FIX, False))
    return problems


def version_problems(versions: dict[str, str | None]) -> list[Problem]:
    """Combinations known not to work, and versions outside the tested ranges of pyproject.toml."""
    problems = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        problems.append(Problem(f"Python {platform.python_version()} is outside 3.11 to 3.13.", REBUILD_FIX, True))
    for name, low, beyond in (("torch", (2, 11), (2, 14)), ("triton", (3, 6), (3, 10))):
        found = versions[name]
        if found and not low <= numbers(found) < beyond:
            tested = f"{'.'.join(map(str, low))} up to, but not including, {'.'.join(map(str, beyond))}"
            problems.append(Problem(f"{name} {found} was not tested; the course knows {tested}.", REBUILD_FIX, False))
    triton, numpy = versions["triton"], versions["numpy"]
    if triton and numpy and numbers(triton) < (3, 7) and numbers(numpy) >= (2, 4):
        problems.append(Problem(f"triton {triton}'s interpreter fails on loops with numpy {numpy}.",
                                f"{sys.executable} -m pip install 'numpy<2.4'", serious=False))
    return problems


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number: '2.13.0+cpu' -> (2, 13)."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def gpu_problems(gpus: tuple[Gpu, ...], torch: object | None, scale: str) -> list[Problem]:
    """Why a GPU that is there is not used, or will not do. The CPU still works, so none is serious."""
    if not gpus or torch is None:
        return []
    gpu = gpus[0]
    if not torch.cuda.is_available():
        return [Problem(*why_unreachable(gpu, torch.version.cuda), serious=False)]
    reason = why_unfit(gpu) if scale == "workstation" else None
    problems = [Problem(*reason, serious=False)] if reason else []
    if scale == "workstation" and c_compiler() is None:
        problems.append(Problem("There is no C compiler, which Triton needs: labs use their slower torch references.",
                                "install gcc, on Debian or Ubuntu: sudo apt-get install gcc", serious=False))
    return problems


def why_unreachable(gpu: Gpu, cuda: str | None) -> tuple[str, str]:
    """Why torch finds no GPU although the driver lists one, and the command that mends it."""
    if cuda is None:
        return f"{gpu.name} is there, but this torch is a CPU build.", REBUILD_FIX
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES hides the {gpu.name}.", "unset CUDA_VISIBLE_DEVICES"
    return (f"torch cannot use the {gpu.name}: driver {gpu.driver} is too old for a torch built for CUDA {cuda}, or is "
            "not loaded; update it, or take a torch that fits it.",
            f"uv pip install --python {sys.executable} --reinstall-package torch --torch-backend=auto "
            "-c constraints.txt torch")


def why_unfit(gpu: Gpu) -> tuple[str, str] | None:
    """Why workstation settings will not run on a GPU that torch reaches: too old, unknown to this torch, too small."""
    if tuple(int(part) for part in gpu.capability.split(".")) < (8, 0):
        return (f"{gpu.name} is too old (compute capability {gpu.capability}): workstation settings use bf16, which "
                "starts at 8.0, the RTX 30 series.", STAY_ON_CPU)
    if not gpu.usable:
        return f"This torch has no code for the {gpu.name} (compute capability {gpu.capability}).", STAY_ON_CPU
    if gpu.memory_gb < WORKSTATION_GB - 1:  # a 24 GB card reports a little less or more, by driver and unit
        return (f"{gpu.name} has {gpu.memory_gb:.0f} GB; workstation settings are written for {WORKSTATION_GB} GB "
                "and may not fit.", STAY_ON_CPU)
    return None


def resource_problems(disk: float, memory: float | None) -> list[Problem]:
    """Too little disk or memory, in GB."""
    problems = []
    if disk < 1:
        problems.append(Problem(f"Only {disk:.1f} GB of disk are free; checkpoints and caches need about 1 GB.",
                                f"free some space on the disk of {REPOSITORY}", serious=disk < 0.1))
    if memory is not None and memory < 3.5:
        problems.append(Problem(f"Only {memory:.1f} GB of memory; the labs are made for 4 GB or more.",
                                "close other programs, and run one notebook at a time", serious=False))
    return problems
