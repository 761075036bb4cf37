"""Rows of agent traces: what is read is what was written, what is wrong is named, and nothing is half-written."""

import builtins
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from planted import altered

from labkit import data
from labkit.data import chats, hub_trajectories, trajectories, trajectory_survey
from labkit.data.chats import ChatTokenizer, first_fit, pack_chats
from labkit.data.hub_trajectories import ATTEMPTS, hub_batches
from labkit.data.packing import PADDING
from labkit.data.tokenizers import ByteTokenizer
from labkit.data.trajectories import SCHEMA, arrow_schema, batch_of, load_trajectories, validate, write_trajectories
from labkit.data.trajectory_survey import contamination, row_keys, survey
from labkit.errors import LabError
from labkit.measure.reading_memory import long_rows, many_files, read_in_own_process
from labkit.models import GPT, GPTConfig
from labkit.models.attention import document_mask
from labkit.objectives import next_token_loss


def row(number: int = 0, turns: int = 2, **changed) -> dict:
    """A row of `turns` assistant turns; the last observation is missing, as in a submitted trace."""
    messages = [("system", "You have a shell."), ("user", f"Mend task {number % 7}.")]
    for turn in range(turns):
        messages += [("assistant", f"```bash\nsed -n {turn}p f{number}.py\n```"), ("user", "Observation: é x = 1")]
    return {"instance_id": f"a__b-{number % 7}", "repo": "a/b" if number % 2 else "C/d",
            "messages": [{"role": role, "content": content} for role, content in messages[:-1]],
            "trajectory_format": "mini-swe-agent-1", "exit_status": "Submitted" if number % 3 else "incomplete",
            "duration_sec": number / 8, **changed}


ROWS = [row(number, turns=1 + number % 4) for number in range(70)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.parquet"
    write_trajectories(path, iter(ROWS), row_group_rows=16)
    return path


def read(source, **options):
    return [each for batch in load_trajectories(source, **options) for each in batch.to_pylist()]


# schema and reading ---------------------------------------------------------------------------------------------------

def test_the_schema_is_the_data_sets(file):
    """Names, types and order are the card's, in the constant, in Arrow's object and in the file that was written."""
    expected = ("instance_id: string\nrepo: string\nmessages: list<item: struct<role: string, content: string>>\n"
                "trajectory_format: string\nexit_status: string\nduration_sec: double")
    plain = str(arrow_schema()).replace("  child 0, item: struct<role: string, content: string>\n", "")
    assert [line for line in plain.splitlines() if not line.startswith(" ")] == expected.splitlines()
    assert parquet.read_schema(file).remove_metadata().equals(arrow_schema())
    assert list(SCHEMA) == arrow_schema().names and data.SCHEMA is SCHEMA


@pytest.mark.parametrize("batch_rows", [1, 16, 23, 1000])
def test_reading_gives_back_what_was_written(file, batch_rows):
    """Each row once, in order, whatever the batches; no batch is larger than asked."""
    assert read(file, batch_rows=batch_rows) == ROWS
    assert max(batch.num_rows for batch in load_trajectories(file, batch_rows=batch_rows)) <= batch_rows
    assert validate(file, batch_rows=batch_rows) == len(ROWS)


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    """Two files and a stranger: rows of the first come first, other endings are left alone."""
    write_trajectories(tmp_path / "b.parquet", ROWS[40:])
    write_trajectories(tmp_path / "a.parquet", ROWS[:40])
    (tmp_path / "readme.txt").write_text("not rows")
    assert read(tmp_path) == ROWS and read(str(tmp_path)) == ROWS


def test_only_chosen_columns_are_read(file):
    """In the schema's order; unknown and no columns are refused before anything is read."""
    assert read(file, columns=["exit_status", "repo"]) == [
        {"repo": each["repo"], "exit_status": each["exit_status"]} for each in ROWS]
    for columns, problem in ((["repos"], "no column 'repos'"), ([], "No column is asked for")):
        with pytest.raises(LabError, match=problem):
            load_trajectories(file, columns=columns)
    with pytest.raises(LabError, match="0 rows"):
        load_trajectories(file, batch_rows=0)


def test_no_rows_are_rows_too(tmp_path):
    """An empty file has the schema and no batch; a survey of nothing is refused."""
    assert write_trajectories(tmp_path / "none.parquet", []) == 0
    assert read(tmp_path / "none.parquet") == [] and validate(tmp_path / "none.parquet") == 0
    with pytest.raises(LabError, match="no rows to count"):
        survey(load_trajectories(tmp_path / "none.parquet"))


def test_other_storage_of_the_same_types_is_read(tmp_path):
    """Large strings, large lists and dictionaries, which other writers choose, come out as the schema's types."""
    table = pa.Table.from_batches([batch_of(ROWS)])
    message = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.large_list(message), pa.string(),
             pa.large_string(), pa.float64()]
    other = pa.schema([pa.field(name, kind) for name, kind in zip(SCHEMA, kinds, strict=True)])
    parquet.write_table(table.cast(other), tmp_path / "other.parquet")
    assert read(tmp_path / "other.parquet") == ROWS
    assert next(load_trajectories(tmp_path / "other.parquet")).schema.equals(arrow_schema())


