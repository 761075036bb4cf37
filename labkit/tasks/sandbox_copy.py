"""A worktree as bytes: what goes into a sandbox, and what may come back.

A sandbox works on a copy, so a worktree on the disk is never in reach of a command. What comes back is a list of plain
files, and it is written here with care, since a command has chosen the names and the contents:

    plain files only    a link could point out of the worktree, and a later reader would follow it
    no ".git"           hooks and settings in it (core.fsmonitor, aliases) would run at somebody's next `git status`
    inside only         no "..", no absolute path, and no folder on the way that is a link
"""

import os
from pathlib import Path

from labkit.errors import LabError

File = tuple[str, int, bool, bytes]  # path in the worktree, mode, whether it is a link, content or the link's target


def read_tree(worktree: Path, most_bytes: int) -> list[File]:
    """Every file and link of a worktree, that of `.git` included; LabError if it is larger than `most_bytes`."""
    files, total = [], 0
    for folder, folders, names in os.walk(worktree):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in names + links:
            path = Path(folder, name)
            is_link = path.is_symlink()
            if not is_link and not path.is_file():
                continue  # a socket, a pipe or a device has no content to copy
            try:
                content = os.fsencode(os.readlink(path)) if is_link else path.read_bytes()
            except OSError as error:
                raise LabError(f"{path} cannot be read ({error.strerror}).", "Make it readable first.") from None
            total += len(content)
            files.append((str(path.relative_to(worktree)), path.lstat().st_mode & 0o777, is_link, content))
            if total > most_bytes:
                raise LabError(f"{worktree} holds more than the {most_bytes} bytes that its sandbox may hold.",
                               "Give the sandbox a larger disk_bytes, or a smaller worktree.")
    return files


def is_inside(path: str) -> bool:
    """Whether a path that came back may be written: relative, without a step up, and none of git's own files."""
    parts = path.split("/")
    return bool(path) and "\0" not in path and not any(
        part in ("", ".", "..") or part.lower() == ".git" for part in parts)


def real_folder(worktree: Path, path: str) -> Path:
    """The folder of `path`, made where it is missing; what stands in its way and is no folder of its own is removed."""
    folder = worktree
    for part in Path(path).parts[:-1]:
        folder = folder / part
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        folder.mkdir(exist_ok=True)
    return folder


def write_changes(worktree: Path, before: list[File], after: dict[str, tuple[int, bytes]]) -> list[str]:
    """Write the plain files that changed, remove those that are gone, and return the paths of both, sorted."""
    after = {path: file for path, file in after.items() if is_inside(path)}
    old = {path: (mode, content) for path, mode, is_link, content in before if not is_link and is_inside(path)}
    gone = [path for path in old if path not in after]
    changed = [path for path, file in after.items() if old.get(path) != file]
    for path in gone:
        remove(worktree, path)
    for path in changed:
        mode, content = after[path]
        target = real_folder(worktree, path) / Path(path).name
        if target.is_symlink() or not target.is_dir():
            target.unlink(missing_ok=True)  # a link is replaced, not followed
            target.write_bytes(content)
            target.chmod(mode & 0o777 | 0o600)  # no setuid, and nothing its owner cannot read or remove
    return sorted(gone + changed)


def remove(worktree: Path, path: str) -> None:
    """Remove one file and the folders that it leaves empty."""
    target = worktree / path
    target.unlink(missing_ok=True)
    for folder in target.parents:
        if folder == worktree or any(folder.iterdir()):
            return
        folder.rmdir()
