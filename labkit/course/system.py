"""What the system and the NVIDIA driver say about this machine: names, cores, memory, GPUs.

Linux, WSL and macOS; nothing beyond the standard library, and torch where it is handed in. Units: GB are 10^9 bytes.
Sources: /proc, /sys and cgroup v2 (Linux), sysctl (macOS), nvidia-smi; torch.cuda.get_arch_list for what torch was
built for.
"""

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
OLDEST_CAPABILITY = (8, 0)  # bf16 arithmetic and Triton's support both start here: Ampere, the RTX 30 series
WSL_DRIVER = "/usr/lib/wsl/lib/nvidia-smi"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as its driver reports it; `usable` says whether this torch can compute on it."""

    name: str
    memory_gb: float
    capability: str
    driver: str
    usable: bool


def ask(command: list[str]) -> str:
    """What a small system tool prints, or nothing where it is absent, fails or does not answer."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def system_name() -> str:
    """Operating system with its release, and whether it is Linux inside Windows."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]} ({platform.machine()})"
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = f"{platform.system()} {platform.release()}"
    return f"{name}{', in WSL' * in_wsl()} ({platform.machine()})"


def in_wsl() -> bool:
    """Whether this is Linux inside Windows: Microsoft's kernel says so in its release."""
    return "microsoft" in platform.release().lower()


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    if found := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
        return found[1]
    return ask(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or platform.machine()


def core_count() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float | None:
    """Physical memory, or the container's limit where that is lower; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        limit = "max"
    return (min(total, int(limit)) if limit.isdigit() else total) / GB


def find_gpus(torch: object | None) -> tuple[Gpu, ...]:
    """The GPUs that torch can reach; where it reaches none, those that the driver lists."""
    listed = driver_gpus()
    if torch is None or not torch.cuda.is_available():
        return tuple(Gpu(*fields, usable=False) for fields in listed)
    driver = listed[0][3] if listed else "unknown"
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = (device.major, device.minor)
        found.append(Gpu(device.name, device.total_memory / GB, f"{device.major}.{device.minor}", driver,
                         usable=is_built_for(capability, torch.cuda.get_arch_list())))
    return tuple(found)


def is_built_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether machine code (sm_XY, same major number) or PTX (compute_XY, any later card) in torch serves this card."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # sm_90a: code for exactly this card
        if not digits.isdigit():  # AMD's are named otherwise: gfx90a
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def why_unfit(torch) -> str | None:
    """Why workstation settings cannot run on the GPU that torch reaches, as the end of a sentence; None if they can."""
    capability = tuple(torch.cuda.get_device_capability())
    number = ".".join(map(str, capability))
    if getattr(torch.version, "hip", None):
        return "is an AMD GPU, which no lab was tested on"
    if capability < OLDEST_CAPABILITY:
        return f"is too old (compute capability {number}; bf16 and Triton start at 8.0, the RTX 30 series)"
    if not is_built_for(capability, torch.cuda.get_arch_list()):
        return f"is unknown to this torch, which has no code for compute capability {number}"
    return None


def driver_complaint() -> str:
    """What nvidia-smi says when it fails, or nothing: a driver that was updated but not restarted speaks here."""
    tool = shutil.which("nvidia-smi") or WSL_DRIVER
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = (answer.stdout + answer.stderr).strip().splitlines()
    return (said[0] if said else f"status {answer.returncode}") if answer.returncode else ""


def is_nvidia_plugged_in(bus: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus shows a display controller (class 03) of NVIDIA's (vendor 10de), with or without a driver."""
    def says(device: Path, file: str) -> str:
        try:
            return (device / file).read_text(encoding="utf-8").strip()
        except OSError:
            return ""
    return any(says(device, "vendor") == "0x10de" and says(device, "class").startswith("0x03")
               for device in bus.glob("*"))


def driver_gpus() -> list[tuple[str, float, str, str]]:
    """(name, memory in GB, compute capability, driver version) of each GPU that nvidia-smi lists."""
    tool = shutil.which("nvidia-smi") or WSL_DRIVER
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    rows = [line.split(", ") for line in ask([tool, query, "--format=csv,noheader,nounits"]).splitlines()]
    return [(name, float(memory) * 2**20 / GB if memory.isdigit() else 0.0, capability, driver)
            for name, memory, capability, driver in (row for row in rows if len(row) == 4)]
