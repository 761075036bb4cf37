"""Rows of agent traces: their exact Arrow schema, checked reading in small batches, and whole-or-nothing writing.

A row is one rollout: an agent that reads and edits a repository, one shell command a turn.

    instance_id, repo   the task, and the repository it is about: one task has many rows, one repository many tasks
    messages            [{role, content}, ...]: system, task, then an assistant's turn and its observation by turns
    trajectory_format   "mini-swe-agent-1"
    exit_status         "Submitted" if the agent said that it was done, else "incomplete": neither says "correct"
    duration_sec        wall time

It is the schema of the data set AlienKevin/SWE-ZERO-12M-trajectories (Kevin Li and the Marin community, Apache-2.0) as
its viewer shows it. Rows hold long texts (62 KB of JSON each, there), so files are read some dozens of rows at a time
and written in small row groups. pyarrow is imported where it is used.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.data.corpora import checked_file
from labkit.errors import LabError
from labkit.files import DATA, whole_file

if TYPE_CHECKING:
    import pyarrow

FOLDER = DATA / "trajectories"
SCHEMA = {"instance_id": "string", "repo": "string", "messages": "list<struct<role: string, content: string>>",
          "trajectory_format": "string", "exit_status": "string", "duration_sec": "double"}
TEXTS = ("instance_id", "repo", "trajectory_format", "exit_status")
FORMAT = "mini-swe-agent-1"
ROLES = ("system", "user", "assistant")
EXIT_STATUSES = FINISHED, UNFINISHED = "Submitted", "incomplete"
BATCH_ROWS = 64


def arrow():
    """The module pyarrow with its parquet part; LabError with the command that installs it where it is missing."""
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise LabError("Rows of agent traces need the library pyarrow, which is not installed.",
                       f"Install it: {Path(sys.executable).name} -m pip install pyarrow") from None
    return pyarrow


def arrow_schema() -> "pyarrow.Schema":
    """SCHEMA as pyarrow's own object."""
    pa = arrow()
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    kinds = {"string": pa.string(), "double": pa.float64(), SCHEMA["messages"]: pa.list_(message)}
    return pa.schema([(name, kinds[kind]) for name, kind in SCHEMA.items()])


def load_trajectories(source: str | Path, *, columns: Sequence[str] | None = None,
                      batch_rows: int = BATCH_ROWS) -> Iterator["pyarrow.RecordBatch"]:
    """Checked record batches of at most `batch_rows` rows, in the order of the files and their rows.

    source: a parquet file, a folder of them (in the order of their names), "shipped" (300 rows made by
    data/build_trajectories.py), or "hf:owner/name" (streamed; needs the extra `hf`). columns: only these are read.
    Memory is bounded by a row group, not by the file. Raises LabError for a file that is missing or no parquet, for a
    missing column, a wrong type, and for the first row that breaks a rule of `validate_batch`.
    """
    chosen = chosen_columns(columns)
    if batch_rows < 1:
        raise LabError(f"Batches of {batch_rows} rows can't be read.", "Use batch_rows of 1 or more.")
    if str(source).startswith("hf:"):
        from labkit.data.hub_trajectories import hub_batches  # it imports this file

        return hub_batches(str(source)[3:], chosen, batch_rows)
    return (batch for path in parquet_files(source) for batch in file_batches(path, chosen, batch_rows))


def chosen_columns(columns: Sequence[str] | None) -> list[str]:
    """The columns to read, in the schema's order."""
    unknown = [name for name in columns or () if name not in SCHEMA]
    if unknown or (columns is not None and not columns):
        raise LabError(f"There is no column {unknown[0]!r}." if unknown else "No column is asked for.",
                       f"The columns are: {', '.join(SCHEMA)}.")
    return [name for name in SCHEMA if columns is None or name in columns]


def parquet_files(source: str | Path) -> list[Path]:
    """The files that a source names."""
    if source == "shipped":
        return [checked_file("generated", FOLDER)]
    path = Path(source)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise LabError(f"There are no parquet files at {path}.",
                       "Name a file, a folder with *.parquet in it, \"shipped\", or \"hf:owner/name\".")
    return files


