"""The process that a sandbox is: it shuts itself into a root of its own, then runs one command after another there.

A program of its own (`python -I -S sandbox_launcher.py`, with nothing of labkit imported), since a process with threads
cannot enter a user namespace. What it does, in order, and what each step is for:

    user namespace       the right to do the rest without being root. Who is root is nobody (65534) inside: files such
                         as /proc/sys/kernel/core_pattern ask for root's id alone, and process limits spare that id
    mount namespace      a root on tmpfs: the allowed programs and their libraries, read-only, and nothing else of the
                         machine; /repo holds a copy of the worktree, /tmp is empty; both of a fixed size, and noexec:
                         no file that a command has written can be executed
    pid namespace        this process is number 1 in it, so that kill(-1) reaches everything that a command has started
    net, ipc, uts        no network but an unconnected loopback; no queues, no shared memory, no host name of others
    commands             no capabilities (they are lost in exec), no_new_privs, resource limits, a session of their own

Requests come on stdin and answers go to stdout: four bytes of length, a dictionary of that length (marshal on the way
in; on the way out a Python literal, which can be read without trust), then as many bytes as its "sizes" add up to: the
contents of files, or an output. The end of stdin ends everything. json would take longer to import than all the rest.
"""

import ctypes
import marshal
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator

NOBODY, PROGRAMS, EPOCH = 65534, "/bin", 1_700_000_000  # EPOCH: one time for all files, so that listings repeat
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000  # from linux/sched.h
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18  # linux/mount.h
MNT_DETACH, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 2, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
SYS_MOUNT_SETATTR = 442  # on every architecture
CHUNK, MOST_PATH = 1 << 16, 1024
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments) -> None:
    """A function of libc; a failure becomes an OSError that names it."""
    if getattr(LIBC, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2), its target named in the error."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    try:
        call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    except OSError as error:
        raise OSError(error.errno, f"mount of {source} on {target}: {os.strerror(error.errno)}") from None


def read_exactly(count: int) -> bytes:
    """`count` bytes from stdin; their end ends this process, and with it everything inside."""
    parts, missing = [], count
    while missing:
        part = os.read(0, missing)
        if not part:
            os._exit(0)
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def receive() -> tuple[dict, bytes]:
    """The next request and the bytes that follow it."""
    header = marshal.loads(read_exactly(struct.unpack("<I", read_exactly(4))[0]))
    return header, read_exactly(sum(header.get("sizes", ())))


def send(header: dict, *contents: bytes) -> None:
    """One answer."""
    text = ascii(header | {"sizes": [len(content) for content in contents]}).encode()
    data = memoryview(b"".join((struct.pack("<I", len(text)), text, *contents)))
    while data:
        data = data[os.write(1, data):]


def map_ids(process: int, user: int, group: int) -> None:
    """Give a process's new user namespace the two ids it will have, which are the same outside."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/{process}/{name}", "w", encoding="ascii") as file:
            file.write(text)


def enter_namespaces() -> None:
    """All six, as nobody where this is root; the pid namespace begins with the next child."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        user = group = NOBODY
        try:
            os.setgroups([])
        except PermissionError as error:
            raise OSError(error.errno, "this root cannot become nobody") from None
    outside, ready = os.getpid(), os.pipe()
    helper = os.fork()  # only a process outside may map an id that is not its own
    if helper == 0:
        os.close(ready[1])
        os.read(ready[0], 1)
        try:
            map_ids(outside, user, group)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    try:
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    finally:
        os.close(ready[0])
        os.close(ready[1])
    failure = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if failure:
        raise OSError(failure, f"ids of the user namespace: {os.strerror(failure)}")
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)