# refusing -------------------------------------------------------------------------------------------------------------

MESSAGES = ROWS[0]["messages"]
BAD = {
    "no number": ({"duration_sec": "long"}, "row 41, field 'duration_sec' does not hold a double"),
    "negative": ({"duration_sec": -0.5}, "row 41, field 'duration_sec': is no finite number"),
    "not finite": ({"duration_sec": math.inf}, "row 41, field 'duration_sec': is no finite number"),
    "not a number": ({"duration_sec": math.nan}, "row 41, field 'duration_sec': is no finite number"),
    "null": ({"repo": None}, "row 41, field 'repo': is null"),
    "null list": ({"messages": None}, "row 41, field 'messages': is null"),
    "empty": ({"instance_id": ""}, "row 41, field 'instance_id': is empty"),
    "number for text": ({"instance_id": 3}, "row 41, field 'instance_id' does not hold a string"),
    "status": ({"exit_status": "done"}, "row 41, field 'exit_status': is none of Submitted, incomplete: it is 'done'"),
    "format": ({"trajectory_format": "2"}, "row 41, field 'trajectory_format': is none of mini-swe-agent-1: it is '2'"),
    "short": ({"messages": MESSAGES[:1]}, "row 41, field 'messages': has fewer than two messages"),
    "order": ({"messages": MESSAGES[1:]}, "row 41, field 'messages': message 0 breaks the order .* it is 'user'"),
    "twice": ({"messages": MESSAGES + MESSAGES[-1:]}, "field 'messages': message 3 breaks the order .* 'assistant'"),
    "role": ({"messages": MESSAGES[:2] + [{"role": "tool", "content": ""}]}, "message 2 breaks the order .* 'tool'"),
    "no role": ({"messages": [{"content": "x"}, MESSAGES[1]]}, "row 41, field 'messages': message 0 has no role"),
    "no content": ({"messages": MESSAGES[:1] + [{"role": "user"}]}, "field 'messages': message 1 has no content"),
    "no message": ({"messages": [None, MESSAGES[1]]}, "row 41, field 'messages': message 0 is null"),
    "no list": ({"messages": "hello"}, "row 41, field 'messages' does not hold a list<struct<role: string"),
    "extra": ({"score": 1}, "row 41, field 'score' is not part of the schema"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, case):
    """One sentence with file, row and field, three row groups in; the folder is as it was, an older file too."""
    changed, sentence = BAD[case]
    rows = [*ROWS[:41], {**ROWS[41], **changed}, *ROWS[42:]]
    path = tmp_path / "new.parquet"
    with pytest.raises(LabError, match=sentence) as caught:
        write_trajectories(path, rows, row_group_rows=16)
    assert str(caught.value).startswith("new.parquet, row 41") and list(tmp_path.iterdir()) == []
    write_trajectories(path, ROWS[:3])
    with pytest.raises(LabError):
        write_trajectories(path, rows, row_group_rows=16)
    assert read(path) == ROWS[:3] and list(tmp_path.iterdir()) == [path]


def test_a_missing_field_is_no_null(tmp_path):
    """pyarrow would fill it in silently."""
    with pytest.raises(LabError, match="row 1, field 'repo' is missing"):
        write_trajectories(tmp_path / "x.parquet", [ROWS[0], {key: ROWS[1][key] for key in SCHEMA if key != "repo"}])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_source_of_rows_leaves_nothing(tmp_path, error):
    """Neither a half file nor a temporary one, whatever stopped the rows."""
    def rows():
        yield from ROWS
        raise error

    with pytest.raises(error):
        write_trajectories(tmp_path / "x.parquet", rows(), row_group_rows=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", [name for name in BAD if not BAD[name][1].endswith("schema") and name not in (
    "no number", "number for text", "no list", "extra")])
