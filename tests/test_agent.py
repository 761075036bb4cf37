"""The agent's loop keeps the published rules, its rows have the exact schema, and a right script resolves every issue.
"""

import dataclasses

import pytest
import torch
from planted import altered

from labkit.data.chats import ChatTokenizer
from labkit.data.tokenizers import ByteTokenizer
from labkit.data.trajectories import load_trajectories, write_trajectories
from labkit.errors import LabError
from labkit.models import GPT, GPTConfig
from labkit.tasks import agent
from labkit.tasks.agent import (
    MARKER,
    REPAIR,
    Turn,
    attempt,
    converse,
    first_messages,
    is_submission,
    observation,
    parse_command,
    rollout,
    rollouts,
)
from labkit.tasks.agent_policies import BLOCKED, ModelPolicy, Noise, ScriptedPolicy, bash
from labkit.tasks.repositories import make_tasks
from labkit.tasks.sandbox import Result, sandbox_problem

works = pytest.mark.skipif(sandbox_problem() is not None, reason=f"no sandbox here: {sandbox_problem()}")
SILENT = {field.name: 0.0 for field in dataclasses.fields(Noise)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return make_tasks(6, tmp_path_factory.mktemp("tasks"), issues=2)


class Echo:
    """A sandbox that answers `echo x` with x, in this process."""

    def run(self, command: str) -> Result:
        return Result(command.removeprefix("echo ") + "\n", 0, command == "echo slow", False)


def talk(*turns: Turn, cap: int = 15) -> tuple[str, list[str], list[dict]]:
    """The loop with these answers."""
    answers, messages = iter(turns), [{"role": "system", "content": "s"}, {"role": "user", "content": "t"}]
    status, commands = converse(lambda said: next(answers, None), Echo(), messages, cap)
    return status, commands, messages[2:]


def test_the_first_bash_block_is_the_command():
    """By hand: several blocks, other languages, none that is closed, and blanks around."""
    assert parse_command("THOUGHT: x\n```bash\n ls -l \n```\n```bash\nrm x\n```") == "ls -l"
    assert parse_command("```bash\ncat <<'E'\na\nE\n```") == "cat <<'E'\na\nE"
    assert parse_command("```bash  \nls```") == "ls"
    assert parse_command("```python\nx\n```\n```bash\nls\n```") == "ls" and parse_command("```bash\n\n```") == ""
    for text in ("", "ls", "```bash\nls", "```\nls\n```", "```bash ls```", "```sh\nls\n```"):
        assert parse_command(text) is None


def test_the_marker_counts_on_the_first_line_of_an_output_alone():
    """As the published loop reads it: blank lines before it, and anything behind it."""
    for text in (MARKER, f"\n\n  {MARKER}  \nmore", f"{MARKER}\n\n[command timed out]"):
        assert is_submission(text)
    for text in ("", "\n", f"done\n{MARKER}", f"{MARKER}!", f"echo {MARKER}", MARKER.lower()):
        assert not is_submission(text)


def test_an_observation_says_when_time_ran_out():
    """Else it is the output as it is, an empty one too."""
    assert observation(Result("a\n", 1, False, True)) == "a\n" and observation(Result("", 0, False, False)) == ""
    assert observation(Result("a\n", 137, True, False)) == "a\n\n\n[command timed out]"
    assert observation(Result("", 137, True, False)) == "[command timed out]"


def test_a_finished_trace_ends_with_the_assistant():
    """Observations stand behind every command but the last, whose output is the marker."""
    status, commands, said = talk(*(Turn(bash("t", command)) for command in ("echo a", f"echo {MARKER}", "echo b")))
    assert status == "Submitted" and commands == ["echo a", f"echo {MARKER}"]
    assert [m["role"] for m in said] == ["assistant", "user", "assistant"] and said[1]["content"] == "Observation: a\n"


def test_an_answer_without_a_command_is_repaired_only_if_it_was_cut():
    """Cut off: the sentence that asks for a command, and on; ended by the model itself: the sentence, and the end."""
    status, commands, said = talk(Turn("I th", cut=True), Turn(bash("t", "echo a")), Turn("I am done."),
                                  Turn(bash("t", "ls")))
    assert status == "incomplete" and commands == ["echo a"] and len(said) == 6
    assert said[1] == said[5] == {"role": "user", "content": REPAIR} and said[4]["content"] == "I am done."


def test_fifteen_turns_make_thirty_two_messages():
    """The longest rows of the published set; and a policy with no room ends before."""
    turns = [Turn(bash("t", f"echo {i}")) for i in range(40)]
    status, commands, said = talk(*turns)
    assert status == "incomplete" and len(commands) == 15 and len(said) + 2 == 32
    assert talk(*turns[:3])[0] == "incomplete" and len(talk(*turns[:3])[1]) == 3
    assert len(talk(*turns, cap=2)[1]) == 2 and talk()[2] == []


@pytest.mark.parametrize(("name", "old", "new"), [
    ("converse", "if turn.cut:", "if not turn.cut:"), ("converse", "return FINISHED, commands", "break"),
    ("converse", "range(turns)", "range(turns + 1)"), ("is_submission", "lines[0]", "lines[-1]"),
    ("parse_command", "BLOCK.search(text)", "list(BLOCK.finditer(text))[-1:][0]"),
    ("observation", "if result.timed_out else", "if result.exit_code else"),
    ("converse", 'messages.append({"role": "user", "content": REPAIR})', "pass"),
])
def test_planted_faults_of_the_loop_are_noticed(monkeypatch, name, old, new):
    """One line altered: one of the tests above fails."""
    fault = altered(getattr(agent, name), name, old, new, vars(agent))
    monkeypatch.setattr(agent, name, fault)
    monkeypatch.setitem(globals(), name, fault)
    with pytest.raises((AssertionError, IndexError)):
        for test in (test_the_first_bash_block_is_the_command, test_an_observation_says_when_time_ran_out,
                     test_the_marker_counts_on_the_first_line_of_an_output_alone,
                     test_a_finished_trace_ends_with_the_assistant, test_fifteen_turns_make_thirty_two_messages,
                     test_an_answer_without_a_command_is_repaired_only_if_it_was_cut):
            test()


def test_prompts_state_the_rules(tasks):
    """Both forms name the marker and what is not there; the task names repository and issue, the long one the commit.
    """
    task = tasks[0]
    for short in (False, True):
        system, user = (message["content"] for message in first_messages(task, short=short))
        assert MARKER in system and "cd" in system and "pytest" in system and "bash block" in system
        assert task.issue in user and task.repo in user and task.fix.path not in user
    assert task.base_commit in first_messages(task)[1]["content"]


@works
def test_a_script_without_noise_resolves_every_issue(tasks):
    """Six turns, submitted, correct; and the row has the published schema and no more."""
    for i, done in enumerate(rollouts(tasks, ScriptedPolicy(Noise(**SILENT)), short=True)):
        assert done.submitted and done.correct and len(done.commands) == 6, tasks[i].issue
        row = done.row
        assert list(row) == ["instance_id", "repo", "messages", "trajectory_format", "exit_status", "duration_sec"]
        assert row["instance_id"] == tasks[i].instance_id and row["trajectory_format"] == "mini-swe-agent-1"
        assert all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in row["messages"])
        assert len(row["messages"]) == 13 and isinstance(row["duration_sec"], float) and row["duration_sec"] > 0
        assert f"def {tasks[i].issue.split('`')[1]}" in row["messages"][5]["content"]  # what grep found


