"""Tuning on whole conversations, the match of commands, and the shipped models of notebook 14."""

import math
import random
from functools import partial

import pytest
import torch
from planted import altered
from torch.nn.functional import cross_entropy

from labkit.data import BPETokenizer, ByteTokenizer, load_trajectories
from labkit.data.chats import ChatTokenizer, pack_chats
from labkit.data.corpora import read_manifest
from labkit.data.trajectories import FOLDER
from labkit.errors import LabError
from labkit.files import DATA
from labkit.measure import commands
from labkit.measure.commands import MarkedChat, command_kind, command_match, mark_commands
from labkit.models import GPT, GPTConfig
from labkit.tasks import make_repository, split_repositories
from labkit.tasks.agent import MARKER, first_messages
from labkit.trainers import TrainSettings, chat_tuning
from labkit.trainers.chat_tuning import chat_loss, cut_chats, learned_share, pad_chats, tune_on_chats, whole_mask
from labkit.trainers.trace_models import (
    MODELS,
    Facts,
    load_trace_model,
    repository_windows,
    short_messages,
    trace_tokenizer,
)

CHAT = ChatTokenizer(ByteTokenizer())
MESSAGES = [("system", "s"), ("user", "go"), ("assistant", "A\n```bash\nls\n```"), ("user", "a.py"),
            ("assistant", "no command"), ("user", "?"), ("assistant", f"B\n```bash\necho {MARKER}\n```")]
MESSAGES = [{"role": role, "content": content} for role, content in MESSAGES]


def model(seed: int = 0, context: int = 128) -> GPT:
    return GPT(GPTConfig(CHAT.vocab_size, context, 16, 1, 2), seed=seed)


# kinds and marks ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command, kind", [
    ("ls -la", "list"), ("find . -name '*.py'", "list"), ("grep -n def a.py", "search"), ("cat a.py", "read"),
    ("sed -n 1,5p a.py", "read"), ("sed -i 's|a|b|' a.py", "edit"), ("sed -E -i s/a/b/ a.py", "edit"),
    (f"echo {MARKER}", "submit"), ("pytest", "other"), ("", "other")])
def test_commands_have_kinds(command, kind):
    """By their first word; sed edits only in place; the marker submits."""
    assert command_kind(f"THOUGHT: x\n```bash\n{command}\n```") == kind
    assert command_kind(f"THOUGHT: {command}") is None


def test_marks_cover_the_bash_block_and_the_end_of_the_turn():
    """Against the text: the marked tokens of turn n spell its block and end; nothing else is marked."""
    marked = mark_commands(MESSAGES, CHAT)
    assert marked.kinds == ("list", "submit")
    assert torch.equal(marked.tokens_T, CHAT.encode(MESSAGES)[0])
    for turn, place in ((0, 2), (1, 6)):
        block = MESSAGES[place]["content"].partition("\n")[2]
        assert marked.tokens_T[marked.turn_T == turn].tolist() == [*block.encode(), CHAT.end]
    assert int((marked.turn_T >= 0).sum()) == sum(len(MESSAGES[n]["content"].partition("\n")[2]) + 1 for n in (2, 6))


def test_a_cut_command_does_not_count():
    """Cut in the middle of the last command: its rest is not judged, the first one still is."""
    whole = mark_commands(MESSAGES, CHAT)
    for longest in (len(whole.tokens_T) - 1, len(whole.tokens_T) - 5):
        cut = mark_commands(MESSAGES, CHAT, longest)
        assert len(cut.tokens_T) == longest and set(cut.turn_T.tolist()) == {-1, 0}
    assert torch.equal(mark_commands(MESSAGES, CHAT, 10_000).turn_T, whole.turn_T)


def test_a_tokenizer_that_joins_thought_and_command_is_refused():
    """The marks would be wrong by a token."""
    class Joins(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.replace("\n`", "~"))

    with pytest.raises(LabError, match="joins thoughts and commands"):
        mark_commands(MESSAGES, ChatTokenizer(Joins()))


class Copies(torch.nn.Module):
    """Its likeliest next token is the chat's own, but for the places we choose; a chat's number is its third token."""

    def __init__(self, chats, wrong):
        super().__init__()
        self.embedding = torch.nn.Embedding(1, 1)
        self.chats, self.wrong = chats, wrong

    def forward(self, tokens_BT):
        logits_BTV = torch.zeros(*tokens_BT.shape, CHAT.vocab_size)
        for b, row_T in enumerate(tokens_BT):
            number = int(row_T[2]) - ord("0")
            target_T = self.chats[number].tokens_T[1:].clone()
            target_T[[place - 1 for place in self.wrong.get(number, [])]] = 0
            logits_BTV[b, torch.arange(len(target_T)), target_T] = 1.0
        return logits_BTV


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_one_wrong_token_spoils_its_command_and_no_other(batch):
    """In whatever batches: an error outside commands costs nothing, one at a command's end token costs that command."""
    longer = [*MESSAGES, {"role": "user", "content": "on"}, {"role": "assistant", "content": "C\n```bash\ncat a\n```"}]
    chats = [mark_commands([{"role": "system", "content": f"s{number}"}, *each[1:]], CHAT)
             for number, each in enumerate((MESSAGES, longer, MESSAGES[:5]))]
    end = int((chats[1].turn_T == 1).nonzero()[-1])
    thought, behind = int((chats[0].turn_T == 0).nonzero()[0]) - 1, int((chats[2].turn_T == 0).nonzero()[-1]) + 1
    match = command_match(Copies(chats, {0: [thought], 1: [end], 2: [behind]}), chats, batch=batch)
    assert match.right_N.tolist() == [1, 1, 1, 0, 1, 1] and match.place_N.tolist() == [0, 1, 0, 1, 2, 0]
    assert match.kind_N.tolist() == ["list", "submit", "list", "submit", "read", "list"]
    assert match.share() == 5 / 6 and match.share("submit") == 0.5 and math.isnan(match.share("edit"))
    with pytest.raises(LabError, match="no command to judge"):
        command_match(model(), [MarkedChat(torch.arange(4), torch.full((4,), -1), ())])


