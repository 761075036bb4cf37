"""What the gates of `make lint` share: which files are meant, and how their problems are told.

A gate is a function from a file to sentences, each with the file's name in front.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from labkit.errors import LabError


def run_gate(arguments: Sequence[str], problems_of: Callable[[Path], Iterable[str]], summary: str, *,
             endings: Sequence[str] = ("*.ipynb",)) -> int:
    """Check files, and of folders those with the endings; prints what is wrong and `summary`, returns the exit status.

    `summary` has a place for the number of files, {files}; the number of problems is added. A LabError is a problem.
    """
    paths = [path for name in arguments for path in
             ([each for ending in endings for each in sorted(Path(name).glob(ending))] if Path(name).is_dir()
              else [Path(name)])]
    try:
        if not paths:
            raise LabError(f"No file was found in {', '.join(arguments) or 'nothing'}.", "Name files or folders.")
        problems = [problem for path in paths for problem in problems_of(path)]
    except LabError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{summary.format(files=len(paths))}, {len(problems)} problems")
    return 1 if problems else 0
