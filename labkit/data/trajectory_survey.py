"""What is in a set of agent traces, counted in one pass with flat memory.

Turns, exit status, how much of the text each role wrote, seconds, tasks, repositories, exact duplicates, and overlap
with an evaluation set. Batches are counted and dropped; what stays grows with the number of tasks and repositories, and
by 16 bytes for each row whose duplicates are looked for, never with the length of the texts.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from labkit.data.trajectories import FINISHED, ROLES, arrow
from labkit.errors import LabError

if TYPE_CHECKING:
    import pyarrow

MOST_TURNS = 255  # a longer trace counts as this long


@dataclass
class Survey:
    """Counts over rows. `turns_FK[finished, k]`: rows with k assistant turns; `bytes_FR`: of text, in ROLES' order."""

    rows: int = 0
    turns_FK: np.ndarray = field(default_factory=lambda: np.zeros((2, MOST_TURNS + 1), np.int64))
    bytes_FR: np.ndarray = field(default_factory=lambda: np.zeros((2, len(ROLES)), np.int64))
    seconds: float = 0.0
    instances: Counter = field(default_factory=Counter)
    repositories: Counter = field(default_factory=Counter)
    keys: list[np.ndarray] = field(default_factory=list)  # row_keys of each batch

    @property
    def duplicates(self) -> int:
        """Rows whose task and messages were there before."""
        keys_N = np.concatenate([*self.keys, np.zeros(0, "S16")])
        return len(keys_N) - len(np.unique(keys_N))

    @property
    def finished(self) -> float:
        """Share of rows whose agent said that it was done."""
        return float(self.turns_FK[1].sum() / self.rows)

    def finished_under(self, cap: int) -> float:
        """The share if every trace had been stopped after `cap` assistant turns: then longer ones are unfinished."""
        return float(self.turns_FK[1, : cap + 1].sum() / self.rows)

    def share(self, role: str) -> float:
        """A role's share of all bytes of text."""
        return float(self.bytes_FR[:, ROLES.index(role)].sum() / self.bytes_FR.sum())


def survey(batches: Iterable["pyarrow.RecordBatch"], *, duplicates: bool = True) -> Survey:
    """Count batches of whole rows, as load_trajectories gives them. Raises LabError where there is no row."""
    counted = Survey()
    for batch in batches:
        count_batch(counted, batch)
        if duplicates:
            counted.keys.append(row_keys(batch))
    if not counted.rows:
        raise LabError("There are no rows to count.", "Give a source with at least one row.")
    return counted


def count_batch(counted: Survey, batch: "pyarrow.RecordBatch") -> None:
    """Add one batch to the counts, by Arrow's vectorised functions."""
    pa = arrow()
    messages = batch.column("messages")
    flat, row_M = messages.flatten(), pa.compute.list_parent_indices(messages).to_numpy()
    role_M = pa.compute.index_in(flat.field("role"), pa.array(ROLES)).to_numpy()
    finished_N = pa.compute.equal(batch.column("exit_status"), FINISHED).to_numpy(zero_copy_only=False).astype(int)
    turns_N = np.bincount(row_M[role_M == ROLES.index("assistant")], minlength=batch.num_rows)
    np.add.at(counted.turns_FK, (finished_N, np.minimum(turns_N, MOST_TURNS)), 1)
    np.add.at(counted.bytes_FR, (finished_N[row_M], role_M), pa.compute.binary_length(flat.field("content")).to_numpy())
    counted.rows += batch.num_rows
    counted.seconds += pa.compute.sum(batch.column("duration_sec")).as_py() or 0.0
    counted.instances.update(batch.column("instance_id").to_pylist())
    counted.repositories.update(batch.column("repo").to_pylist())


def row_keys(batch: "pyarrow.RecordBatch") -> np.ndarray:
    """[N] of 16 bytes that identify each row by its task and its messages: equal for exact duplicates only.

    The task's id alone will not do: it stands on each of a task's hundred rows.
    """
    instances, messages = batch.column("instance_id").to_pylist(), batch.column("messages")
    flat, end_N = messages.flatten(), np.cumsum(arrow().compute.list_value_length(messages).to_numpy())
    roles, texts = flat.field("role").to_pylist(), flat.field("content").to_pylist()
    keys, start = [], 0
    for instance, end in zip(instances, end_N, strict=True):
        digest = hashlib.blake2b(instance.encode(), digest_size=16)
        for role, text in zip(roles[start:end], texts[start:end], strict=True):
            digest.update(f"\0{role}\0{len(text)}\0{text}".encode())  # lengths: no two rows run together to the same
        keys.append(digest.digest())
        start = end
    return np.frombuffer(b"".join(keys), "S16")


@dataclass(frozen=True)
class Contamination:
    """Rows of a training set that an evaluation set touches: the same task, or only the same repository."""

    rows: int
    same_task: int
    same_repository: int  # the same task included


def contamination(batches: Iterable["pyarrow.RecordBatch"], instances: Collection[str],
                  repositories: Collection[str] = ()) -> Contamination:
    """Compare ids and repository names with those of an evaluation set, letter case aside.

    Needs the columns instance_id and repo alone. Names differ by data set (`owner__name-123`, `owner/name`): give
    them in the rows' form. A repository under another name, or a copied file, is not found.
    """
    pc, pa = arrow().compute, arrow()
    asked = {"instance_id": instances, "repo": repositories}
    known = {column: pa.array(sorted({name.lower() for name in names}), pa.string()) for column, names in asked.items()}
    rows = same_task = touched = 0
    for batch in batches:
        task_N, repository_N = (pc.is_in(pc.utf8_lower(batch.column(column)), known[column]) for column in asked)
        rows += batch.num_rows
        same_task += task_N.true_count
        touched += pc.or_(task_N, repository_N).true_count
    return Contamination(rows, same_task, touched)