@works
@pytest.mark.parametrize(("noise", "submitted", "correct"), [
    ("wrong_edit", True, False), ("no_edit", True, False), ("talks", False, True), ("wanders", False, True)])
def test_each_noise_ends_as_it_should(tasks, noise, submitted, correct):
    """Submitted and correct are two things: all four cases of them, in the numbers of messages that they leave."""
    done = attempt(ScriptedPolicy(Noise(**SILENT | {noise: 1.0})), tasks[0], seed=1)
    assert done.submitted == submitted and done.correct == correct
    assert len(done.row["messages"]) == {"wrong_edit": 13, "no_edit": 9, "talks": 12, "wanders": 32}[noise]
    assert done.row["messages"][-1]["role"] == ("assistant" if submitted else "user")


@works
def test_what_is_not_there_says_so_and_cd_does_not_last(tasks):
    """Every blocked call of the script: "command not found", but for cd, which does nothing to the next command."""
    done = attempt(ScriptedPolicy(Noise(**SILENT | {"blocked": 1.0})), tasks[1], seed=4, turns=30)
    called = [(said["content"], heard["content"]) for said, heard in zip(done.row["messages"][2:-1:2],
                                                                        done.row["messages"][3::2], strict=True)]
    blocked = [(said, heard) for said, heard in called if any(said.count(call.split()[0]) for call in BLOCKED)]
    assert done.correct and len(blocked) >= 6
    for said, heard in blocked:
        assert "command not found" in heard or ("cd /repo" in said and heard == "Observation: ")


