"""Set up the course: a virtual environment, the right build of torch, and the rest at the versions of constraints.txt.

`make install` calls this as `python -m labkit.install .venv`, with nothing but the standard library at hand. Every
step shows its command; an error is printed whole and ends the set-up; a set-up that was broken off is begun afresh.

uv installs (seconds instead of minutes); pip takes over where uv cannot be had. torch on Linux comes in two builds:
with an NVIDIA GPU the default one (CUDA), without one the small CPU build, from a wheel in PIP_FIND_LINKS if one
fits, else by uv's `--torch-backend=cpu`.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from labkit.errors import LabError
from labkit.files import REPOSITORY, write_json

CONSTRAINTS = ["--constraint", "constraints.txt"]
COURSE = ["--editable", ".[dev]"]
UNFINISHED = ".unfinished"
NETWORK = "If the messages above speak of the network, mend it and run the same command again."


def main(arguments: list[str]) -> int:
    """Set up the folder named by the first argument (default .venv); 0 if everything is in place."""
    os.chdir(REPOSITORY)
    folder = Path(arguments[0] if arguments else ".venv")
    try:
        make_environment(folder)
        (folder / UNFINISHED).touch()
        install(folder, nvidia=has_nvidia_gpu(), links=os.environ.get("PIP_FIND_LINKS", ""))
        silence_news(folder)
        (folder / UNFINISHED).unlink()
    except LabError as error:
        print(f"\nThe set-up did not finish. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe set-up was interrupted. Run the same command again: it starts afresh.", file=sys.stderr)
        return 130
    return 0


def install(folder: Path, *, nvidia: bool, links: str) -> None:
    """Install torch's right build, then everything else, into the virtual environment `folder`."""
    installer, is_uv = find_installer(folder)
    links = "" if nvidia and cpu_wheel(links) else links  # a CPU wheel would win over the CUDA build of equal version
    extra = [item for link in links.split() for item in ("--find-links", link)]
    if platform.system() == "Linux" and not nvidia:
        install_cpu_torch(installer, is_uv=is_uv, links=links, extra=extra)
    attempt([*installer, *CONSTRAINTS, *extra, *COURSE], NETWORK, without_links=not links)


def install_cpu_torch(installer: list[str], *, is_uv: bool, links: str, extra: list[str]) -> None:
    """The CPU build of torch: from a fitting wheel at hand, else from PyTorch's index; otherwise say what follows."""
    if cpu_wheel(links):
        attempt([*installer, *CONSTRAINTS, *extra, "torch"], f"{NETWORK} Else look at the wheels in {links}.")
    elif not is_uv:
        print("Without uv the default build of torch is taken: it has CUDA inside and is several GB larger.")
    elif run([*installer, *CONSTRAINTS, *extra, "--torch-backend=cpu", "torch"]) != 0:
        print("The small CPU build of torch could not be fetched (see above), so the default build follows: it works "
              "as well, but has CUDA inside and is several GB larger.")


def make_environment(folder: Path) -> None:
    """Create the virtual environment, or keep the one that is there if it is whole and was made here."""
    if is_whole(folder):
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists() and not unfinished(folder):
        raise LabError(f"{folder} is there, but is no virtual environment, and will not be deleted.",
                       "Move it away, or choose another folder: make VENV=.venv2 install")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / UNFINISHED).touch()
    print(f"Making {folder} with Python {platform.python_version()}", flush=True)
    attempt([sys.executable, "-m", "venv", str(folder)],
            "On Debian and Ubuntu the module venv is a package of its own: sudo apt install python3-venv")


def silence_news(folder: Path) -> None:
    """JupyterLab's default settings here: no question about Jupyter news on the first screen of the course."""
    overrides = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}
    write_json(folder / "share" / "jupyter" / "lab" / "settings" / "overrides.json", overrides)


def unfinished(folder: Path) -> bool:
    """Whether an earlier set-up was broken off: a package may then look installed and lack half its files."""
    return (folder / UNFINISHED).exists()


def is_whole(folder: Path) -> bool:
    """Whether `folder` was finished, has a Python that fits, and was made at this place (its scripts hold its path)."""
    python, note = folder / "bin" / "python", folder / "pyvenv.cfg"
    if unfinished(folder) or not python.exists() or not note.exists():
        return False
    command = re.search(r"^command = (.*)$", note.read_text(encoding="utf-8"), re.MULTILINE)
    moved = command is not None and not command[1].endswith(str(folder.resolve()))
    code = "import pip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"
    return not moved and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def find_installer(folder: Path) -> tuple[list[str], bool]:
    """The command that installs into `folder`, and whether it is uv: uv is installed there first, else pip serves."""
    python, uv = str(folder / "bin" / "python"), folder / "bin" / "uv"
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if uv.exists() or run([*pip, "--quiet", *CONSTRAINTS, "uv"]) == 0:
        return [str(uv), "pip", "install", "--python", python], True
    print("uv could not be installed (see above); pip does the work, in minutes instead of seconds.")
    return pip, False


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU (torch is not there yet to be asked)."""
    tool = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    try:
        answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU 0" in answer.stdout


def cpu_wheel(links: str) -> Path | None:
    """A CPU wheel of the pinned torch for this Python and processor in the folders that `links` names."""
    pinned = re.search(r"^torch==(\S+)", Path("constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    name = f"torch-{pinned}+cpu-{tag}-*{platform.machine()}.whl"
    return next((wheel for link in links.split() for wheel in Path(link).glob(name)), None)


def run(command: list[str], without_links: bool = False) -> int:
    """Show a command and run it; its messages go straight to the terminal."""
    print("$", shlex.join(command), flush=True)
    environment = {name: value for name, value in os.environ.items()
                   if not (without_links and name == "PIP_FIND_LINKS") and name != "VIRTUAL_ENV"}
    return subprocess.run(command, env=environment).returncode


def attempt(command: list[str], fix: str, without_links: bool = False) -> None:
    """Run a command that has to succeed."""
    if (code := run(command, without_links)) != 0:
        raise LabError(f"This step failed with status {code}: {shlex.join(command)}.", fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