# training -------------------------------------------------------------------------------------------------------------

def chats() -> list:
    """Three conversations of different lengths."""
    return [CHAT.encode(MESSAGES[:count]) for count in (3, 5, 7)]


def test_padding_and_packing_change_no_loss():
    """The loss of a padded batch, and of packed rows, is that of the chats one by one, weighted by learned tokens."""
    pieces, student = chats(), model(context=256)
    alone = [chat_loss(student, t[None], m[None]) for t, m in pieces]
    learned = [int(m.sum()) for _, m in pieces]
    expected = sum(loss * n for loss, n in zip(alone, learned, strict=True)) / sum(learned)
    torch.testing.assert_close(chat_loss(student, *pad_chats(pieces)), expected)
    torch.testing.assert_close(chat_loss(student, *pack_chats(pieces, 256, 0)), expected)


def test_masks_cuts_and_shares():
    """All tokens, the first ones, and the learned part of them."""
    pieces = chats()
    assert all(bool(m.all()) for _, m in whole_mask(pieces)) and not bool(pieces[0][1].all())
    assert [len(t) for t, _ in cut_chats(pieces, 20)] == [20, 20, 20]
    assert learned_share(pieces) == sum(m.sum() for _, m in pieces) / sum(len(t) for t, _ in pieces)
    assert learned_share(whole_mask(pieces)) == 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_tuning_learns_what_the_mask_says(packed):
    """After 60 steps the assistant's tokens are known and the others are not; the same settings give the same bits."""
    settings = TrainSettings(60, 2e-2, batch=2, context=128, warmup=5)
    students = [model() for _ in range(2)]
    histories = [tune_on_chats(student, chats(), settings, packed=packed) for student in students]
    assert histories[0].train["loss"] == histories[1].train["loss"]
    tokens_T, learned_T = chats()[2]
    with torch.no_grad():
        surprise_T = cross_entropy(students[0](tokens_T[None, :-1])[0], tokens_T[1:], reduction="none")
    assert surprise_T[learned_T[1:]].mean() < 0.5 < 2.0 < surprise_T[~learned_T[1:]].mean()
    assert surprise_T[learned_T[1:]].max() < 2.0  # the first token of a turn and its end too


def test_what_cannot_be_tuned_on_is_refused():
    """No chats, and chats beyond the context."""
    settings = TrainSettings(1, 1e-3, batch=1, context=20, warmup=0)
    for pieces in ([], chats()):
        with pytest.raises(LabError, match="don't fit a context of 20"):
            tune_on_chats(model(), pieces, settings)


# the shipped files ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rows():
    return [row for batch in load_trajectories("shipped") for row in batch.to_pylist()]


def test_shipped_rows_are_what_the_manifest_says(rows):
    """300 rows of 75 repositories, four of each task, the stated number of submissions, less than a megabyte."""
    facts = read_manifest(FOLDER)["generated"]
    assert len(rows) == facts["rows"] == 300 and facts["bytes"] < 1e6
    assert sum(row["exit_status"] == "Submitted" for row in rows) == facts["submitted"]
    assert len({row["repo"] for row in rows}) == 75 and len({row["instance_id"] for row in rows}) == 75
    assert max(len(row["messages"]) for row in rows) == 32


def test_sources_name_what_is_shipped():
    """Names, sizes and sha256 of the manifest stand in SOURCES.md, and every file in the folder is in the manifest."""
    page, entries = (DATA / "SOURCES.md").read_text(encoding="utf-8"), read_manifest(FOLDER).values()
    for entry in entries:
        assert f"`{entry['file']}` | {entry['bytes']:,} | {entry['sha256']}" in page
    assert {path.name for path in FOLDER.iterdir()} == {"manifest.json", *(entry["file"] for entry in entries)}


