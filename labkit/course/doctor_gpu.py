"""What `labkit doctor` says about GPUs: why one that is there is not used, or will not do.

None of it is serious, since the CPU always works.

Oldest drivers: NVIDIA, CUDA Toolkit release notes, table of CUDA minor version compatibility (12.x: 525, 13.x: 580).
"""

import os
import sys

from labkit.course.doctor_problem import ON_THE_CPU, REBUILD_FIX, STAY_ON_CPU, Problem
from labkit.course.doctor_scales import Forecast
from labkit.course.system import Gpu, driver_complaint, in_wsl, is_nvidia_plugged_in, why_unfit
from labkit.toolchain import c_compiler

WORKSTATION_GB = 24  # the memory that workstation settings are written for
OLDEST_DRIVER = {12: 525, 13: 580}  # CUDA's major number → major number of the driver
OLDER_TORCH = (f"uv pip install --python {sys.executable} --reinstall-package torch --torch-backend=auto "
               "-c constraints.txt torch")


def gpu_problems(gpus: tuple[Gpu, ...], torch: object | None, scale: str,
                 workstation: Forecast | None = None) -> list[Problem]:
    """Why no GPU is used, or what the one in use lacks. A learner who chose quick or desk is not bothered with that."""
    if torch is None:
        return []
    if not gpus:
        return unseen_gpu()
    if not torch.cuda.is_available():
        return [unreachable(gpus[0], torch.version.cuda)]
    if os.environ.get("LABKIT_SCALE") in ("quick", "desk"):
        return []
    if reason := why_unfit(torch):
        return [Problem(f"The {gpus[0].name} {reason}.", STAY_ON_CPU if scale == "workstation" else
                        "nothing is broken; export LABKIT_SCALE=desk for five seeds and verdicts", serious=False,
                        follows="Workstation settings do not run on it; labs run on the CPU, at quick scale.")]
    return [*too_small(gpus[0], workstation), *no_compiler()]


def unseen_gpu() -> list[Problem]:
    """A GPU on the bus, or a driver, that does not answer."""
    if complaint := driver_complaint():
        return [Problem(f"NVIDIA's driver does not answer: {complaint}",
                        "restart the machine (a driver updated without a restart does this), then try nvidia-smi",
                        serious=False, follows=ON_THE_CPU)]
    if is_nvidia_plugged_in():
        return [Problem("An NVIDIA GPU is plugged in, but there is no driver for it.",
                        "install NVIDIA's driver until nvidia-smi lists the GPU, then: " + REBUILD_FIX
                        + "   (a container must be started with --gpus all)", serious=False, follows=ON_THE_CPU)]
    return []


def unreachable(gpu: Gpu, cuda: str | None) -> Problem:
    """Why torch finds no GPU although the driver lists one, and the command that mends it."""
    if cuda is None:
        return Problem(f"{gpu.name} is there, but this torch is a CPU build.", REBUILD_FIX, False, ON_THE_CPU)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Problem(f"CUDA_VISIBLE_DEVICES hides the {gpu.name}.", "unset CUDA_VISIBLE_DEVICES", False, ON_THE_CPU)
    driver, oldest = _major(gpu.driver), OLDEST_DRIVER.get(_major(cuda), 0)
    if driver >= oldest:
        return Problem(f"torch cannot use the {gpu.name}, although driver {gpu.driver} is new enough for CUDA {cuda}.",
                       f"restart the machine, or the container with --gpus all; {sys.executable} -c "
                       "'import torch; torch.cuda.init()' prints the reason", False, ON_THE_CPU)
    place = "in Windows, not inside WSL" if in_wsl() else "and restart"
    older = f", or take a torch for an older CUDA: {OLDER_TORCH}" if driver >= min(OLDEST_DRIVER.values()) else ""
    return Problem(f"Driver {gpu.driver} of the {gpu.name} is too old for this torch: CUDA {cuda} needs {oldest} or "
                   "newer.", f"update NVIDIA's driver {place}{older}", False, ON_THE_CPU)


def _major(version: str) -> int:
    """580 of '580.95.05'; a version that cannot be read counts as new."""
    first = version.partition(".")[0]
    return int(first) if first.isdigit() else 10**6


def too_small(gpu: Gpu, workstation: Forecast | None) -> list[Problem]:
    """Less memory than workstation settings are written for: which labs do not fit, as far as that was measured."""
    if gpu.memory_gb >= WORKSTATION_GB - 1:  # a 24 GB card reports a little less or more, by driver and unit
        return []
    if workstation and workstation.too_large:
        needs = ", ".join(f"{lab} ({gb:g} GB)" for lab, gb in workstation.too_large.items())
        follows = f"Labs that need more: {needs}. Run those at desk scale; the others fit, where that was measured."
    else:
        follows = "A lab may stop with 'CUDA out of memory': run that one with LABKIT_SCALE=desk, on the CPU."
    return [Problem(f"{gpu.name} has {gpu.memory_gb:.0f} GB; workstation settings are written for {WORKSTATION_GB} GB "
                    "and may not fit.", STAY_ON_CPU, False, follows)]


def no_compiler() -> list[Problem]:
    """Triton builds the host's side of a launch with the machine's C compiler."""
    if c_compiler():
        return []
    return [Problem("There is no C compiler, which Triton needs.", "install gcc, on Debian or Ubuntu: "
                    "sudo apt-get install gcc", False, "Labs use their slower torch references.")]
