"""What `labkit doctor` says about packages: missing ones, versions outside the tested ranges, a torch that is torn."""

import importlib.metadata
import platform
import re
import sys

from labkit.course.doctor_problem import NO_LAB, REBUILD_FIX, SETUP_FIX, Problem

NEEDED = ("torch", "numpy", "matplotlib", "safetensors", "tokenizers", "tqdm", "rich", "typer")
FOR_NOTEBOOKS = ("jupyterlab", "ipywidgets", "nbclient", "nbval")


def import_torch() -> tuple[object | None, list[Problem]]:
    """torch, or None and the reason: a missing package, or one whose libraries do not load."""
    try:
        import torch
    except Exception as error:  # a torn installation raises OSError, ImportError or AttributeError
        return None, [_no_torch(error)]
    return torch, []


def _no_torch(error: Exception) -> Problem:
    if platform.system() == "Darwin" and platform.machine() == "x86_64":
        return Problem("torch is not installed, and PyTorch has no current builds for Macs with Intel processors.",
                       "use a Mac with Apple silicon, or Linux", serious=True, follows=NO_LAB)
    if version_of("torch") is None:
        return Problem("torch is not installed.", SETUP_FIX, serious=True, follows=NO_LAB)
    return Problem(f"torch does not load: {error}", REBUILD_FIX, serious=True, follows=NO_LAB)


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
    problems = [Problem(f"{name} is not installed.", SETUP_FIX, serious=True, follows=NO_LAB) for name in missing]
    if absent := [name for name in FOR_NOTEBOOKS if version_of(name) is None]:
        problems.append(Problem(f"{', '.join(absent)} not installed.", SETUP_FIX, serious=False,
                                follows="Notebooks run only by labkit run --in-process."))
    if platform.system() == "Linux" and version_of("triton") is None:
        problems.append(Problem("triton is not installed.", SETUP_FIX, serious=False,
                                follows="Labs use their plain torch references; lab 01 does not run."))
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
                                f"{sys.executable} -m pip install 'numpy<2.4'", serious=False,
                                follows="Lab 01 stops in its first kernel with a loop."))
    return problems


def numbers(version: str) -> tuple[int, int]:
    """Major and minor number: '2.13.0+cpu' -> (2, 13)."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)