def test_a_bad_row_in_a_file_is_named_when_it_is_read(tmp_path, case):
    """A file that another program wrote: the batch with the bad row is not handed out, those before are."""
    changed, sentence = BAD[case]
    rows = [*ROWS[:41], {**ROWS[41], **changed}, *ROWS[42:]]
    path = tmp_path / "theirs.parquet"
    parquet.write_table(pa.Table.from_pylist(rows, arrow_schema()), path)
    given = []
    with pytest.raises(LabError, match=f"theirs.parquet, .*{sentence.removeprefix('row 41, ')}"):
        for batch in load_trajectories(path, batch_rows=8):
            given += batch.to_pylist()
    assert given == ROWS[:40]
    with pytest.raises(LabError, match="theirs.parquet, row 41"):
        validate(path)


def test_a_missing_column_and_a_wrong_type_are_named(tmp_path):
    """Before any row is read; a column that is not asked for is not missed."""
    table = pa.Table.from_batches([batch_of(ROWS)])
    path = tmp_path / "x.parquet"
    parquet.write_table(table.drop_columns(["repo"]), path)
    with pytest.raises(LabError, match="x.parquet has no column 'repo'.*It has: instance_id, messages"):
        validate(path)
    assert len(read(path, columns=["exit_status"])) == len(ROWS)
    for column, values, kind in (("duration_sec", pa.array(["1"] * 70), "string"),
                                 ("duration_sec", pa.array([1.0] * 70, pa.float32()), "float"),
                                 ("messages", pa.array(["[]"] * 70), "string"),
                                 ("messages", pa.array([["hello"]] * 70), "list<"),
                                 ("messages", pa.array([[{"content": "a", "role": "b"}]] * 70), "list<")):
        place = table.schema.get_field_index(column)
        parquet.write_table(table.set_column(place, column, values), path)
        with pytest.raises(LabError, match=f"x.parquet the column '{column}' has the type {kind}.*It should be"):
            next(load_trajectories(path))


def test_what_is_no_parquet_is_refused(file, tmp_path):
    """Text, an empty file, a cut one, a damaged page, a missing file and an empty folder: one sentence each."""
    whole = file.read_bytes()
    bad = tmp_path / "bad.parquet"
    for content in (b"", b"instance_id,repo\n", whole[:-40], whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(LabError, match="bad.parquet can't be read as parquet"):
            validate(bad)
    bad.write_bytes(whole[:500] + bytes(range(256)) * 2 + whole[1012:])
    with pytest.raises(LabError, match="bad.parquet"):
        validate(bad)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "none.parquet", tmp_path / "empty", "no-such-set"):
        with pytest.raises(LabError, match="There are no parquet files"):
            next(load_trajectories(path))


def test_without_pyarrow_labkit_imports_and_says_what_to_do(file, monkeypatch):
    """The import happens inside functions alone, and its failure is a sentence with the command."""
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LabError, match="need the library pyarrow.*-m pip install pyarrow"):
        next(load_trajectories(file))


# the hub --------------------------------------------------------------------------------------------------------------

class Stream:
    """What `datasets` streams, with a refusal (an exception) behind given rows, each once."""

    def __init__(self, refusals: dict[int, Exception], table=None):
        self.refusals, self.opened = refusals, []
        self.table = pa.Table.from_batches([batch_of(ROWS)]) if table is None else table

    def __call__(self, dataset, columns):
        self.opened.append((dataset, columns))
        self.start = 0
        return self

    def skip(self, rows):
        self.start = rows
        return self

    def iter(self, size):
        for first in range(self.start, self.table.num_rows + 1, size):
            for behind in [place for place in self.refusals if place <= first]:
                raise self.refusals.pop(behind)
            if first < self.table.num_rows:
                yield self.table.slice(first, size)


