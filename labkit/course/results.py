"""Reading the shipped results: data/results/<scale>/NN.json, and data/results/workstation/<device>/NN.json for GPUs.

labkit/course/record.py writes them: {notebook, scale, device, commit, versions, seeds, seconds, peak_gb, rows}. A row
is {id, ours, baseline, seeds}: what was measured, and no verdict. Estimate, interval and verdict are computed from the
claim's rule each time a file is read, so that a file can't contradict its rule.
"""

import json
from pathlib import Path

from labkit.course.scale import SCALES
from labkit.errors import LabError
from labkit.files import DATA

RESULTS = DATA / "results"
FIELDS = {"notebook", "scale", "device", "commit", "versions", "seeds", "seconds", "peak_gb", "rows"}
ROW_FIELDS = {"id", "ours", "baseline"}


def read_results(root: Path | None = None) -> list[dict]:
    """Every NN.json under the root, by scale, device and notebook; seeds are whole numbers again."""
    root = Path(root or RESULTS)
    paths = [path for scale in SCALES for path in sorted((root / scale).rglob("[0-9][0-9].json"))]
    return [read_result(path) for path in paths]


def read_result(path: Path) -> dict:
    """One NN.json, checked. Raises LabError naming the file and what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(path, f"can't be read ({error})") from error
    if missing := FIELDS - set(result if isinstance(result, dict) else ()):
        raise _broken(path, f"lacks {', '.join(sorted(missing))}")
    if result["scale"] not in path.parts or result["notebook"] != path.stem:
        raise _broken(path, f"says notebook {result['notebook']}, scale {result['scale']}, and lies in another place")
    for row in result["rows"]:
        if missing := ROW_FIELDS - set(row):
            raise _broken(path, f"has a row without {', '.join(sorted(missing))}")
        row["ours"], row["baseline"] = _by_seed(row["ours"]), _by_seed(row["baseline"])
    return result


def _broken(path: Path, problem: str) -> LabError:
    fix = f"Restore it with `git checkout -- {path}`, or make it again with `labkit run {path.stem}`."
    return LabError(f"The results file {path} {problem}.", fix)


def _by_seed(arm: object) -> object:
    """JSON turns the keys of a mapping into texts; seeds are whole numbers."""
    return {int(seed): value for seed, value in arm.items()} if isinstance(arm, dict) else arm
