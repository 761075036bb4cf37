"""Rows of agent traces streamed from the Hugging Face hub: one connection, and patience when it asks for less.

The hub answers "429 Too Many Requests" beyond about 1,000 requests in five minutes; 128 parallel readers of the 1,260
files of SWE-ZERO-12M met it, 8 did not (threads of marin-community/marin). One stream needs no more than a few requests
a minute. It waits 1, 2, 4, ... seconds after a refusal, then goes on behind the last row that it gave.
Needs the extra: pip install -e '.[hf]'.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from labkit.data.trajectories import arrow, check_columns, same_types, validate_batch
from labkit.errors import LabError

if TYPE_CHECKING:
    import pyarrow

ATTEMPTS = 8  # 1 + 2 + ... + 64 s, then 127 s have passed without one row
BUSY = re.compile(r"\b(429|500|502|503|504)\b|timed? ?out|connection (reset|aborted)", re.IGNORECASE)


def open_stream(dataset: str, columns: list[str]):
    """The hub's own stream of a data set's training rows, as Arrow tables of these columns."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise LabError("Streaming from the hub needs the library `datasets`.",
                       "Install it: pip install -e '.[hf]'") from None
    return load_dataset(dataset, split="train", streaming=True).select_columns(columns).with_format("arrow")


def hub_batches(dataset: str, columns: list[str], batch_rows: int, *, open_stream: Callable = open_stream,
                wait: Callable[[float], None] = time.sleep) -> Iterator["pyarrow.RecordBatch"]:
    """Checked batches of `dataset`, in order, each row once. Raises LabError where the hub keeps refusing.

    `open_stream(dataset, columns)` gives an object with `skip(rows)` and `iter(batch_size)`; tests give their own.
    """
    given, failures = 0, 0
    while True:
        try:
            for table in open_stream(dataset, columns).skip(given).iter(batch_rows):
                for batch in checked(table, dataset, given):
                    yield batch
                    given, failures = given + batch.num_rows, 0
            return
        except LabError:
            raise
        except Exception as error:  # requests, httpx, aiohttp and fsspec each have their own kinds
            failures += 1
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not BUSY.search(str(error)) or failures == ATTEMPTS:
                raise LabError(f"The hub's {dataset} can't be read behind row {given}: {reason}.",
                               "Check its name and the network; a rate limit passes after some minutes.") from None
            wait(2.0 ** (failures - 1))


def checked(table: "pyarrow.Table", name: str, first: int) -> Iterator["pyarrow.RecordBatch"]:
    """A table's batches, with the schema's types and rules."""
    check_columns(table.schema, table.schema.names, name)
    for batch in arrow().Table.to_batches(table):
        yield validate_batch(same_types(batch, name), name, first)
        first += batch.num_rows
