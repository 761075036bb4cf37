"""A sandbox for shell commands that nobody has read: they see a copy of one worktree, and nothing they do leaves it.

    with Sandbox(worktree) as sandbox:
        result = sandbox.run("grep -rn 'def total' .")     # bash, at the root of the repository, 30 seconds at most
    # here `worktree` holds the files as the commands left them

It is made of the namespaces of Linux, needs no root and no program but bash and git, and costs one fork a command:
sandbox_launcher.py says what contains what, sandbox_programs.py what there is to run, sandbox_copy.py what comes back.
Where the system forbids namespaces nothing runs at all: `sandbox_problem` says why, and every sandbox raises it.

What comes back is as little to be trusted as the commands: read it, and run none of it. No program of the machine, no
secret in its files and no network were in reach; a fault of the kernel itself would be.

A list of forbidden words, or a PATH of allowed programs, is no sandbox: `/usr/bin/python3`, `cat ../../secret`, a link,
a hook of git and `$(printf pyt)hon` all pass it.
"""

import ast
import contextlib
import functools
import marshal
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import LabError
from labkit.tasks.sandbox_copy import read_tree, write_changes
from labkit.tasks.sandbox_programs import ENVIRONMENT, LINKS, sandbox_files

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")  # not imported: it needs what only Linux has
START_SECONDS, GRACE_SECONDS = 30, 15  # how long the launcher may take to start, and to clean up after a command
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Result:
    """What a command wrote (stdout and stderr as they came), how it ended, and what was cut."""

    output: str
    exit_code: int  # 128 + the signal where a signal ended it
    timed_out: bool
    truncated: bool


def shorten(text: str, characters: int, elided: int = 0) -> str:
    """The first and the last half of `characters`, with a line between that says how many are left out.

    `elided` counts what `text` has already lost in its middle.
    """
    elided += max(0, len(text) - characters)
    if not elided:
        return text
    head, tail = characters - characters // 2, characters // 2
    return f"{text[:head]}\n\n... (output truncated, {elided} chars elided) ...\n\n{text[len(text) - tail :]}"