def fork_first_process() -> None:
    """Return in the first process of the pid namespace; the one outside waits for it, and they end together."""
    child = os.fork()
    if child:
        os._exit(0 if os.waitpid(child, 0)[1] == 0 else 1)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def bind(source: str, target: str) -> None:
    """Show a file of the machine at a place of the new root."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(source, target, None, MS_BIND)


def build_root(root: str, setup: dict) -> None:
    """Programs, libraries, devices and an /etc of three lines, all of it read-only in the end."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=2000,mode=755")
    devices = [(f"/dev/{name}", f"/dev/{name}") for name in ("null", "zero", "urandom")]
    for source, target in [*setup["binds"], *devices]:
        bind(source, root + target)
    for target, link in setup["links"]:
        os.symlink(target, root + link)
    for name in ("repo", "tmp", "proc", "etc"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name, text in (("passwd", f"agent:x:{os.getuid()}:{os.getgid()}::/tmp:/bin/bash\n"),
                       ("group", f"agent:x:{os.getgid()}:\n")):
        with open(f"{root}/etc/{name}", "w", encoding="ascii") as file:
            file.write(text)
    attributes = struct.pack("<4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_long(-1), root.encode(), ctypes.c_long(AT_RECURSIVE),
         attributes, ctypes.c_long(len(attributes)))


def enter_root(root: str, setup: dict) -> None:
    """Add what is writable, make it the root, and let go of the machine's."""
    for name in ("repo", "tmp"):
        mount("tmpfs", f"{root}/{name}", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
              f"size={setup['disk_bytes']},nr_inodes={setup['disk_files']},mode=755")
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("syscall", ctypes.c_long(SYS_PIVOT_ROOT[os.uname().machine]), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/repo")
    with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")  # a namespace of its own would give a command the rights back that it lost
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")  # processes, and not the machine's
    call("sethostname", b"sandbox", 7)


def write_tree(header: dict, content: bytes) -> None:
    """The files and links of the worktree, as copies."""
    begin = 0
    for (path, mode, is_link), size in zip(header["files"], header["sizes"], strict=True):
        data, begin = content[begin : begin + size], begin + size
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if is_link:
            os.symlink(data, path)
            continue
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, mode)
        os.utime(path, (EPOCH, EPOCH))


def walk_tree() -> Iterator[tuple[str, int, bytes]]:
    """Path, mode and content of every plain file below /repo, but for what git keeps for itself."""
    for folder, folders, names in os.walk("."):
        folders[:] = [name for name in folders if name.lower() != ".git"]
        for name in names:
            path = os.path.join(folder, name)[2:]
            status = os.lstat(path)
            if status.st_mode & 0o170000 == 0o100000 and name.lower() != ".git" and len(path) < MOST_PATH:
                with open(path, "rb") as file:
                    yield path, status.st_mode & 0o777, file.read()


def become_command(command: str, output: int, setup: dict) -> None:
    """In the child: limits, no way to more rights, its own session, then bash. Does not return."""
    limits = setup["limits"]
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for signal_number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores both, and exec would hand that on
        signal.signal(signal_number, signal.SIG_DFL)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.execve(f"{PROGRAMS}/bash", ["bash", "-c", command], setup["environment"])


class Output:
    """The first and the last `keep` bytes of what a command has written, and how many there were."""

    def __init__(self, keep: int):
        self.keep, self.head, self.tail, self.total = keep, b"", b"", 0

    def add(self, part: bytes) -> None:
        room = self.keep - len(self.head)
        self.head += part[:room]
        self.tail = (self.tail + part[room:])[-self.keep :]
        self.total += len(part)


def watch(process: int, reader: int, seconds: float, setup: dict) -> tuple[Output, bool]:
    """Read until bash ends, time runs out or the output is too long; then nothing of the command is left."""
    output, watcher = Output(setup["keep_bytes"]), os.pidfd_open(process)
    poll, end = select.poll(), time.monotonic() + seconds
    for source, events in ((reader, select.POLLIN), (watcher, select.POLLIN), (0, 0)):
        poll.register(source, events)
    running, timed_out = True, False
    while running:
        ready = dict(poll.poll(max(0.0, end - time.monotonic()) * 1000))
        if 0 in ready:  # who asked is gone
            os._exit(0)
        if reader in ready:
            part = os.read(reader, CHUNK)
            output.add(part)
            if not part:  # closed by hand; bash may go on
                poll.unregister(reader)
        timed_out = time.monotonic() >= end
        running = watcher not in ready and not timed_out and output.total <= setup["output_bytes"]
    os.close(watcher)
    return output, timed_out


def end_all(process: int) -> int:
    """Kill everything but this process, wait until it is gone, and return how bash ended."""
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass
    code = 0
    while True:
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code if code >= 0 else 128 - code
        if ended == process:
            code = os.waitstatus_to_exitcode(status)


def run(command: str, seconds: float, setup: dict) -> None:
    """One command, from its start to its answer."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            become_command(command, writer, setup)
        finally:
            os._exit(126)
    os.close(writer)
    output, timed_out = watch(process, reader, seconds, setup)
    code = end_all(process)
    while output.total <= setup["output_bytes"]:
        part = os.read(reader, CHUNK)  # what was written before the end; nobody is left who could write more
        if not part:
            break
        output.add(part)
    os.close(reader)
    send({"exit_code": code, "timed_out": timed_out, "total": output.total}, output.head, output.tail)


def main() -> None:
    """Set up, say so, and serve."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_DFL)
    os.umask(0o022)
    setup, _ = receive()
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # if memory runs out, it is this one's fault
        enter_namespaces()
        fork_first_process()
        build_root("/tmp", setup)
        enter_root("/tmp", setup)
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # a command has the same id: it must not read or trace this one
        write_tree(*receive())
    except (OSError, KeyError) as error:
        send({"problem": str(error)})
        os._exit(1)
    send({"problem": None})
    while True:
        request, _ = receive()
        if "command" in request:
            run(request["command"], request["seconds"], setup)
        else:
            files = list(walk_tree())
            send({"files": [[path, mode] for path, mode, _ in files]}, *(content for *_, content in files))


if __name__ == "__main__":
    sys.setrecursionlimit(10_000)
    main()
