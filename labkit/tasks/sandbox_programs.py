"""What a sandbox holds of the machine: the allowed programs, the libraries that they load, and their environment.

The list is that of an agent that reads and edits and runs nothing: look, search, cut, compare, move, pack, git. A
language, a compiler, a build tool, a package manager or a client of the network is "command not found" because it is
not there, not because a text was searched for its name. What is allowed may still do harm inside (`rm -rf .`, `git
commit`), and there it stays.
Source: the list of 83 programs of the set's own sandbox (marin-community/marin, experiments/swe_zero), in kind.
"""

import functools
import os
import re
import subprocess
from pathlib import Path

from labkit.errors import LabError

FOLDERS = ("/usr/local/bin", "/usr/bin", "/bin")
NEEDED = ("bash", "cat", "git", "grep", "ls", "sed")
PROGRAMS = NEEDED + tuple("""
    sh dash env true false test [ echo printf pwd sleep timeout date uname whoami id which yes seq expr basename dirname
    realpath readlink find xargs stat file tree du df wc head tail tac nl less more egrep fgrep awk mawk gawk cut paste
    tr sort uniq comm join split csplit fold fmt column expand unexpand rev shuf tsort cmp diff diff3 patch od hexdump
    strings base64 md5sum sha1sum sha256sum cksum touch mkdir rmdir rm cp mv ln chmod truncate mktemp tee dd install
    tar gzip gunzip zcat bzip2 bunzip2 xz unxz zip unzip ed
""".split())
# Nothing of the caller's environment is in it; git asks nobody, pages nothing, and knows a name to commit with.
ENVIRONMENT = {
    "PATH": "/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TERM": "dumb", "PAGER": "cat", "GIT_PAGER": "cat",
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_TEMPLATE_DIR": "",
    "GIT_AUTHOR_NAME": "agent", "GIT_AUTHOR_EMAIL": "agent@sandbox", "GIT_AUTHOR_DATE": "1700000000 +0000",
    "GIT_COMMITTER_NAME": "agent", "GIT_COMMITTER_EMAIL": "agent@sandbox", "GIT_COMMITTER_DATE": "1700000000 +0000",
}
LINKS = (("/bin", "/usr/bin"), ("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin"),
         ("/proc/self/fd/1", "/dev/stdout"), ("/proc/self/fd/2", "/dev/stderr"))


def find_program(name: str) -> str | None:
    """The file behind an allowed program, its links followed, on the paths of the system alone."""
    found = [Path(folder, name) for folder in FOLDERS if os.access(Path(folder, name), os.X_OK)]
    return str(found[0].resolve()) if found else None


def libraries(programs: list[str]) -> set[str]:
    """The paths at which the loader will look for what the programs need, itself included: one call of ldd for all."""
    answer = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False,
                            env={"PATH": ":".join(FOLDERS)})
    return set(re.findall(r"^\s+(?:\S+ => )?(/\S+) \(0x", answer.stdout, re.MULTILINE))


@functools.cache
def sandbox_files() -> tuple[tuple[str, str], ...]:
    """(file of the machine, its place in the sandbox) for every program and library.

    Raises:
        LabError: a program that every trace needs is not installed.
    """
    found = {name: path for name in PROGRAMS if (path := find_program(name))}
    missing = [name for name in NEEDED if name not in found] + ([] if find_program("ldd") else ["ldd"])
    if missing:
        raise LabError(f"The sandbox needs {', '.join(missing)}, which this machine does not have.",
                       "Install them with the system's package manager (apt install bash git sed grep).")
    shared = sorted(libraries(sorted(set(found.values()))))
    cache = ["/etc/ld.so.cache"] if os.path.exists("/etc/ld.so.cache") else []
    return tuple((path, f"/bin/{name}") for name, path in found.items()) + tuple((p, p) for p in shared + cache)
