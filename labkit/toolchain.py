"""The C compiler that Triton uses: it builds the host's side of every kernel launch with it, on the machine at hand."""

import os
import shutil


def c_compiler() -> str | None:
    """The command that Triton would call (CC, gcc or clang), or None."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
