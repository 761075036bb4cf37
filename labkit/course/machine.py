"""What machine is this, what will it run, and what is missing: the card of `labkit doctor` and of notebook 00.

Nothing here needs more than torch and the standard library, and a broken or missing torch is reported, not raised.
What it reads, and how, is in system.py; what it makes of that is in doctor_*.py. Units: GB are 10^9 bytes.
"""

import os
import platform
import shutil
from dataclasses import asdict, dataclass

from labkit.course.doctor_gpu import gpu_problems
from labkit.course.doctor_packages import import_torch, package_problems, version_of, version_problems
from labkit.course.doctor_place import place_problems
from labkit.course.doctor_problem import Problem
from labkit.course.doctor_scales import Forecast, forecast
from labkit.course.scale import choose_scale
from labkit.course.system import GB, Gpu, core_count, cpu_name, find_gpus, memory_gb, system_name, why_unfit
from labkit.errors import LabError
from labkit.files import REPOSITORY

SHOWN = ("torch", "triton", "numpy", "jupyterlab", "ipywidgets", "nbval", "labkit")


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
    runs: tuple[Forecast, ...]
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
        return [*rows, *([] if self.gpus else [_no_gpu_row()]), ("scale", self.scale, self.reason)]

    def _note(self, name: str) -> str:
        if name == "torch" and self.versions[name]:
            return f"built for CUDA {self.cuda}" if self.cuda else "CPU build"
        if name == "triton" and self.versions[name] is None:
            return "only kernel labs need it" if platform.system() == "Linux" else "Linux only; labs use plain torch"
        return ""

    def as_json(self) -> dict:
        """The same as plain data."""
        return {**asdict(self), "healthy": self.healthy}


def _no_gpu_row() -> tuple[str, str, str]:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "GPU", "Apple", "not used: kernels and bf16 settings are for CUDA; every lab also runs on the CPU"
    return "GPU", "none", "no NVIDIA GPU was found; every lab also runs on the CPU"


def inspect_machine() -> Machine:
    """Look at everything once. Never raises: what cannot be read is named among the problems."""
    torch, torch_problem = import_torch()
    versions = {name: version_of(name) for name in SHOWN}
    gpus, (scale, reason, scale_problem) = find_gpus(torch), scale_here(torch)
    disk, memory, cores = shutil.disk_usage(REPOSITORY).free / GB, memory_gb(), core_count()
    runs = forecast(memory, gpus[0].memory_gb if gpus else None, why_no_workstation(torch))
    problems = [*torch_problem, *scale_problem, *package_problems(), *version_problems(versions),
                *gpu_problems(gpus, torch, scale, runs[-1]), *place_problems(disk, memory, cores, runs[0])]
    return Machine(system=system_name(), cpu=cpu_name(), cores=cores, memory_gb=memory, disk_free_gb=disk,
                   python=platform.python_version(), versions=versions,
                   cuda=torch.version.cuda if torch else None, gpus=gpus, scale=scale, reason=reason,
                   runs=runs, problems=tuple(problems))


def why_no_workstation(torch: object | None) -> str:
    """Why no lab runs at workstation scale here; nothing where it does."""
    if torch is None:
        return "torch is missing"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that torch can use"
    reason = why_unfit(torch)
    return f"the {torch.cuda.get_device_name()} {reason}" if reason else ""


def scale_here(torch: object | None) -> tuple[str, str, list[Problem]]:
    """The scale that a lab would choose now, and why."""
    if torch is None and not os.environ.get("LABKIT_SCALE"):
        return "none", "torch is missing", []
    try:
        choice = choose_scale()
    except LabError as error:
        return "none", error.problem, [Problem(error.problem, f"unset LABKIT_SCALE   ({error.fix})", serious=True)]
    return choice.name, choice.reason, []
