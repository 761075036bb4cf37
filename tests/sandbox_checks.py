"""Hostile commands and what must become of them: nothing outside the sandbox changes, and no process is left.

Each check opens sandboxes of its own on a worktree that stands beside a folder with a secret, and asserts. The checks
import nothing but the sandbox, so that they also run as an ordinary user, in another Python, and against a sandbox with
a fault planted in it. Every command is bounded by the limits that it is run under.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labkit.tasks import sandbox
from labkit.tasks.sandbox import Result, Sandbox

MEGABYTE = 1 << 20
SECRET = "the secret outside"
ROOMY, PATIENCE = {"seconds": 10}, 5


class Place:
    """A worktree under git, and beside it a folder that nothing may touch."""

    def __init__(self, folder: Path):
        self.folder, self.worktree, self.outside = folder, folder / "worktree", folder / "outside"
        self.worktree.mkdir(parents=True)
        self.outside.mkdir()
        self.secret = self.outside / "secret.txt"
        self.secret.write_text(SECRET)
        (self.worktree / "sums.py").write_text("def total(a, b):\n    return a - b\n")
        for command in ("init -q -b main", "add -A", "commit -q -m Start"):
            self.git(*command.split())

    def git(self, *arguments: str) -> str:
        """git as a person would run it in the worktree, with no settings but those of the worktree."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1",
                       "GIT_TEMPLATE_DIR": "", "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b",
                       "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
        return subprocess.run(["git", *arguments], cwd=self.worktree, env=environment, capture_output=True, text=True,
                              check=True, timeout=20).stdout

    def snapshot(self, below: Path) -> dict[str, tuple]:
        """Kind, mode and content of everything below a folder, links not followed."""
        found = {}
        for folder, folders, names in os.walk(below):
            for name in folders + names:
                path = Path(folder, name)
                status = path.lstat()
                content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                found[str(path.relative_to(below))] = (status.st_mode, content)
        return found


def parents() -> dict[int, int]:
    """Every process that runs and its parent, from /proc; one that has ended and waits to be read is none."""
    found = {}
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            fields = Path("/proc", str(int(entry)), "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                found[int(entry)] = int(fields[1])
    return found


def descendants(process: int) -> set[int]:
    """The processes below one."""
    parent, found, size = parents(), {process}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, above in parent.items() if above in found}
    return found - {process}


