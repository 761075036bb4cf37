"""Repositories are real, repeat, hold one fault each, and are checked without running a line of them."""

import ast
import random
import re
import subprocess
import time
from pathlib import Path

import pytest
from planted import altered

from labkit.errors import LabError
from labkit.tasks import repositories, repository_check
from labkit.tasks.repositories import KINDS, make_repository, make_tasks, split_repositories
from labkit.tasks.repository_check import Function, compute, parsed, same_behaviour


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return make_tasks(12, tmp_path_factory.mktemp("repositories"), issues=4)


def resolved(task, folder: Path) -> Path:
    """A copy with the issue's line replaced."""
    worktree = task.copy_to(folder)
    path = worktree / task.fix.path
    lines = path.read_text().split("\n")
    head = next(i for i, line in enumerate(lines) if line.startswith(f"def {task.issue.split('`')[1]}("))
    place = lines.index(task.fix.wrong, head)
    lines[place] = task.fix.right
    path.write_text("\n".join(lines))
    return worktree


def test_every_task_is_wrong_as_it_is_and_right_with_its_fix(tasks, tmp_path):
    """The hidden check decides by the one line, for every kind of issue; other lines and the tests stay."""
    assert {task.kind for task in tasks} == set(KINDS)
    for i, task in enumerate(tasks):
        assert not task.correct(task.folder), task.issue
        worktree = resolved(task, tmp_path / str(i))
        assert task.correct(worktree), (task.issue, task.fix)


def test_a_fix_that_breaks_another_function_is_wrong(tasks, tmp_path):
    """Pass to pass: each of the other functions, made to return 99999, is noticed."""
    for i, task in enumerate(tasks[:8]):
        worktree = resolved(task, tmp_path / str(i))
        others = [(path, function.name) for path, function in task.functions]
        path, name = random.Random(i).choice(others)
        text = (worktree / path).read_text()
        (worktree / path).write_text(re.sub(rf"(def {name}\(.*\):\n    return ).*", r"\g<1>99999", text))
        assert not task.correct(worktree)


def test_repositories_are_real_clean_and_of_the_promised_size(tasks):
    """git finds one commit, a clean tree and nothing wrong; Python accepts every file; the fault is in one place."""
    for task in tasks[::5]:
        def git(*arguments, folder=task.folder):
            return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

        assert git("rev-list", "--all").split() == [task.base_commit] and git("status", "--porcelain") == ""
        git("fsck", "--strict")
        files = sorted(task.folder.glob("*.py"))
        assert 2 <= len(files) <= 4
        for path in files:
            ast.parse(path.read_text())
        assert sum(path.read_text().count(task.fix.wrong + "\n") for path in files) >= 1
        assert f"`{task.issue.split('`')[1]}`" in task.issue and "__" in task.instance_id


def test_the_seed_and_the_number_make_the_task(tmp_path, tasks):
    """Twice the same is the same commit; another number breaks another function of the same repository."""
    again = make_repository(3, tmp_path / "a", 2)
    assert again.base_commit == tasks[3 * 4 + 2].base_commit and again.issue == tasks[3 * 4 + 2].issue
    one, other = tasks[12], tasks[13]
    assert one.repo == other.repo and one.functions == other.functions and one.issue != other.issue
    with pytest.raises(LabError, match="is there already"):
        make_repository(3, tmp_path / "a", 2)


def test_names_of_repositories_differ(monkeypatch, tmp_path):
    """The first 576 and some behind them: no two repositories share a name, so a split by name is a split."""
    monkeypatch.setattr(repositories, "git", lambda folder, *arguments: "")
    monkeypatch.setattr(repositories, "write_repository", lambda *arguments, **settings: None)
    repos = {make_repository(seed, tmp_path).repo for seed in range(620)}
    assert len(repos) == 620