def test_the_hub_is_read_on_behind_a_rate_limit():
    """Two refusals at the start, one in the middle: each row comes once, and the waits double, then start anew."""
    busy = Exception("429 Client Error: Too Many Requests for url")
    stream, waits = Stream({-2: busy, -1: busy, 24: busy}), []
    batches = list(hub_batches("a/b", list(SCHEMA), 8, open_stream=stream, wait=waits.append))
    assert [each for batch in batches for each in batch.to_pylist()] == ROWS
    assert waits == [1.0, 2.0, 1.0] and len(stream.opened) == 4 and stream.opened[0] == ("a/b", list(SCHEMA))


def test_the_hub_is_given_up_where_waiting_is_no_use():
    """A refusal that lasts ends after ATTEMPTS; another error at once; a bad row is a bad row."""
    waits = []
    with pytest.raises(LabError, match="a/b can't be read behind row 0: 429"):
        list(hub_batches("a/b", ["repo"], 8, open_stream=Stream({-k: Exception("429") for k in range(1, 99)}),
                         wait=waits.append))
    assert waits == [2.0**k for k in range(ATTEMPTS - 1)]
    with pytest.raises(LabError, match="behind row 16: no such data set"):
        list(hub_batches("a/b", ["repo"], 8, open_stream=Stream({16: Exception("no such data set")}), wait=None))
    table = pa.Table.from_pylist([{**ROWS[0], "repo": ""}], arrow_schema())
    with pytest.raises(LabError, match="a/b, row 0, field 'repo': is empty"):
        list(hub_batches("a/b", ["repo"], 8, open_stream=Stream({}, table), wait=None))


def test_an_hf_source_goes_to_the_hub(monkeypatch):
    """load_trajectories("hf:...") hands over name, columns, batch size; without `datasets` it says what to install."""
    monkeypatch.setattr(hub_trajectories, "hub_batches", lambda *given: given)
    assert load_trajectories("hf:a/b", columns=["repo"], batch_rows=5) == ("a/b", ["repo"], 5)
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest, **named: (_ for _ in ()).throw(
        ImportError(name)) if name == "datasets" else real(name, *rest, **named))
    with pytest.raises(LabError, match="needs the library `datasets`"):
        hub_trajectories.open_stream("a/b", ["repo"])


# counting -------------------------------------------------------------------------------------------------------------

def counted_by_hand(rows) -> dict:
    turns = Counter((each["exit_status"] == "Submitted", sum(m["role"] == "assistant" for m in each["messages"]))
                    for each in rows)
    size = Counter()
    for each in rows:
        for message in each["messages"]:
            size[each["exit_status"] == "Submitted", message["role"]] += len(message["content"].encode())
    return {"turns": turns, "bytes": size, "seconds": sum(each["duration_sec"] for each in rows)}


def check_survey(counted, rows):
    by_hand = counted_by_hand(rows)
    assert {key: int(counted.turns_FK[key]) for key in np.ndindex(counted.turns_FK.shape) if counted.turns_FK[key]} == {
        (int(finished), k): count for (finished, k), count in by_hand["turns"].items()}
    for (finished, role), size in by_hand["bytes"].items():
        assert counted.bytes_FR[int(finished), trajectories.ROLES.index(role)] == size
    assert counted.seconds == pytest.approx(by_hand["seconds"]) and counted.rows == len(rows)
    assert counted.instances == Counter(each["instance_id"] for each in rows)
    assert counted.repositories == Counter(each["repo"] for each in rows)


@pytest.mark.parametrize("batch_rows", [1, 9, 1000])
def test_a_survey_counts_what_is_there(file, batch_rows):
    """Against a loop over plain rows, in batches that cut the row groups anyhow."""
    check_survey(survey(load_trajectories(file, batch_rows=batch_rows)), ROWS)