@works
def test_rollouts_depend_on_their_seed_and_not_on_the_workers(tasks):
    """The same messages from one worker and from three; others from another seed; the task's folder is untouched."""
    before = {path: path.read_bytes() for path in tasks[0].folder.rglob("*") if path.is_file()}
    policy, chosen = ScriptedPolicy(), [tasks[0], tasks[0], tasks[3], tasks[5]]

    def messages(**settings):
        return [done.row["messages"] for done in rollouts(chosen, policy, short=True, **settings)]

    one = messages(workers=1)
    assert one == messages(workers=3) and one[0] != one[1] and one != messages(policy_seed=1)
    assert before == {path: path.read_bytes() for path in tasks[0].folder.rglob("*") if path.is_file()}
    assert rollouts([], policy) == []


@works
def test_rows_can_be_written_and_read(tasks, tmp_path):
    """The checks of labkit.data accept what the loop makes, an answer without a command and a full rollout too."""
    pytest.importorskip("pyarrow")
    noises = [Noise(), *(Noise(**SILENT | {name: 1.0}) for name in ("talks", "wanders", "no_edit"))]
    rows = [rollout(ScriptedPolicy(noise), tasks[2], seed=seed) for seed, noise in enumerate(noises)]
    assert write_trajectories(tmp_path / "rows.parquet", rows) == 4
    read = [row for batch in load_trajectories(tmp_path / "rows.parquet") for row in batch.to_pylist()]
    assert read == rows


@works
def test_an_error_of_a_policy_reaches_the_caller(tasks):
    """And ends the others."""
    class Broken:
        def begin(self, task, seed):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        rollouts(tasks, Broken())
    with pytest.raises(LabError, match="0 turns"):
        rollout(ScriptedPolicy(), tasks[0], turns=0)


def tiny(context: int) -> tuple[GPT, ChatTokenizer]:
    """A model that knows nothing, and bytes with headers."""
    chat = ChatTokenizer(ByteTokenizer())
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=chat.vocab_size, layers=1, width=16, heads=2, context=context, tied=False)
    return GPT(config), chat


def test_a_model_answers_by_its_template_and_seed(tasks):
    """Greedy: the likeliest tokens after the assistant's header; sampled: the seed decides; cut where no end came."""
    model, chat = tiny(2048)
    messages = first_messages(tasks[0], short=True)
    with torch.no_grad():
        likeliest = model(torch.tensor([chat.prompt(messages)]))[0, -1].argmax().item()
    turn = ModelPolicy(model, chat, max_new_tokens=5).begin(tasks[0], 0)(messages)
    assert turn.cut == (likeliest != chat.end)
    assert likeliest == chat.end or turn.text.encode()[:1] == chat.decode([likeliest]).encode()[:1]

    def sampled(seed):
        return ModelPolicy(model, chat, temperature=1.0, max_new_tokens=20).begin(tasks[0], seed)(messages).text

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_model_that_ends_its_turn_is_not_cut_and_its_end_is_no_text(tasks):
    """The end token's row of the head is made the likeliest: an empty answer that the model itself has ended."""
    model, chat = tiny(2048)
    with torch.no_grad():
        messages = first_messages(tasks[0], short=True)
        hidden_D = model.trunk(model.embed(torch.tensor([chat.prompt(messages)])))[0, -1]
        model.head_weight[chat.end] = 1000 * hidden_D
    turn = ModelPolicy(model, chat).begin(tasks[0], 0)(messages)
    assert turn == Turn("", cut=False)


def test_a_full_context_ends_the_rollout(tasks):
    """No room for a token: None; a little room: a short answer that is cut."""
    model, chat = tiny(2048)
    messages = first_messages(tasks[0], short=True)
    used = len(chat.prompt(messages))
    answers = {room: ModelPolicy(tiny(used + room - 1)[0], chat, temperature=1.0).begin(tasks[0], 0)(messages)
               for room in (0, 3)}
    assert answers[0] is None and len(answers[3].text) <= 3
    with pytest.raises(LabError, match="at least one token"):
        ModelPolicy(model, chat, max_new_tokens=0)


@works
def test_a_model_plays_the_agent(tasks):
    """The whole loop with a model that knows nothing: a row that is incomplete and wrong, and no error."""
    model, chat = tiny(2048)
    done = attempt(ModelPolicy(model, chat, temperature=1.0, max_new_tokens=8), tasks[0], turns=3, short=True)
    assert not done.submitted and not done.correct and done.row["messages"][-1]["content"] == REPAIR