def test_the_users_git_settings_change_nothing(tmp_path, monkeypatch):
    """A hook and a template in the user's configuration don't reach the repositories."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.gitconfig").write_text("[init]\n\ttemplateDir = /nowhere\n[commit]\n\tgpgSign = true\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_AUTHOR_NAME", "me")
    task = make_repository(1, tmp_path / "repositories")
    assert (task.folder / ".git/HEAD").is_file() and not (tmp_path / "elsewhere").exists()
    assert "agent" in (task.folder / ".git/logs/HEAD").read_text()


def test_split_by_repository():
    """Two sides that share nothing and miss nothing, whatever the order; never an empty side."""
    names = [f"a/{i}" for i in range(10)] * 3
    train, held = split_repositories(names)
    assert len(train) == 8 and len(held) == 2 and train | held == set(names) and not train & held
    assert split_repositories(reversed(names)) == (train, held) != split_repositories(names, seed=1)
    assert all(map(len, split_repositories(["a", "b"], 0.01))) and all(map(len, split_repositories(["a", "b"], 0.99)))
    for bad in (["a"], []):
        with pytest.raises(LabError, match="cannot be split"):
            split_repositories(bad)
    with pytest.raises(LabError, match="cannot be split"):
        split_repositories(names, 1.0)


RIGHT = "def total(a, b):\n    return a + b\n"
BEHAVES = {  # what an agent might leave, and whether it is `total`
    RIGHT: True, "def total(a, b):\n    return b + a\n": True, "def total(x, y):\n    'sum'\n    return x - -y\n": True,
    "def total(a, b): return a + b + 0": True, "def total(a, b):\n    return a - b\n": False,
    "def total(a, b=1):\n    return a + b\n": True, "def total(a):\n    return a\n": False, "": False,
    "def total(a, b):\n    return a + c\n": False, "def total(a, b):\n    return a // 0\n": False,
    "def totl(a, b):\n    return a + b\n": False, RIGHT + RIGHT.replace("+", "*"): False,
    RIGHT.replace("+", "*") + RIGHT: True, "x = = 1\n" + RIGHT: False, "\0": False,
    "def total(a, b):\n    pass\n": False,
    "def total(a, b):\n    while True: pass\n": False, "def total(*a):\n    return a[0] + a[1]\n": False,
    "@print\n" + RIGHT: False, "def total(a, b):\n    return __import__('os').system('true') + a + b\n": False,
    "def total(a, b):\n    return 9 ** 9 ** 9 ** 9\n": False, "def total(a, b):\n    return 1 << 10 ** 9\n": False,
    "def total(a, b):\n    return 'x' * 10 ** 9\n": False, "def total(a, b):\n    return a + b + 10 ** 9\n": False,
    "def total(a, b):\n    return " + "-" * 5000 + "a + b\n": False, "(" * 5000: False,
    "def total(a, b):\n    return " + "+".join(["a"] * 3000) + "\n": False, "# " + "x" * 200_000 + "\n" + RIGHT: False,
    "async def total(a, b):\n    return a + b\n": False, "def total(a, b, *, c=1):\n    return a + b\n": False,
    "def total(a, b):\n    return True + a + b - 1\n": True, "def total(a, b):\n    return (a + b) == 0\n": False,
    "def total(a, b=print()):\n    return a + b\n": False, "def total(a, b):\n    return\n": False,
    "def total(a, b):\n    return a + b if a else b\n": False, "class total: pass": False, "'\\d'\n" + RIGHT: True,
}


@pytest.mark.parametrize("text", BEHAVES, ids=range(len(BEHAVES)))
def test_the_check_computes_and_runs_nothing(tmp_path, text):
    """Right forms pass, whatever else is wrong, and hostile texts cost no time."""
    (tmp_path / "sums.py").write_text(text)
    start = time.monotonic()
    assert same_behaviour(tmp_path, "sums.py", Function.from_source(RIGHT)) == BEHAVES[text]
    assert time.monotonic() - start < 2


def test_the_check_follows_no_link(tmp_path):
    """A link to a right file is no answer, and neither is a folder."""
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "sums.py").symlink_to(tmp_path / "right.py")
    (tmp_path / "folder.py").mkdir()
    for name in ("sums.py", "folder.py", "none.py"):
        assert parsed(tmp_path / name) == [] and not same_behaviour(tmp_path, name, Function.from_source(RIGHT))


def test_functions_agree_with_python(tasks):
    """The little interpreter against Python itself, on our own functions at all their points."""
    for task in tasks[:16]:
        for _, function in task.functions:
            default = f"={function.defaults[0]}" if function.defaults else ""
            real = eval(f"lambda {', '.join(function.parameters)}{default}: {function.expression}")
            for point in function.points():
                assert function(point) == real(*point) and type(function(point)) is type(real(*point))


@pytest.mark.parametrize(("name", "old", "new"), [
    ("compute", "ast.Name) and node.id in names", "ast.Name) and node.id in names and depth < 1"),
    ("parsed", "path.is_symlink() or ", ""),
    ("parsed", "path.stat().st_size > MOST_BYTES", "False"),
    ("same_behaviour", "found[-1]", "found[0]"),
    ("same_behaviour", "type(function(point)) is type(wanted(point)) and ", ""),
])
def test_planted_faults_of_the_check_are_noticed(tmp_path, monkeypatch, name, old, new):
    """One line altered: one of the texts above, or a link, is judged differently."""
    right = getattr(repository_check, name)
    monkeypatch.setattr(repository_check, name, altered(right, name, old, new, vars(repository_check)))
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "link.py").symlink_to(tmp_path / "right.py")
    judged = {}
    for i, text in enumerate(BEHAVES):
        (tmp_path / f"{i}.py").write_text(text)
        judged[text] = repository_check.same_behaviour(tmp_path, f"{i}.py", Function.from_source(RIGHT))
    linked = repository_check.same_behaviour(tmp_path, "link.py", Function.from_source(RIGHT))
    over = Function.from_source("def over(a, b):\n    return a == b\n")
    (tmp_path / "over.py").write_text("def over(a, b):\n    return (a == b) + 0\n")
    number = repository_check.same_behaviour(tmp_path, "over.py", over)
    assert judged != BEHAVES or linked or number


def test_compute_refuses_what_is_deep_or_large():
    """The bounds by hand."""
    assert compute(ast.parse("-(2 * 3) // 4 % 5 + True", mode="eval").body, {}) == -(2 * 3) // 4 % 5 + True
    for text in ("1000000", "'a'", "None", "1.5", "a", "f(1)", "[1]", "1 if 1 else 2", "1 < 2 < 3", "1 and 2", "not 1",
                 "-" * 30 + "1"):
        with pytest.raises(repository_check.NotComputed):
            compute(ast.parse(text, mode="eval").body, {})