def test_the_turn_cap_can_only_lower_the_finished_share(file):
    """Under a cap, finished rows with more turns count as unfinished; a cap above all changes nothing; 0 ends all."""
    counted = survey(load_trajectories(file))
    finished = [each for each in ROWS if each["exit_status"] == "Submitted"]
    for cap in range(6):
        assert counted.finished_under(cap) == sum(len(each["messages"]) <= 1 + 2 * cap for each in finished) / 70
    assert counted.finished_under(4) == counted.finished == len(finished) / 70
    assert sum(counted.share(role) for role in trajectories.ROLES) == pytest.approx(1.0)


def test_exact_duplicates_are_rows_with_the_same_task_and_messages():
    """Another duration or status is the same trace; another task, role, text or cut between messages is not."""
    same = [row(3), row(3, duration_sec=9.0), row(3, exit_status="incomplete")]
    parts = [{"role": "system", "content": "ab"}, {"role": "user", "content": "c"}]
    moved = [{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}]
    renamed = [{**part, "role": "user"} for part in moved]
    other = [row(3, instance_id="a__b-4"), row(3, turns=3), *(row(3, messages=m) for m in (parts, moved, renamed))]
    keys = row_keys(batch_of(same + other))
    assert len(set(keys[:3])) == 1 and len(set(keys)) == 6 and keys.dtype == "S16"
    later = row_keys(batch_of(same + other).slice(4))  # a slice's lists begin in the middle of the store
    assert keys[4:].tolist() == later.tolist() and row_keys(batch_of([])).tolist() == []
    assert survey([batch_of(same), batch_of(other + same[:1])]).duplicates == 3
    assert survey([batch_of(same)], duplicates=False).duplicates == 0


def test_contamination_finds_tasks_and_repositories():
    """Whatever the letter case; a repository in common is counted apart from a task in common."""
    batches = [batch_of(ROWS[:30]), batch_of(ROWS[30:])]
    found = contamination(batches, ["A__B-2", "z__z-1"], ["c/D"])
    tasks = sum(each["instance_id"] == "a__b-2" for each in ROWS)
    either = sum(each["instance_id"] == "a__b-2" or each["repo"] == "C/d" for each in ROWS)
    assert (found.rows, found.same_task, found.same_repository) == (70, tasks, either)
    none = contamination(batches, [])
    assert (none.same_task, none.same_repository) == (0, 0)


# chats and masks ------------------------------------------------------------------------------------------------------

CHAT = ChatTokenizer(ByteTokenizer())


def test_the_mask_holds_the_assistants_text_and_end_and_nothing_else():
    """Byte by byte: text of assistant turns and the end token behind each; no header, no observation."""
    tokens_T, learned_T = CHAT.encode(ROWS[2]["messages"])
    learned = tokens_T[learned_T].tolist()
    said = [message["content"] for message in ROWS[2]["messages"] if message["role"] == "assistant"]
    assert learned == [token for text in said for token in [*text.encode(), CHAT.end]]
    unlearned = tokens_T[~learned_T].tolist()
    assert unlearned.count(CHAT.header("assistant")) == len(said) and CHAT.end in unlearned
    assert len(tokens_T) == sum(len(message["content"].encode()) + 2 for message in ROWS[2]["messages"])
    assert CHAT.decode(tokens_T.tolist()) == "".join(message["content"] for message in ROWS[2]["messages"])


def test_headers_are_ids_that_no_text_can_produce():
    """Three ids behind the tokenizer's own, so an observation that spells a header out stays text."""
    assert CHAT.vocab_size == ByteTokenizer.vocab_size + 3
    assert [CHAT.header(role) for role in chats.HEADERS] == [257, 258, 259]
    with pytest.raises(LabError, match="no role 'tool'"):
        CHAT.header("tool")
    empty_T, learned_T = CHAT.encode([])
    assert len(empty_T) == len(learned_T) == 0


def test_a_prompt_is_the_beginning_of_the_chat_that_follows():
    """What the model reads before its turn in the loop is what stood there in training, to the token."""
    messages = ROWS[3]["messages"]
    tokens_T, learned_T = CHAT.encode(messages)
    for place in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt = CHAT.prompt(messages[:place])
        assert prompt == tokens_T[: len(prompt)].tolist()
        assert learned_T[len(prompt)] and not learned_T[len(prompt) - 1]


