"""What `labkit doctor` says about the place itself: disk, memory, cores, and Windows around it."""

from labkit.course.doctor_problem import Problem
from labkit.course.doctor_scales import Forecast
from labkit.course.system import in_wsl
from labkit.files import REPOSITORY

DISK_GB = 1.0  # checkpoints and caches that a lab writes
MORE_MEMORY = "close other programs, and run one notebook at a time"
MORE_MEMORY_IN_WSL = ("set memory= under [wsl2] in %UserProfile%\\.wslconfig, then wsl --shutdown "
                      "(WSL gets half of Windows's memory unless told)")


def place_problems(disk: float, memory: float | None, cores: int, quick: Forecast) -> list[Problem]:
    """Too little disk or memory (GB), a single core, or a folder that is slow to read."""
    return [*_disk(disk), *_memory(memory, quick), *_cores(cores), *_windows_folder()]


def _disk(free: float) -> list[Problem]:
    if free >= DISK_GB:
        return []
    return [Problem(f"Only {free:.1f} GB of disk are free; checkpoints and caches need about {DISK_GB:g} GB.",
                    f"free some space on the disk of {REPOSITORY}", serious=free < 0.1,
                    follows="A lab stops where it writes; nothing half-written is kept.")]


def _memory(memory: float | None, quick: Forecast) -> list[Problem]:
    """Judged by the smallest scale: what the larger ones need stands in their own row."""
    if memory is None or not quick.too_large:
        return []
    needs = ", ".join(f"{lab} ({gb:g} GB)" for lab, gb in quick.too_large.items())
    return [Problem(f"Only {memory:.1f} GB of memory.", MORE_MEMORY_IN_WSL if in_wsl() else MORE_MEMORY, serious=False,
                    follows=f"Even at quick scale these labs may be killed: {needs}.")]


def _cores(cores: int) -> list[Problem]:
    if cores >= 2:
        return []
    return [Problem("There is one core for this process; labs were timed on two.",
                    "give the container or virtual machine two cores, or wait", serious=False,
                    follows="A lab takes up to twice the minutes of its header, and JupyterLab is slow meanwhile.")]


def _windows_folder() -> list[Problem]:
    """Windows's drives are mounted under /mnt and are many times slower from inside WSL than its own disk."""
    if not (in_wsl() and REPOSITORY.is_relative_to("/mnt")):
        return []
    return [Problem(f"The course lies on a Windows drive ({REPOSITORY}).",
                    "clone it into your Linux home instead: cd ~ && git clone ...", serious=False,
                    follows="Setting up and opening notebooks takes many times as long from there.")]
