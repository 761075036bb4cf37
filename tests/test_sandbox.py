"""The sandbox holds hostile commands: as whoever runs the tests, as an ordinary user, and with faults planted it fails.

The commands are in sandbox_checks.py. Each check compares everything outside with a snapshot and looks for processes
that are left, so a hole that a command uses fails it; the planted faults show that each wall is one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sandbox_checks
from planted import altered
from sandbox_checks import CHECKS, Place, attack

from labkit.errors import LabError
from labkit.tasks import sandbox, sandbox_copy, sandbox_programs
from labkit.tasks.sandbox import Sandbox, sandbox_problem, shorten
from labkit.tasks.sandbox_copy import is_inside, read_tree, write_changes

works = pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox here: {sandbox_problem()}")
ORDINARY = 12345
# labkit.tasks itself would import torch, which the other Python may not have
WITHOUT_TORCH = ("import sys, types\nmodule = types.ModuleType('labkit.tasks')\nmodule.__path__ = [sys.argv.pop(1)]\n"
                 "sys.modules['labkit.tasks'] = module\nimport sandbox_checks\nsandbox_checks.main(sys.argv[1])")


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path / "place")


@works
@pytest.mark.parametrize("name", CHECKS)
def test_hostile_commands_stay_inside(place, name):
    """Each check asserts what its commands may do, that nothing outside changed, and that no process is left."""
    CHECKS[name](place)


def ordinary_python() -> str | None:
    """A Python of 3.11 or later that an ordinary user can start; the one of the tests may be in root's home."""
    for python in dict.fromkeys([sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")]):
        code = "import sys; sys.exit(sys.version_info < (3, 11))"
        try:
            done = subprocess.run([python, "-I", "-c", code], user=ORDINARY, group=ORDINARY, extra_groups=[], cwd="/",
                                  capture_output=True, timeout=20)
        except (OSError, TypeError):
            continue
        if done.returncode == 0:
            return python
    return None


@works
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user already")
def test_hostile_commands_of_an_ordinary_user_stay_inside():
    """All checks pass for a user without any right, so none of the walls needs root."""
    python, tests = ordinary_python(), Path(__file__).parent
    if python is None:
        pytest.skip("no Python here that an ordinary user can start")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        copy, home = Path(folder, "copy"), Path(folder, "home")  # the checkout may be closed to others, too
        shutil.copytree(tests.parent / "labkit/tasks", copy / "labkit/tasks", ignore=shutil.ignore_patterns("__py*"))
        for name in ("__init__.py", "errors.py"):
            shutil.copy(tests.parent / "labkit" / name, copy / "labkit" / name)
        shutil.copy(tests / "sandbox_checks.py", copy)
        home.mkdir()
        os.chown(home, ORDINARY, ORDINARY)
        done = subprocess.run([python, "-c", WITHOUT_TORCH, copy / "labkit/tasks", home], user=ORDINARY, group=ORDINARY,
                              extra_groups=[], cwd=home, capture_output=True, text=True, timeout=120,
                              env={"PATH": os.environ["PATH"], "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.stdout.split() == list(CHECKS), done.stderr[-2000:]


PLANTS = [  # (the check that must notice, what stands in the launcher, what stands there instead)
    ("network", " | CLONE_NEWNET |", " |"),
    ("processes", 'for name, value in limits.items():', 'for name, value in ():'),
    ("background", "os.kill(-1, signal.SIGKILL)", "return 0"),
    ("execution", 'MS_NODEV | MS_NOEXEC,\n              f"size', 'MS_NODEV,\n              f"size'),
    ("proc_and_devices", ', "subset=pid")', ")"),
    ("privileges", 'call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)', "pass"),
    ("programs", 'call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR)', 'len((SYS_MOUNT_SETATTR)'),
    ("time", "code if code >= 0 else 128 - code", "code"),
    ("environment", 'setup["environment"])', 'dict(os.environ, SECRET="x"))'),
    ("output", "self.total += len(part)", "self.total += len(part[room:])"),
    ("disk", 'f"size={setup[\'disk_bytes\']},nr_inodes={setup[\'disk_files\']},mode=755"', '"mode=755"'),
    ("names", "len(path) < MOST_PATH", "True"),
    ("links", "status.st_mode & 0o170000 == 0o100000", "True"),
    ("signals", "signal.signal(signal_number, signal.SIG_DFL)\n    os.umask", "pass\n    os.umask"),
    ("end_of_caller", "if 0 in ready:", "if 7 in ready:"),
]


@works
@pytest.mark.parametrize(("name", "old", "new"), PLANTS, ids=[f"{plant[0]}-{i}" for i, plant in enumerate(PLANTS)])
def test_a_launcher_with_a_hole_is_noticed(place, tmp_path, monkeypatch, name, old, new):
    """With one line of the launcher altered its check fails: no check passes for another reason than its wall."""
    text = sandbox.LAUNCHER.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the launcher"
    holed = tmp_path / "launcher.py"
    holed.write_text(text.replace(old, new))
    monkeypatch.setattr(sandbox, "LAUNCHER", holed)
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(sandbox_checks, "ROOMY", {"seconds": 1})
    monkeypatch.setattr(sandbox_checks, "PATIENCE", 1)
    with pytest.raises((AssertionError, LabError)):
        CHECKS[name](place)


@pytest.mark.parametrize(("name", "function", "old", "new"), [
    ("git", "is_inside", 'or part.lower() == ".git"', ""),
    ("links", "write_changes", "real_folder(worktree, path) / Path(path).name", "worktree / path"),
    ("links", "write_changes", "target.unlink(missing_ok=True)", "pass"),
    ("names", "write_changes", "mode & 0o777 | 0o600", "mode & 0o777"),
    ("ordinary_work", "remove", "folder.rmdir()", "pass"),
])
@works
def test_a_way_back_with_a_hole_is_noticed(place, monkeypatch, name, function, old, new):
    """The same for what writes the files of a sandbox into the worktree: two walls keep .git, so both are taken."""
    right = getattr(sandbox_copy, function)
    monkeypatch.setattr(sandbox_copy, function, altered(right, function, old, new, vars(sandbox_copy).copy()))
    monkeypatch.setattr(sandbox, "write_changes", sandbox_copy.write_changes)
    if function == "is_inside":
        text = sandbox.LAUNCHER.read_text().replace('if name.lower() != ".git"]', "]")
        (place.folder / "launcher.py").write_text(text)
        monkeypatch.setattr(sandbox, "LAUNCHER", place.folder / "launcher.py")
    with pytest.raises((AssertionError, LabError, subprocess.CalledProcessError)):
        CHECKS[name](place)


@pytest.mark.parametrize("path", ["", ".", "..", "/etc/passwd", "a/../b", "a//b", "./a", "a/.", "a/..", "../../x",
                                  "a\0b", ".git/config", "a/.GIT/x"])
def test_no_such_path_comes_back(tmp_path, path):
    """Whatever the other side says, only names inside are written: the launcher is not trusted with the way out."""
    assert not is_inside(path)
    (tmp_path / "worktree").mkdir()
    assert write_changes(tmp_path / "worktree", [], {path: (0o644, b"bad")}) == []
    assert [found.name for found in tmp_path.rglob("*")] == ["worktree"]


def test_the_way_back_writes_what_changed_and_no_more(tmp_path):
    """Changed, new and removed files, and a folder and a file that changed places; an unchanged file is not touched."""
    for name in ("same", "changed", "gone", "folder/file", "file", "deep/er/gone"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    before, time = read_tree(tmp_path, 1000), (tmp_path / "same").stat().st_mtime_ns
    after = {"same": (0o644, b"old"), "changed": (0o755, b"new"), "folder": (0o644, b"now a file"),
             "file/inside": (0o644, b"now a folder")}
    for name in ("same", "changed", "folder"):
        after[name] = (before[0][1] if name == "same" else after[name][0], after[name][1])
    assert write_changes(tmp_path, before, after) == ["changed", "deep/er/gone", "file", "file/inside", "folder",
                                                      "folder/file", "gone"]
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"same": "old", "changed": "new", "folder": "now a file", "file/inside": "now a folder"}
    assert (tmp_path / "same").stat().st_mtime_ns == time and os.access(tmp_path / "changed", os.X_OK)


def test_shorten_keeps_half_the_head_and_half_the_tail():
    """By hand, with an odd number, none, and one that is not exceeded."""
    assert shorten("abcdefgh", 8) == "abcdefgh" and shorten("", 0) == ""
    assert shorten("abcdefgh", 5) == "abc\n\n... (output truncated, 3 chars elided) ...\n\ngh"
    assert shorten("abcd", 0) == "\n\n... (output truncated, 4 chars elided) ...\n\n"
    assert shorten("abcd", 4, elided=10) == "ab\n\n... (output truncated, 10 chars elided) ...\n\ncd"


@works
def test_nothing_comes_back_from_a_block_that_fails(place):
    """An error in the block, Ctrl-C too, ends the sandbox and leaves the worktree as it was."""
    before = place.snapshot(place.worktree)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), Sandbox(place.worktree) as shell:
            shell.run("rm -rf *")
            inside = sandbox_checks.descendants(shell.launcher.pid)
            raise error
        assert inside and sandbox_checks.gone(inside) and place.snapshot(place.worktree) == before


@works
def test_a_launcher_that_dies_or_hangs_is_reported(place, monkeypatch):
    """One sentence, no waiting for ever, and the worktree as it was."""
    before = place.snapshot(place.worktree)
    with pytest.raises(LabError, match="has ended"), Sandbox(place.worktree) as shell:
        shell.run("echo changed > sums.py")
        shell.launcher.kill()
        for _ in range(100):  # the process inside ends a moment later, and may still answer
            shell.run("echo")
            time.sleep(0.02)
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", -8)
    with pytest.raises(LabError, match="hangs"), Sandbox(place.worktree, seconds=8.2) as shell:
        shell.run("sleep 3")
    assert place.snapshot(place.worktree) == before


def test_bad_settings_are_refused_in_a_sentence(tmp_path, place):
    """Limits of nothing, no folder, a worktree that is too large, a sandbox that is not open."""
    for limits in ({"seconds": 0}, {"output_characters": -1}, {"processes": 0}, {"disk_bytes": 0}, {"disk_files": 0}):
        with pytest.raises(LabError, match="limit of nothing"):
            Sandbox(place.worktree, **limits)
    with pytest.raises(LabError, match="is no folder"):
        Sandbox(tmp_path / "none")
    with pytest.raises(LabError, match="holds more than the 10 bytes"), Sandbox(place.worktree, disk_bytes=10):
        pass
    with pytest.raises(LabError, match="not open"):
        Sandbox(place.worktree).run("ls")


@works
def test_a_null_character_is_an_answer_and_no_command(place):
    """exec would cut the command there."""
    (result,) = attack(place, "echo a\0; echo b")
    assert result.exit_code == 126 and "null character" in result.output


def test_without_namespaces_nothing_runs(place, tmp_path, monkeypatch):
    """No Linux, a kernel that refuses, a missing program: each is a sentence with the fix, and no command runs."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(LabError, match=r"on darwin.*Linux machine"), Sandbox(place.worktree):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "sandbox_files", sandbox.sandbox_files.__wrapped__)
        patch.setattr(sandbox_programs, "FOLDERS", (str(tmp_path),))
        with pytest.raises(LabError, match=r"needs bash.*apt install"), Sandbox(place.worktree):
            pass
    refusing = tmp_path / "launcher.py"
    refusing.write_text(sandbox.LAUNCHER.read_text().replace(
        "MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096,", "MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 30,"))
    monkeypatch.setattr(sandbox, "LAUNCHER", refusing)
    with pytest.raises(LabError, match=r"does not let a sandbox be made .*so no command is run"), \
            Sandbox(place.worktree):
        pass
    sandbox_problem.cache_clear()
    try:
        assert "does not let a sandbox be made" in sandbox_problem()
    finally:
        sandbox_problem.cache_clear()


@works
def test_a_second_sandbox_sees_nothing_of_the_first(place):
    """/tmp, /repo and shared files are each sandbox's own, also at the same time."""
    with Sandbox(place.worktree) as one, Sandbox(place.worktree) as two:
        one.run("echo one > /tmp/x; echo one > x; sleep 0 &")
        assert two.run("ls /tmp /repo").output == "/repo:\nsums.py\n\n/tmp:\n"
        assert one.run("cat /tmp/x x").output == "one\none\n"


@works
def test_the_worktree_can_be_brought_up_to_date_in_between(place):
    """Also for a file that was changed, brought back, and then changed back."""
    with Sandbox(place.worktree) as shell:
        before = (place.worktree / "sums.py").read_text()
        shell.run("cp sums.py /tmp; echo changed > sums.py")
        assert shell.write_back() == ["sums.py"] and (place.worktree / "sums.py").read_text() == "changed\n"
        shell.run("cp /tmp/sums.py .")
    assert (place.worktree / "sums.py").read_text() == before