def test_first_fit_keeps_documents_whole_and_rows_within_their_length():
    """On random sizes: each document once, no row too long, and not above the bound of 11/9 + 2/3 rows."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes = generator.integers(1, 65, size=generator.integers(1, 80)).tolist()
        rows = first_fit(sizes, 64)
        assert sorted(number for numbers in rows for number in numbers) == list(range(len(sizes)))
        assert max(sum(sizes[number] for number in numbers) for numbers in rows) <= 64
        assert len(rows) <= 11 / 9 * -(-sum(sizes) // 64) + 2 / 3 + len([size for size in sizes if size > 32])
    assert first_fit([4, 6, 4, 6], 10) == [[1, 0], [3, 2]] and first_fit([], 5) == []
    with pytest.raises(LabError, match="11 tokens doesn't fit into rows of 10"):
        first_fit([3, 11], 10)


def test_packed_chats_learn_what_they_learn_alone():
    """Loss and gradient of packed rows under the document mask are those of each chat alone, in float64."""
    pieces = [CHAT.encode(row(number, turns=1)["messages"][1:]) for number in range(3)]
    length = max(len(tokens_T) for tokens_T, _ in pieces) * 2 + 5
    tokens_RT, learned_RT, chat_RT = pack_chats(pieces, length, CHAT.end)
    assert (learned_RT & (chat_RT == PADDING)).sum() == 0 and len(tokens_RT) == 2
    model = GPT(GPTConfig(CHAT.vocab_size, length, 16, 2, 2)).double()
    logits_RTV = model(tokens_RT[:, :-1], document_mask_BTT=document_mask(chat_RT[:, :-1]))
    packed = next_token_loss(logits_RTV, tokens_RT[:, 1:], learned_RT[:, 1:])
    losses = [next_token_loss(model(t[None, :-1]), t[None, 1:], m[None, 1:]) * m.sum() for t, m in pieces]
    alone = sum(losses) / sum(m.sum() for _, m in pieces)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)  # next_token_loss computes in float32
    weight = model.blocks[0].attention.qkv.weight
    torch.testing.assert_close(torch.autograd.grad(packed, weight, retain_graph=True)[0],
                               torch.autograd.grad(alone, weight)[0], rtol=1e-4, atol=1e-7)
    leaked = next_token_loss(model(tokens_RT[:, :-1]), tokens_RT[:, 1:], learned_RT[:, 1:])
    assert abs(leaked - alone) > 1e-5


# each check notices its fault -----------------------------------------------------------------------------------------

def faulty(module, name: str, old: str, new: str, monkeypatch, owner=None):
    """Put `name` with one place altered into its module (or class)."""
    right = getattr(owner or module, name)
    monkeypatch.setattr(owner or module, name, altered(right, name, old, new, vars(module).copy()))


FAULTS = {
    "headers learned": (chats, ChatTokenizer, "encode", "[False] + [message",
                        '[message["role"] == "assistant"] + [message',
                        test_the_mask_holds_the_assistants_text_and_end_and_nothing_else),
    "end not learned": (chats, ChatTokenizer, "encode", '[message["role"] == "assistant"] * (len(ids) + 1)',
                        '[message["role"] == "assistant"] * len(ids) + [False]',
                        test_the_mask_holds_the_assistants_text_and_end_and_nothing_else),
    "observations learned": (chats, ChatTokenizer, "encode", '== "assistant"', '!= "system"',
                             test_the_mask_holds_the_assistants_text_and_end_and_nothing_else),
    "prompt without header": (chats, ChatTokenizer, "prompt", 'self.header("assistant")', "self.end",
                              test_a_prompt_is_the_beginning_of_the_chat_that_follows),
    "overfull rows": (chats, None, "first_fit", "space >= sizes[number]", "space > 0",
                      test_first_fit_keeps_documents_whole_and_rows_within_their_length),
    "one document a row": (chats, None, "pack_chats", "chat_RT[row, start:end] = number",
                           "chat_RT[row, start:end] = 0", test_packed_chats_learn_what_they_learn_alone),
    "mask moved": (chats, None, "pack_chats", "learned_RT[row, start:end] =", "learned_RT[row, -len(tokens_T):] =",
                   test_packed_chats_learn_what_they_learn_alone),
    "roles not in the key": (trajectory_survey, None, "row_keys", "\\0{role}", "\\0",
                             test_exact_duplicates_are_rows_with_the_same_task_and_messages),
    "task not in the key": (trajectory_survey, None, "row_keys", "instance.encode()", 'b"task"',
                            test_exact_duplicates_are_rows_with_the_same_task_and_messages),
    "texts run together": (trajectory_survey, None, "row_keys", "\\0{role}\\0{len(text)}\\0{text}", "{role[:0]}{text}",
                           test_exact_duplicates_are_rows_with_the_same_task_and_messages),
    "letter case counts": (trajectory_survey, None, "contamination", "pc.utf8_lower(batch.column(column))",
                           "batch.column(column)", test_contamination_finds_tasks_and_repositories),
    "repositories forgotten": (trajectory_survey, None, "contamination", "pc.or_(task_N, repository_N)", "task_N",
                               test_contamination_finds_tasks_and_repositories),
    "the hub from the start again": (hub_trajectories, None, "hub_batches", "given + batch.num_rows", "given",
                                     test_the_hub_is_read_on_behind_a_rate_limit),
    "waits that do not grow": (hub_trajectories, None, "hub_batches", "2.0 ** (failures - 1)", "1.0",
                               test_the_hub_is_read_on_behind_a_rate_limit),
    "patience with any error": (hub_trajectories, None, "hub_batches", "not BUSY.search(str(error)) or ", "",
                                test_the_hub_is_given_up_where_waiting_is_no_use),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    """One altered line each, and the test named beside it fails."""
    module, owner, name, old, new, check = FAULTS[fault]
    faulty(module, name, old, new, monkeypatch, owner)
    monkeypatch.setitem(globals(), name, getattr(module, name, None))
    with pytest.raises((AssertionError, TypeError)):  # waiting with wait=None is a TypeError
        check()


SURVEY_FAULTS = {
    "turns are messages": ('row_M[role_M == ROLES.index("assistant")]', "row_M"),
    "finished is unfinished": ('batch.column("exit_status"), FINISHED', 'batch.column("exit_status"), "incomplete"'),
    "characters for bytes": ("binary_length", "utf8_length"),
    "batches overwrite": ("counted.rows += batch", "counted.rows = batch"),
    "assigned, not added": ("np.add.at(counted.turns_FK, (finished_N, np.minimum(turns_N, MOST_TURNS)), 1)",
                            "counted.turns_FK[finished_N, turns_N] += 1"),
}


@pytest.mark.parametrize("fault", SURVEY_FAULTS)
def test_a_fault_in_counting_is_noticed(fault, file, monkeypatch):
    """One altered place in count_batch, and the count by hand differs."""
    faulty(trajectory_survey, "count_batch", *SURVEY_FAULTS[fault], monkeypatch)
    with pytest.raises(AssertionError):
        check_survey(survey(load_trajectories(file, batch_rows=9)), ROWS)


# memory ---------------------------------------------------------------------------------------------------------------

def test_a_survey_holds_a_batch_and_not_the_table(tmp_path):
    """In fresh processes: 25 times the rows, through hard links, are all counted, in half of what the table takes."""
    few, many = many_files(tmp_path, rows=80, counts=(1, 25))
    assert {path.stat().st_ino for path in many.iterdir()} == {path.stat().st_ino for path in few.iterdir()}
    streamed, loaded = (read_in_own_process(many, whole=whole) for whole in (False, True))
    size = sum(len(message["content"]) for each in long_rows(80) for message in each["messages"])
    assert streamed.rows == loaded.rows == 2000 and streamed.text_bytes == loaded.text_bytes == 25 * size
    assert streamed.rise_mb < loaded.rise_mb / 2 and loaded.rise_mb > streamed.text_bytes / 1e6
    with pytest.raises(LabError, match="The reading process failed: .*There are no parquet files"):
        read_in_own_process(tmp_path / "none")
