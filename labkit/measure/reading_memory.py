"""Does memory stay flat when rows of agent traces are read? Measured in a process of its own, on rows of real length.

    peak of a survey of n rows - memory before it,   at n and at 10 n: a reader that holds a batch gives the same twice

Real traces of this kind hold 62 KB of JSON; `long_rows` makes rows of that length, of words in random order, so that
they compress about as text does. A file can be read many times under other names (hard links), so ten gigabytes of rows
need a tenth of that on the disk.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from labkit.data.trajectories import BATCH_ROWS, EXIT_STATUSES, FORMAT, arrow, load_trajectories, write_trajectories
from labkit.data.trajectory_survey import survey
from labkit.errors import LabError
from labkit.measure.memory import peak_gigabytes


@dataclass(frozen=True)
class Reading:
    """One survey of a source: rows, bytes of text, seconds, memory before and the rise of the peak, in megabytes."""

    rows: int
    text_bytes: int
    seconds: float
    before_mb: float
    rise_mb: float


def long_rows(count: int, *, turns: int = 15, characters: int = 1_300, seed: int = 0) -> Iterator[dict]:
    """`count` rows of `turns` turns with observations of about `characters` each; every tenth is finished."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz_."))
    vocabulary = ["".join(generator.choice(letters, generator.integers(2, 12))) for _ in range(5_000)]
    pool = " ".join(generator.choice(vocabulary, 200_000))
    for number in range(count):
        start_M = generator.integers(0, len(pool) - 2 * characters, 2 * turns + 2)
        texts = [pool[start : start + characters * (1 + place % 2)] for place, start in enumerate(start_M)]
        roles = ["system", *["user", "assistant"] * turns, "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        yield {"instance_id": f"owner__project-{number // 100}", "repo": f"owner/project{number // 4_000}",
               "messages": messages, "trajectory_format": FORMAT, "duration_sec": float(number % 300),
               "exit_status": EXIT_STATUSES[number % 10 > 0]}


def many_files(folder: Path, rows: int, counts: Sequence[int]) -> list[Path]:
    """For each of `counts` a folder with that many names of one file of `rows` long rows."""
    file = Path(folder) / "rows.parquet"
    write_trajectories(file, long_rows(rows))
    places = [Path(folder) / f"times-{count}" for count in counts]
    for place, count in zip(places, counts, strict=True):
        place.mkdir()
        for name in range(count):
            os.link(file, place / f"{name:04}.parquet")
    return places


def read_in_own_process(source: str | Path, *, batch_rows: int = BATCH_ROWS, whole: bool = False) -> Reading:
    """Survey a source in a fresh Python process and report its memory; `whole` loads the table first, for comparison.

    Raises LabError where that process fails, with its last line.
    """
    code = f"from labkit.measure.reading_memory import report; report({str(source)!r}, {batch_rows}, {whole})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"The reading process failed: {last}.", "Read the source in this process to see more.")
    return Reading(**json.loads(done.stdout))


def held_megabytes() -> tuple[float, float]:
    """What this process holds now and has held at most, in megabytes.

    From Linux's own counts: getrusage's peak begins with that of the process that started this one. Where there are
    none (macOS) both are getrusage's.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return (peak_gigabytes(torch.device("cpu")) * 1e3,) * 2
    kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB$", status.read_text(), re.MULTILINE))
    return tuple(int(kilobytes[name]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))


def report(source: str, batch_rows: int, whole: bool) -> None:
    """Print a Reading as JSON: what the fresh process does."""
    pa, start = arrow(), time.perf_counter()  # pyarrow itself is no part of the reading
    before, _ = held_megabytes()
    table = pa.parquet.read_table(source) if whole else None
    counted = survey(table.to_batches(batch_rows) if whole else load_trajectories(source, batch_rows=batch_rows))
    print(json.dumps({"rows": counted.rows, "text_bytes": int(counted.bytes_FR.sum()),
                      "seconds": time.perf_counter() - start, "before_mb": before,
                      "rise_mb": held_megabytes()[1] - before}))