def gone(processes: set[int]) -> bool:
    """Whether they have ended, within a few seconds."""
    end = time.monotonic() + PATIENCE
    while processes & set(parents()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def attack(place: Place, *commands: str, **limits) -> list[Result]:
    """Run commands one after another in one sandbox; outside all is as before, and no process is left after each."""
    before = place.snapshot(place.outside), place.snapshot(place.worktree / ".git")
    results = []
    with Sandbox(place.worktree, **(ROOMY | limits)) as shell:
        inside = descendants(shell.launcher.pid)
        assert len(inside) == 1, "the launcher has one process in its namespace"
        process = shell.launcher.pid
        for command in commands:
            results.append(shell.run(command))
            assert descendants(process) == inside, f"a process of {command!r} is left"
    assert gone(inside | {process}), "the launcher is left"
    assert (place.snapshot(place.outside), place.snapshot(place.worktree / ".git")) == before, "changed outside"
    return results


def check_ordinary_work(place: Place) -> None:
    """What an agent is for works, and comes back: look, search, edit, git."""
    results = attack(place, "ls", "grep -n total *.py", "sed -i 's/a - b/a + b/' sums.py && git diff --stat",
                     "mkdir -p deep/er && echo new > deep/er/file.txt && git status --short", "cat <(echo piped)",
                     "echo one >&2; echo two; exit 3", "pwd; whoami; cd /tmp", "pwd")
    outputs = [result.output for result in results]
    assert outputs[:2] == ["sums.py\n", "1:def total(a, b):\n"], outputs
    assert "1 insertion(+), 1 deletion(-)" in outputs[2] and outputs[3] == " M sums.py\n?? deep/\n"
    assert outputs[4] == "piped\n" and outputs[5] == "one\ntwo\n" and results[5].exit_code == 3
    assert outputs[6:] == ["/repo\nagent\n", "/repo\n"]
    assert (place.worktree / "sums.py").read_text() == "def total(a, b):\n    return a + b\n"
    assert (place.worktree / "deep/er/file.txt").read_text() == "new\n"
    attack(place, "rm -r deep sums.py")
    assert [path.name for path in place.worktree.iterdir()] == [".git"]


def check_paths(place: Place) -> None:
    """Absolute paths, steps up and searches find nothing of the machine."""
    up = "../" * 12
    for result in attack(place, f"cat {place.secret}", f"cat {up}{place.secret}", f"cat ../outside/{place.secret.name}",
                         f"ls {place.folder}", "cat /etc/shadow", "ls /root", "ls /home", "cat /etc/hostname",
                         f"echo bad > {place.secret}", f"rm -rf {place.outside}/*"):
        assert SECRET not in result.output
        assert result.exit_code or "rm " in result.output or not result.output, result
    found, etc, top = attack(place, "find / -name 'secret*' 2>/dev/null; grep -rs 'the secret' / --exclude-dir=proc",
                             "ls /etc", "ls /")
    assert found.output == "" and etc.output.split() == ["group", "ld.so.cache", "passwd"]
    assert set(top.output.split()) <= {"bin", "dev", "etc", "lib", "lib32", "lib64", "proc", "repo", "tmp", "usr"}


def check_links(place: Place) -> None:
    """Links made inside lead nowhere and don't come back; links that were there are not followed on the way back."""
    (place.worktree / "docs").symlink_to(place.outside)
    (place.worktree / "note").symlink_to(place.secret)
    before = place.snapshot(place.outside)
    results = attack(place, f"ln -s {place.secret} way; cat way note docs/secret.txt; echo bad > way; echo bad > note",
                     f"ln -s / root; ln -s {place.outside} way2; ln {place.secret} hard; echo bad > way2/secret.txt",
                     "rm docs note; mkdir docs; echo mine > docs/secret.txt; echo mine > note; rm sums.py; "
                     f"ln -s {place.secret} sums.py")
    assert all(SECRET not in result.output for result in results)
    assert place.snapshot(place.outside) == before
    kinds = {path.name: path.is_symlink() for path in place.worktree.iterdir()}
    assert kinds == {".git": False, "docs": False, "note": False}, kinds
    assert (place.worktree / "docs/secret.txt").read_text() == "mine\n" == (place.worktree / "note").read_text()


def check_programs(place: Place) -> None:
    """What is not on the list is not there, by whatever name it is called; what is there cannot be changed."""
    names = "python python3 pip pytest perl gcc node curl ssh make mount sudo unshare su ld ldd tmux vi".split()
    for name, result in zip(names, attack(place, *(f"$(printf {name[:2]}){name[2:]}" for name in names)), strict=True):
        assert result.output == f"bash: line 1: {name}: command not found\n" and result.exit_code == 127
    for result in attack(place, "/usr/bin/python3 -c 1", f"{sys.executable} -c 1", f"env {sys.executable} -c 1",
                         "find / -name 'python*' -not -path '/repo/*' 2>/dev/null | grep python"):
        assert result.exit_code and "No such file" in result.output + "No such file" * (result.exit_code == 1), result
    results = attack(place, "touch /x /bin/x /lib/x /etc/x", "echo bad > /bin/cat", "rm -rf --no-preserve-root / 2>&1",
                     "mv /bin/ls /tmp/ls", "cat /etc/passwd && ls /bin/bash")
    assert all("Read-only file system" in result.output for result in results[:4])
    assert "agent" in results[4].output and "/bin/bash" in results[4].output


def check_execution(place: Place) -> None:
    """A file that a command has written or copied does not run: not as a program, not as a script, not by the loader.
    """
    script = "printf '#!/bin/bash\\necho it runs\\n' > s; chmod +x s; ./s"
    copy = "cp /bin/echo /tmp/e; chmod +x /tmp/e; /tmp/e it runs"
    loader = "cp /bin/echo e; for l in /lib64/ld-* /lib/ld-*; do $l ./e it runs; done"
    for result in attack(place, script, copy, loader, "cp /bin/echo e; env PATH=/repo e it runs"):
        assert "it runs" not in result.output and result.exit_code in (126, 127), result


def check_privileges(place: Place) -> None:
    """A command has no capability, cannot get one, is not root, and cannot raise its limits."""
    status, limit, ids = attack(place, "cat /proc/self/status", "ulimit -u 5000; ulimit -v unlimited", "id -u")
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert f"{name}:\t0000000000000000" in status.output
    assert "NoNewPrivs:\t1" in status.output
    assert limit.output.count("Operation not permitted") == 2 and int(ids.output) != 0


def check_proc_and_devices(place: Place) -> None:
    """/proc shows the sandbox's own processes; its launcher cannot be read, traced or stopped; no device is there."""
    listed, secrets, written, devices, names = attack(
        place, "ls /proc | grep -v '^[0-9]*$' | sort | tr '\\n' ' '; ls -d /proc/[0-9]* | wc -l",
        "cat /proc/1/environ /proc/1/maps /proc/1/mem | head -c 10; ls /proc/1/fd /proc/1/root/ /proc/1/cwd/ | wc -l",
        "for f in sys/kernel/core_pattern sysrq-trigger sys/kernel/hostname 1/oom_score_adj 1/mem 1/attr/current; do "
        "echo x > /proc/$f && echo written $f; done", "ls /dev | sort | tr '\\n' ' '",
        "mknod /tmp/sda b 8 0; cat /dev/mem /dev/sda /dev/vda /dev/kmsg /dev/shm/*; echo x > /dev/shm/x")
    assert listed.output.split()[:2] == ["self", "thread-self"] and int(listed.output.split()[2]) < 12, listed
    assert secrets.output.endswith("\n0\n") and "=" not in secrets.output, secrets
    assert secrets.output.count("Permission denied") >= 3 and "written" not in written.output, (secrets, written)
    assert devices.output.split() == ["fd", "null", "stderr", "stdin", "stdout", "urandom", "zero"]
    assert names.exit_code and names.output.count("No such file") >= 5


def check_environment(place: Place) -> None:
    """Nothing of the environment, the arguments or the open files of the caller is in a command's reach."""
    os.environ["A_SECRET_OF_MINE"] = SECRET
    try:
        with open(place.secret) as held:
            os.set_inheritable(held.fileno(), True)
            results = attack(place, "env; export -p; cat /proc/*/environ; cat /proc/*/cmdline; set",
                             "for f in /proc/self/fd/*; do readlink $f; done; cat <&3 <&4 <&5 <&6 <&7")
    finally:
        del os.environ["A_SECRET_OF_MINE"]
    for result in results:
        assert "SECRET" not in result.output and SECRET not in result.output and "secret.txt" not in result.output
        assert str(place.folder) not in result.output


def check_network(place: Place) -> None:
    """A server of this machine hears nothing, by bash's own sockets or by git."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.05)
        port = server.getsockname()[1]
        results = attack(place, f"echo hello > /dev/tcp/127.0.0.1/{port}", f"echo hello > /dev/udp/127.0.0.1/{port}",
                         f"git clone http://127.0.0.1:{port}/x", f"git clone git://127.0.0.1:{port}/x",
                         "git -c protocol.ext.allow=always clone 'ext::bash -c \"echo hello > /dev/tcp/127.0.0.1/"
                         f"{port}\"' x", seconds=1)
        called = False
        with contextlib.suppress(TimeoutError):
            server.accept()[0].close()
            called = True
    assert not called
    assert all(result.exit_code for result in results)


def check_time(place: Place) -> None:
    """What does not end is ended: asleep, busy, deaf to signals, stopped, or silent with its outputs closed."""
    for command in ("sleep 60", "while :; do :; done", "trap '' TERM INT HUP; sleep 60; sleep 60", "kill -STOP $$",
                    "exec >&- 2>&-; sleep 60", "echo first; sleep 60", "cat /dev/zero > /dev/null | sleep 60"):
        start = time.monotonic()
        (result,) = attack(place, command, seconds=0.2)
        assert result.timed_out and result.exit_code == 137 and time.monotonic() - start < 8, (command, result)
        assert result.output == ("first\n" if "first" in command else "")


def check_output(place: Place) -> None:
    """A long output keeps half its head and half its tail; an endless one ends at once; bytes need not be a text."""
    yes, numbers, short, odd, many = attack(
        place, "yes", "seq 100000", "printf %01000d 7", "printf 'a\\000b\\377c\\xc3'", "yes ünï | head -n 5000",
        output_characters=1000)
    assert yes.truncated and not yes.timed_out and yes.output.startswith("y\ny\n") and len(yes.output) < 1100
    whole = "".join(f"{number}\n" for number in range(1, 100001))
    assert numbers.truncated and numbers.exit_code == 0
    assert numbers.output == (whole[:500] + f"\n\n... (output truncated, {len(whole) - 1000} chars elided) ...\n\n"
                              + whole[-500:])
    assert not short.truncated and short.output == "7".rjust(1000, "0") and odd.output == "a\0b\ufffdc\ufffd"
    assert many.truncated and "\ufffd" not in many.output


def check_background(place: Place) -> None:
    """A command ends when its bash does; what it left in the background ends with it, however it was started."""
    for command in ("sleep 60 &", "setsid sleep 60 & disown", "(trap '' HUP; (sleep 60 & ) & )",
                    "env sleep 60 & exit 0", "bash -c 'exec >&- 2>&-; while :; do sleep 1; done' &", "coproc sleep 60",
                    "sleep 60 | sleep 60 &"):
        start = time.monotonic()
        (result,) = attack(place, f"{command} \n echo done")
        assert time.monotonic() - start < 5 and not result.timed_out
        assert "done" in result.output or "exit 0" in command


def check_processes(place: Place) -> None:
    """No more processes at once than allowed, for root too."""
    refused, allowed = attack(place, "for i in $(seq 40); do sleep 9 & done", "sleep 0.1 | sleep 0.1 | sleep 0.1",
                              processes=20, seconds=1)
    assert "Resource temporarily unavailable" in refused.output and refused.timed_out
    assert allowed.output == "" and allowed.exit_code == 0


def check_fork_bomb(place: Place) -> None:
    """A bomb fills its own namespace, is ended by the clock, and the next command finds an empty place."""
    start = time.monotonic()
    bomb, after = attack(place, "bomb() { bomb | bomb & }; bomb; sleep 60", "echo quiet; ls -d /proc/[0-9]* | wc -l",
                         processes=24, seconds=0.7)
    assert time.monotonic() - start < 15 and (bomb.timed_out or bomb.exit_code), bomb
    assert after.output.startswith("quiet\n") and int(after.output.split()[1]) < 6


def check_signals(place: Place) -> None:
    """The launcher shares its namespace with the commands, and no signal of theirs reaches it."""
    results = attack(place, "kill -9 -1", *(f"kill -{name} 1" for name in ("9", "TERM", "INT", "STOP", "SEGV", "USR1")),
                     "echo still here")
    assert results[-1].output == "still here\n"


def check_disk(place: Place) -> None:
    """One file, all files and their number are bounded; what fits comes back."""
    limits = {"file_bytes": 2 * MEGABYTE, "disk_bytes": 8 * MEGABYTE}
    one, many = attack(place, "head -c 30M /dev/zero > big; stat -c %s big",
                       "for i in 1 2 3 4 5 6 7 8 9; do head -c 1500K /dev/zero > /tmp/f$i || echo full; done", **limits)
    assert str(2 * MEGABYTE) in one.output and "full" in many.output
    assert (place.worktree / "big").stat().st_size == 2 * MEGABYTE
    (result,) = attack(place, "seq 3000 | xargs touch; ls | wc -l", disk_files=500)
    assert "No space left" in result.output and 100 < int(result.output.split()[-1]) < 500
    assert len(list(place.worktree.iterdir())) < 500


def check_memory(place: Place) -> None:
    """A process that asks for too much gets an error, not the machine's memory."""
    (result,) = attack(place, "x=$(head -c 200M /dev/zero | tr '\\0' a); echo ${#x}", memory_bytes=64 * MEGABYTE)
    assert "cannot allocate" in result.output or result.exit_code > 1, result


def check_git(place: Place) -> None:
    """Hooks, settings and nested repositories of a command's making stay inside; git outside runs none of them."""
    mark = place.outside / "mark"
    evil = f"touch {mark} /tmp/mark; echo ran"
    settings = ("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "diff.external", "alias.status",
                "filter.x.smudge", "filter.x.clean", "credential.helper")
    attack(place, *(f"git config {name} '!{evil}'" for name in settings),
           f"mkdir -p .git/hooks sub/.git; printf '#!/bin/sh\\n{evil}' | tee .git/hooks/post-checkout "
           ".git/hooks/post-index-change .git/hooks/pre-commit > sub/.git/config; chmod +x .git/hooks/*",
           "git config core.hooksPath /repo/.git/hooks; git config --global core.fsmonitor 'touch mark'",
           "mkdir -p .GIT new/.git; cp .git/config .GIT/config; cp .git/config new/.git/config; git init -q nested",
           "echo '* filter=x diff=x' > .gitattributes; git checkout . ; git commit -qam more; git gc -q; git log")
    assert not (place.worktree / "sub").exists() and not (place.worktree / "nested").exists()
    assert not (place.worktree / ".GIT").exists() and not (place.worktree / "new").exists()
    place.git("status")
    place.git("diff")
    place.git("add", "-A")
    assert not mark.exists() and place.git("log", "--oneline").count("\n") == 1


def check_names(place: Place) -> None:
    """Odd names, deep folders, pipes, bits and locked folders neither break the way back nor leave the worktree."""
    long = "n" * 250
    with tarfile.open(place.worktree / "odd.tar", "w") as archive:  # there is no mkfifo inside, but there is tar
        for name, kind in (("pipe", tarfile.FIFOTYPE), ("disk", tarfile.BLKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            archive.addfile(entry)
    attack(place, r"printf 1 > $'new\nline'; printf 2 > $'by\xffte'; printf 3 > -rf; printf 4 > '...'",
           f"printf 5 > 'a b'; printf 6 > {long}; tar xf odd.tar; test -p pipe && rm odd.tar",
           "printf 7 > set; chmod 6755 set; printf 8 > locked; chmod 0 locked",
           "mkdir shut; printf 9 > shut/in; chmod 0 shut; mkdir empty",
           "deep=$(printf 'd/%.0s' $(seq 700)); mkdir -p $deep; printf x > ${deep}file",
           "deep=e/$(printf 'f/%.0s' $(seq 40)); mkdir -p $deep; printf y > ${deep}file")
    found = {path: mode & 0o7777 for path, (mode, _) in place.snapshot(place.worktree).items()
             if mode & 0o170000 == 0o100000 and not path.startswith(".git/")}
    assert set(found) == {"sums.py", "new\nline", "by\udcffte", "-rf", "...", "a b", long, "set", "locked", "shut/in",
                          "e/" + "f/" * 40 + "file"}, sorted(found)
    assert found["set"] == 0o755 and found["locked"] == 0o600
    assert not (place.worktree / "pipe").exists() and not (place.worktree / "disk").exists()


def check_end_of_caller(place: Place) -> None:
    """When the process that opened a sandbox is killed, the sandbox ends, also in the middle of a command."""
    text = ("import pathlib; from labkit.tasks import sandbox; from labkit.tasks.sandbox import Sandbox\n"
            "sandbox.LAUNCHER = sys.argv[3]\nwith Sandbox(pathlib.Path(sys.argv[1])) as s:\n"
            " print(s.launcher.pid, flush=True); s.run('sleep 60')")
    stub = "import sys, types; m = types.ModuleType('labkit.tasks'); m.__path__ = [sys.argv[2]]; " \
           "sys.modules['labkit.tasks'] = m\n"
    tasks = Path(sandbox.__file__).parent
    caller = subprocess.Popen([sys.executable, "-c", stub + text, place.worktree, tasks, sandbox.LAUNCHER],
                              stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tasks.parent.parent)})
    try:
        launcher = int(caller.stdout.readline())
        time.sleep(0.2)
        inside = descendants(launcher)
        assert len(inside) >= 2
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        caller.stdout.close()
    assert gone(inside | {launcher}), "the sandbox outlives its caller"


CHECKS = {name.removeprefix("check_"): check for name, check in globals().copy().items() if name.startswith("check_")}


def main(folder: str) -> None:
    """Every check, each in a folder of its own, four at a time since they wait; prints the names of those that passed.
    """
    places = {name: Place(Path(folder) / name) for name in CHECKS}
    with ThreadPoolExecutor(4) as pool:
        passed = {name: pool.submit(check, places[name]) for name, check in CHECKS.items()}
    for name, future in passed.items():
        future.result()
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