class Sandbox:
    """One copy of a worktree and the namespaces around it; use it as a context manager, and from one thread.

    Args:
        worktree: the folder that the commands see as /repo. Their changes to plain files come back when the block ends
            without an error; links, empty folders and everything in `.git` do not.
        seconds: the wall-clock time of a command.
        output_characters: what a result shows of an output: half its head, half its tail.
        processes: how many may run at once, bash included.
        file_bytes: the largest file that a command may write.
        memory_bytes: address space of one process.
        disk_bytes, disk_files: the size of /repo and of /tmp, which are held in memory, and how many files each holds.
    Raises:
        LabError: there is no sandbox on this machine, or the worktree does not fit into it.
    """

    def __init__(self, worktree: Path, *, seconds: float = 30, output_characters: int = 8000, processes: int = 32,
                 file_bytes: int = 16 * MEGABYTE, memory_bytes: int = 256 * MEGABYTE, disk_bytes: int = 64 * MEGABYTE,
                 disk_files: int = 20_000):
        self.worktree, self.seconds, self.output_characters = Path(worktree), seconds, output_characters
        counts = (processes, file_bytes, memory_bytes, disk_bytes, disk_files)
        if seconds <= 0 or output_characters < 0 or min(counts) < 1:
            raise LabError("A sandbox with a limit of nothing runs nothing.", "Use limits above 0.")
        if not self.worktree.is_dir():
            raise LabError(f"{worktree} is no folder.", "Make the repository first (make_repository).")
        launchers = 2  # one inside, one that waits for it outside
        limits = {"RLIMIT_NPROC": processes + launchers, "RLIMIT_FSIZE": file_bytes, "RLIMIT_AS": memory_bytes,
                  "RLIMIT_NOFILE": 256,
                  "RLIMIT_CORE": 1}  # 0 would still start the machine's own program for crashes, outside
        self.setup = {"limits": limits, "disk_bytes": disk_bytes, "disk_files": disk_files, "environment": ENVIRONMENT,
                      "keep_bytes": 4 * output_characters, "output_bytes": 16 * MEGABYTE}
        self.launcher = None

    def __enter__(self) -> "Sandbox":
        if sys.platform != "linux":
            raise LabError(f"There are no namespaces on {sys.platform}, so no command is run.", "Use a Linux machine.")
        self.files = read_tree(self.worktree, self.setup["disk_bytes"])
        self.setup |= {"binds": sandbox_files(), "links": LINKS}
        # the loader's path stays, which some Pythons need to start; a command never sees this environment
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self.launcher = subprocess.Popen(
            [sys.executable, "-I", "-S", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, bufsize=0, cwd="/", env=environment, start_new_session=True)
        try:
            self._send(self.setup)
            self._send({"files": [file[:3] for file in self.files]}, *(content for *_, content in self.files))
            problem = self._receive(START_SECONDS)[0]["problem"]
        except BaseException:
            self.close()
            raise
        if problem:
            self.close()
            raise LabError(f"This machine does not let a sandbox be made ({problem}), so no command is run.", advice())
        return self

    def __exit__(self, kind, *rest) -> None:
        try:
            if kind is None:
                self.write_back()
        finally:
            self.close()

    def run(self, command: str) -> Result:
        """Run one command in a new bash at the root of the repository; when it returns, no process of it is left.

        A result is `truncated` where the output was longer than `output_characters`; a command that writes more than
        16 MB is ended at once.
        """
        if self.launcher is None:
            raise LabError("This sandbox is not open.", "Run commands inside `with Sandbox(worktree) as sandbox:`.")
        if "\0" in command:
            return Result("bash: a command cannot hold a null character\n", 126, False, False)
        self._send({"command": command, "seconds": self.seconds})
        answer, (head, tail) = self._receive(self.seconds + GRACE_SECONDS)
        lost = answer["total"] - len(head) - len(tail)
        # half a character at a cut becomes a replacement sign, and is cut away with the middle
        text = (head.decode(errors="replace") + tail.decode(errors="replace") if lost
                else (head + tail).decode(errors="replace"))
        return Result(shorten(text, self.output_characters, lost), answer["exit_code"], answer["timed_out"],
                      bool(lost) or len(text) > self.output_characters)

    def write_back(self) -> list[str]:
        """Bring the worktree up to date with the copy; returns the paths that changed."""
        self._send({"files": True})
        answer, contents = self._receive(START_SECONDS)
        after = {path: (mode, content) for (path, mode), content in zip(answer["files"], contents, strict=True)}
        changed = write_changes(self.worktree, self.files, after)
        self.files = [(path, mode, False, content) for path, (mode, content) in after.items()]
        return changed

    def close(self) -> None:
        """End the launcher, and with it every process of the sandbox. Nothing more comes back."""
        if self.launcher is None:
            return
        launcher, self.launcher = self.launcher, None
        launcher.kill()
        for stream in (launcher.stdin, launcher.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        launcher.wait()

    def _send(self, header: dict, *contents: bytes) -> None:
        text = marshal.dumps(header | {"sizes": [len(content) for content in contents]})
        data = memoryview(b"".join((struct.pack("<I", len(text)), text, *contents)))
        try:
            while data:
                data = data[self.launcher.stdin.write(data):]
        except BrokenPipeError:
            pass  # it has ended and said why, or `_receive` will say that it has not

    def _receive(self, seconds: float) -> tuple[dict, list[bytes]]:
        end = time.monotonic() + seconds
        header = ast.literal_eval(self._read(struct.unpack("<I", self._read(4, end))[0], end).decode())
        return header, [self._read(size, end) for size in header["sizes"]]

    def _read(self, count: int, end: float) -> bytes:
        parts = []
        while count:
            ready, _, _ = select.select([self.launcher.stdout], [], [], max(0.0, end - time.monotonic()))
            part = self.launcher.stdout.read(count) if ready else b""
            if not part:
                self.close()
                raise LabError("The sandbox has ended, or does not answer." if ready else "The sandbox hangs.",
                               "Open it again; its worktree is as it was.")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def advice() -> str:
    """What to change on a machine that forbids namespaces."""
    restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if os.geteuid() and restricted.exists() and restricted.read_text().strip() == "1":
        return "Allow them until the next start: sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return ("Start the container with --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
                "--security-opt systempaths=unconfined.")
    return "Use Linux 5.14 or later with user namespaces allowed (sysctl user.max_user_namespaces above 0)."


@functools.cache
def sandbox_problem() -> str | None:
    """None where a sandbox works on this machine, else the sentence that says why there is none: tried, not guessed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Sandbox(Path(folder), seconds=10) as sandbox:
                result = sandbox.run("echo works | cat")
        except LabError as error:
            return str(error)
    return None if result.output == "works\n" else f"A sandbox opens here, but a command in it ends with: {result}"