def file_batches(path: Path, columns: list[str], batch_rows: int) -> Iterator["pyarrow.RecordBatch"]:
    """The batches of one file, each checked before it is handed out."""
    pa = arrow()
    first = 0
    try:
        with pa.parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow, columns, path.name)
            for batch in file.iter_batches(batch_rows, columns=columns, use_threads=False):
                yield validate_batch(same_types(batch, path.name), path.name, first)
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise LabError(f"{path.name} can't be read as parquet behind row {first} ({reason}).",
                       "It may be cut off or no parquet file: fetch or write it again.") from None


def check_columns(found: "pyarrow.Schema", columns: Iterable[str], name: str) -> None:
    """Every wanted column is there, with its type."""
    pa, expected = arrow(), arrow_schema()
    for column in columns:
        if column not in found.names:
            raise LabError(f"{name} has no column {column!r}.", f"It has: {', '.join(found.names) or 'none'}.")
        if plain_type(pa, found.field(column).type) != plain_type(pa, expected.field(column).type):
            raise LabError(f"In {name} the column {column!r} has the type {found.field(column).type}.",
                           f"It should be {SCHEMA[column]}.")


def plain_type(pa, kind: "pyarrow.DataType") -> object:
    """A type without what only storage decides: 64-bit offsets, dictionaries, and the name of a list's element."""
    if pa.types.is_dictionary(kind):
        return plain_type(pa, kind.value_type)
    if pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return "list", plain_type(pa, kind.value_type)
    if pa.types.is_struct(kind):
        return tuple((part.name, plain_type(pa, part.type)) for part in kind)
    return str(kind)


def same_types(batch: "pyarrow.RecordBatch", name: str) -> "pyarrow.RecordBatch":
    """The batch with the schema's own types (other offsets and dictionaries are cast)."""
    pa, expected = arrow(), arrow_schema()
    wanted = pa.schema([expected.field(column) for column in batch.schema.names])
    return batch if batch.schema == wanted else batch.cast(wanted)


# what a row must be ---------------------------------------------------------------------------------------------------

def validate_batch(batch: "pyarrow.RecordBatch", name: str = "rows", first: int = 0) -> "pyarrow.RecordBatch":
    """The same batch, if each row keeps the rules; else LabError with file, row (counted from 0) and field.

    Nothing is null; texts that name something are not empty; format, exit status and roles are known ones; the first
    two messages come from system and user, then assistant and user take turns; seconds are finite and not negative.
    """
    for column in batch.schema.names:
        for row, problem in column_problems(column, batch.column(column)):
            raise LabError(f"{name}, row {first + row}, field {column!r}: {problem}.",
                           "Leave this row out, or write the file again with the schema of labkit.data.SCHEMA.")
    return batch


def validate(source: str | Path, *, batch_rows: int = BATCH_ROWS) -> int:
    """Read and check all of a source, keeping nothing; the number of its rows. Raises what load_trajectories raises."""
    return sum(batch.num_rows for batch in load_trajectories(source, batch_rows=batch_rows))


def column_problems(column: str, values: "pyarrow.Array") -> Iterator[tuple[int, str]]:
    """(row, what is wrong) of a column's bad rows, the first of each kind of fault."""
    pc = arrow().compute
    known = {"trajectory_format": (FORMAT,), "exit_status": EXIT_STATUSES}
    yield from first_true(values.is_null(), "is null")
    if column == "messages":
        yield from message_problems(values)
    elif column == "duration_sec":
        wrong = pc.or_(pc.less(values, 0.0), pc.invert(pc.is_finite(values)))
        yield from first_true(wrong, "is no finite number of seconds from 0 on")
    elif column in known:
        wrong = pc.invert(pc.is_in(values, arrow().array(known[column], values.type)))
        yield from first_true(wrong, f"is none of {', '.join(known[column])}", values)
    else:
        yield from first_true(pc.equal(pc.utf8_length(values), 0), "is empty")


