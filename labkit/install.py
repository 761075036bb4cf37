"""Set up the course: a virtual environment, the right build of torch, and the rest at the versions of constraints.txt.

`make install` calls this as `python -m labkit.install .venv`, with nothing but the standard library at hand. Every
step shows its command; an error is printed whole and ends the set-up; a set-up that was broken off is begun afresh.

uv installs (seconds instead of minutes); pip takes over where uv cannot be had, unless that is for want of a network.
What cannot work (native Windows, a full disk) is said before anything is fetched. torch on Linux comes in two builds:
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
import sysconfig
from pathlib import Path

from labkit.errors import LabError
from labkit.files import REPOSITORY, write_json

CONSTRAINTS = ["--constraint", "constraints.txt"]
COURSE = ["--editable", ".[dev]"]
UNFINISHED = ".unfinished"
OLDEST_MACOS = 14  # what the wheels of the pinned torch are built for
NETWORK = ("If the messages above speak of a connection or a certificate, mend it and run the same command again "
           "(behind a proxy set HTTPS_PROXY, behind a company's certificate SSL_CERT_FILE). What was fetched is kept.")
NO_CONNECTION = ("Failed to establish a new connection", "timed out", "ProxyError",
                 "Name or service not known", "name resolution", "CERTIFICATE_VERIFY_FAILED", "Network is unreachable")
DISK_GB = {False: 2.5, True: 6.0}  # measured: 1.9 GB with the CPU build of torch, 5.4 GB with the CUDA build (True)


def main(arguments: list[str]) -> int:
    """Set up the folder named by the first argument (default .venv); 0 if everything is in place."""
    os.chdir(REPOSITORY)
    folder = Path(arguments[0] if arguments else ".venv")
    try:
        refuse_what_cannot_work()
        nvidia = has_nvidia_gpu()
        if not is_whole(folder):
            ask_for_disk(folder, nvidia)
        make_environment(folder)
        (folder / UNFINISHED).touch()
        install(folder, nvidia=nvidia, links=os.environ.get("PIP_FIND_LINKS", ""))
        settle_jupyterlab(folder)
        (folder / UNFINISHED).unlink()
    except LabError as error:
        print(f"\nThe set-up did not finish. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe set-up was interrupted. Run the same command again: it starts afresh.", file=sys.stderr)
        return 130
    return 0


def refuse_what_cannot_work() -> None:
    """Platforms for which PyTorch has no builds, or where a folder of this course would not work."""
    if platform.system() == "Windows":
        raise LabError("Windows itself is not supported, WSL 2 is.",
                       "In PowerShell: wsl --install; then clone the course inside it and run make lab there.")
    if platform.system() == "Darwin" and platform.machine() == "x86_64":
        raise LabError("PyTorch has no current builds for Macs with Intel processors.",
                       "Use a Mac with Apple silicon (and a Python built for it, not for Intel), or Linux.")
    if platform.system() == "Darwin" and int(platform.mac_ver()[0].partition(".")[0]) < OLDEST_MACOS:
        raise LabError(f"The tested PyTorch needs macOS {OLDEST_MACOS}, and this is {platform.mac_ver()[0]}.",
                       "Update macOS, or use Linux.")
    if "musl" in (sysconfig.get_config_var("SOABI") or ""):
        raise LabError("PyTorch has no builds for Linux with musl, like Alpine.",
                       "Use a Linux with glibc, like Debian.")


def ask_for_disk(folder: Path, nvidia: bool) -> None:
    """A disk that fills up in the middle leaves messages nobody understands."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, need = shutil.disk_usage(place).free / 1e9, DISK_GB[nvidia]
    if free < need:
        raise LabError(f"The set-up needs about {need:g} GB of disk, and {free:.1f} GB are free at {place}.",
                       "Free some space, or choose another disk: make VENV=/other/disk/venv lab")


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


def settle_jupyterlab(folder: Path) -> None:
    """JupyterLab's default settings here: texts open rendered, as the welcome page must; no question about news."""
    overrides = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"},
                 "@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}}
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
    said: list[str] = []
    if uv.exists() or run([*pip, "--quiet", "--retries", "2", *CONSTRAINTS, "uv"], said=said) == 0:
        return [str(uv), "pip", "install", "--python", python], True
    if any(words in "".join(said) for words in NO_CONNECTION):
        raise LabError("No package index can be reached, and the set-up is the one step that needs it.",
                       "Connect to the network and run the same command again; behind a proxy set HTTPS_PROXY first.")
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


def run(command: list[str], without_links: bool = False, said: list[str] | None = None) -> int:
    """Show a command and run it; its messages go straight to the terminal, or are also kept in `said`."""
    print("$", shlex.join(command), flush=True)
    environment = {name: value for name, value in os.environ.items()
                   if not (without_links and name == "PIP_FIND_LINKS") and name != "VIRTUAL_ENV"}
    if said is None:
        return subprocess.run(command, env=environment).returncode
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    said.append(done.stderr)
    return done.returncode


def attempt(command: list[str], fix: str, without_links: bool = False) -> None:
    """Run a command that has to succeed."""
    if (code := run(command, without_links)) != 0:
        raise LabError(f"This step failed with status {code}: {shlex.join(command)}.", fix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