def test_an_altered_file_is_refused(tmp_path, monkeypatch):
    """Rows, tokenizer and models come with their sha256."""
    manifest = (FOLDER / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest)
    for entry in read_manifest(FOLDER).values():
        (tmp_path / entry["file"]).write_bytes((FOLDER / entry["file"]).read_bytes() + b"x")
    for module in ("labkit.data.trajectories", "labkit.trainers.trace_models"):
        monkeypatch.setattr(f"{module}.FOLDER", tmp_path)
    models = [partial(load_trace_model, name) for name in MODELS]
    for load in (lambda: next(load_trajectories("shipped")), trace_tokenizer, *models):
        with pytest.raises(LabError, match="was altered"):
            load()
    with pytest.raises(LabError, match="no model 'gpt'"):
        load_trace_model("gpt")


def test_the_tokenizer_was_made_from_the_training_repositories(rows):
    """Trained again on the short form of their rows it gives the same ids."""
    train, _ = split_repositories({row["repo"] for row in rows})
    texts = [part["content"] for row in rows if row["repo"] in train for part in short_messages(row)]
    chat, again = trace_tokenizer(), BPETokenizer.train(texts, 512)
    assert all(chat.text.encode(text) == again.encode(text) for text in texts[:200])


def test_short_messages_are_those_of_a_short_rollout(tmp_path, rows):
    """The long form of a real task, shortened, is the short form that the free-running model will be asked with."""
    task = make_repository(4_321, tmp_path)
    row = {"instance_id": task.instance_id, "repo": task.repo, "messages": first_messages(task)}
    assert short_messages(row) == first_messages(task, short=True)
    assert all(short_messages(row)[2:] == row["messages"][2:] for row in rows[:20])
    with pytest.raises(LabError, match="has no parts"):
        short_messages({**row, "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]})


def test_the_base_knows_repositories_and_the_student_acts(rows):
    """On fresh repositories the base finds text far likelier than the same tokens shuffled; the student writes most
    commands of held-out repositories, the base hardly one."""
    chat, base, student = trace_tokenizer(), load_trace_model("trace-base"), load_trace_model("trace-student")
    windows_BT = repository_windows(chat, 8, seed=99, step=0)
    whole_BT = torch.ones_like(windows_BT, dtype=torch.bool)
    shuffled_BT = windows_BT[:, torch.randperm(windows_BT.shape[1], generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        text, shuffled = (float(chat_loss(base, part_BT, whole_BT)) for part_BT in (windows_BT, shuffled_BT))
    assert text < 0.6 and shuffled > 4 * text
    _, held = split_repositories({row["repo"] for row in rows})
    marked = [mark_commands(short_messages(row), chat, 1024) for row in rows if row["repo"] in held][:24]
    assert command_match(student, marked).share() > 0.6 > 0.1 > command_match(base, marked).share()


def test_repository_windows_depend_on_seed_and_step_alone():
    """And hold what a repository is made of; a fact that comes twice is the same fact."""
    chat = trace_tokenizer()
    first = repository_windows(chat, 3, 1, 2)
    assert torch.equal(first, repository_windows(chat, 3, 1, 2)) and first.shape == (3, 256)
    assert not torch.equal(first, repository_windows(chat, 3, 1, 3))
    facts = Facts.draw(random.Random(0))
    text = facts.text(random.Random(1), 9000)
    assert text.startswith(facts.name) and all(part in text for part in facts.statements) and len(text) >= 9000


# each check notices its fault -----------------------------------------------------------------------------------------

FAULTS = {
    "thought judged": (commands, "mark_commands", "[-1] * len(before)", "[len(kinds) if kind else -1] * len(before)",
                       test_marks_cover_the_bash_block_and_the_end_of_the_turn),
    "end not judged": (commands, "mark_commands", "[len(kinds) if kind else -1] * (len(after) + 1)",
                       "[len(kinds) if kind else -1] * len(after) + [-1]",
                       test_marks_cover_the_bash_block_and_the_end_of_the_turn),
    "cut commands judged": (commands, "mark_commands", "turns[longest:].count(turn) == 0", "True",
                            test_a_cut_command_does_not_count),
    "any token will do": (commands, "command_match", "hit_T[turn_T == turn].all()", "hit_T[turn_T == turn].any()",
                          lambda: test_one_wrong_token_spoils_its_command_and_no_other(2)),
    "not shifted": (commands, "command_match", "turn_BT[:, 1:]", "turn_BT[:, :-1]",
                    lambda: test_one_wrong_token_spoils_its_command_and_no_other(2)),
    "mask not shifted": (chat_tuning, "chat_loss", "learned_BT[:, 1:]", "learned_BT[:, :-1]",
                         lambda: test_tuning_learns_what_the_mask_says(False)),
    "chats see each other": (chat_tuning, "chat_loss", "document_mask_BTT=mask_BTT", "document_mask_BTT=None",
                             test_padding_and_packing_change_no_loss),
    "mask turned round": (chat_tuning, "whole_mask", "torch.ones_like", "torch.zeros_like", test_masks_cuts_and_shares),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch):
    """One altered place each, and the test named beside it fails."""
    module, name, old, new, check = FAULTS[fault]
    faulty = altered(getattr(module, name), name, old, new, vars(module).copy())
    monkeypatch.setattr(module, name, faulty)
    monkeypatch.setitem(globals(), name, faulty)
    with pytest.raises(AssertionError):
        check()