def message_problems(messages: "pyarrow.Array") -> Iterator[tuple[int, str]]:
    """The same for the lists of messages; a fault inside a list names the message too."""
    pc, pa = arrow().compute, arrow()
    yield from first_true(pc.less(pc.list_value_length(messages), 2), "has fewer than two messages")
    flat, row_M = messages.flatten(), pc.list_parent_indices(messages)
    lengths = pc.list_value_length(messages).to_numpy(zero_copy_only=False)
    place_M = pa.array([place for length in lengths for place in range(int(length))], pa.int64())
    roles = flat.field("role")
    # by place: system, user, then assistant at even places and user at odd ones
    even = pc.equal(pc.bit_wise_and(place_M, 1), 0)
    expected = pc.if_else(pc.equal(place_M, 0), "system", pc.if_else(even, "assistant", "user"))
    for wrong, problem, shown in ((flat.is_null(), "is null", None), (roles.is_null(), "has no role", None),
                                  (flat.field("content").is_null(), "has no content", None),
                                  (pc.not_equal(roles, expected), "breaks the order system, user, assistant, user, …",
                                   roles)):
        for place, text in first_true(wrong, problem, shown):
            yield row_M[place].as_py(), f"message {place_M[place].as_py()} {text}"


def first_true(wrong: "pyarrow.Array", problem: str, shown: "pyarrow.Array | None" = None) -> Iterator[tuple[int, str]]:
    """(place, problem) of the first true value, with what stands there if `shown` is given; nothing where none is."""
    place = arrow().compute.index(wrong, True).as_py()
    if place >= 0:
        yield place, problem if shown is None else f"{problem}: it is {shown[place].as_py()!r}"


# writing --------------------------------------------------------------------------------------------------------------

def write_trajectories(path: str | Path, rows: Iterable[Mapping], *, row_group_rows: int = 64) -> int:
    """Write rows (dicts with exactly SCHEMA's keys) as parquet with zstd; returns how many.

    The rows may come from a generator: no more than a row group is held. A row that breaks a rule raises LabError
    with its number and field, and then, as after any other exception, `path` is as it was before. Row groups of 64
    rows keep a reader's memory small; ids are dictionary-coded, texts are not.
    """
    if row_group_rows < 1:
        raise LabError(f"Row groups of {row_group_rows} rows can't be written.", "Use 1 or more.")
    pa, path, written, rows = arrow(), Path(path), 0, iter(rows)
    with whole_file(path) as temporary:
        settings = {"compression": "zstd", "use_dictionary": list(TEXTS)}
        with pa.parquet.ParquetWriter(temporary, arrow_schema(), **settings) as file:
            while group := list(islice(rows, row_group_rows)):
                file.write_batch(validate_batch(batch_of(group, path.name, written), path.name, written))
                written += len(group)
    return written


def batch_of(rows: Sequence[Mapping], name: str = "rows", first: int = 0) -> "pyarrow.RecordBatch":
    """Dicts as a record batch of SCHEMA; LabError names the first row and field that don't fit."""
    pa, schema = arrow(), arrow_schema()
    for number, row in enumerate(rows, start=first):  # pyarrow would fill a missing field with null, and drop others
        if wrong := set(SCHEMA) ^ set(row):
            field = sorted(wrong)[0]
            state = "is missing" if field in SCHEMA else "is not part of the schema"
            raise LabError(f"{name}, row {number}, field {field!r} {state}.", f"A row has: {', '.join(SCHEMA)}.")
    try:
        return pa.RecordBatch.from_pylist(list(rows), schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        number, field = next((number, field) for number, row in enumerate(rows, start=first) for field in SCHEMA
                             if not fits(row[field], schema.field(field).type))
        raise LabError(f"{name}, row {number}, field {field!r} does not hold a {SCHEMA[field]}.",
                       "Give the schema's types; see labkit.data.SCHEMA.") from None


def fits(value: object, kind: "pyarrow.DataType") -> bool:
    """Whether Arrow takes a value for this type."""
    pa = arrow()
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return False
    return True
