"""Small git repositories with one fault each, made on the spot, and a hidden check that runs none of their code.

    make_repository(seed, folder, number) -> Task     the seed makes the repository, the number breaks one function

A repository has two or three modules of two or three functions, each one line long, in half of them a test file beside
them, and one commit. An issue says what a function must do and what it does instead; it does not say in which file.

    operator    `total` must return a + b, but it returns a - b.
    order       `gap` must return a - b, but it returns b - a.
    comparison  `over` must return a > b, but it returns a < b.
    constant    `limit` must return 47, but it returns 12.
    factor      `rate` must return a * 7, but it returns a * 3.
    default     The default of k in `scale` must be 5, but it is 2.
    name        `totl` must be called `total`.

Tasks of one repository share names and files, so they belong on one side of a split: `split_repositories`.
Source: the miniature of the SWE-ZERO lab; the checks are in kind those of SWE-bench (fail to pass, pass to pass).
"""

import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import LabError
from labkit.tasks.repository_check import Function, same_behaviour
from labkit.tasks.sandbox_programs import ENVIRONMENT, FOLDERS

OWNERS = ("ada bora cleo dara egon finn gita hugo iris jono kira lars mina nils olga pavel quin rosa sven tara ugo "
          "vera wim xenia").split()
NAMES = ("anvil basin cedar delta ember ferry grove harbor inlet jetty kiln ledger mill nectar orbit pier quarry ridge "
         "sluice tower umber valley wharf yard").split()
MODULES = ("prices units stock tides wages rooms seeds roads coins scores clocks boats maps bolts lamps tools "
           "grain ropes").split()
FUNCTIONS = ("total gap share ratio bonus limit rate scale over under span cost level reach margin weight volume "
             "offset depth yield_of speed load count tax refund").split()
KINDS = ("operator", "order", "comparison", "constant", "factor", "default", "name")


@dataclass(frozen=True)
class Fix:
    """What resolves an issue: one line of one file."""

    path: str
    wrong: str
    right: str


@dataclass(frozen=True)
class Task:
    """One issue: a repository on the disk, and a check of the files that somebody leaves behind."""

    instance_id: str  # owner__name-number
    repo: str  # owner/name
    kind: str  # one of KINDS
    issue: str
    base_commit: str
    folder: Path  # the repository as the agent finds it; rollouts work on copies
    fix: Fix
    functions: tuple[tuple[str, Function], ...]  # (file, function) as they must be in the end

    def copy_to(self, folder: Path) -> Path:
        """A fresh worktree: the files and the .git of the repository, copied."""
        return Path(shutil.copytree(self.folder, folder, symlinks=True))

    def correct(self, worktree: Path) -> bool:
        """The hidden check: every function does what it must, the broken one included. Nothing is imported or run."""
        return all(same_behaviour(Path(worktree), path, function) for path, function in self.functions)


def expression(kind: str, rng: random.Random) -> tuple[str, str, str]:
    """Parameters, the right expression and a wrong one, for a function that a fault of this kind can hit."""
    one, other = rng.sample(range(10, 100) if kind == "constant" else range(2, 10), 2)
    if kind == "constant":
        return "", str(one), str(other)
    if kind == "factor":
        return "a", f"a * {one}", f"a * {other}"
    if kind == "order":
        sign = rng.choice(("-", "//", "%"))
        return "a, b", f"a {sign} b", f"b {sign} a"
    if kind == "comparison":
        right, wrong = rng.sample(("<", ">", "<=", ">=", "==", "!="), 2)
        return "a, b", f"a {right} b", f"a {wrong} b"
    right, wrong = rng.sample(("+", "-", "*"), 2)
    return "a, b", f"a {right} b", f"a {wrong} b"


def misspelt(name: str, rng: random.Random) -> str:
    """The name without one of its inner letters."""
    cut = rng.randrange(1, len(name) - 1)
    return name[:cut] + name[cut + 1 :]


@dataclass(frozen=True)
class Draft:
    """A function before it is text: what it is, and how a fault of its kind would look."""

    path: str
    kind: str
    name: str
    right: tuple[str, str]  # the line of its head, the line of its body
    wrong: tuple[str, str]
    issue: str


def draft(path: str, kind: str, name: str, rng: random.Random) -> Draft:
    """One function of a kind, right and wrong."""
    if kind == "default":
        right, wrong = rng.sample(range(2, 10), 2)
        body = "    return a * k"
        return Draft(path, kind, name, (f"def {name}(a, k={right}):", body), (f"def {name}(a, k={wrong}):", body),
                     f"The default of k in `{name}` must be {right}, but it is {wrong}.")
    parameters, right, wrong = expression(kind, rng)
    head, body = f"def {name}({parameters}):", f"    return {right}"
    if kind == "name":
        bad = misspelt(name, rng)
        return Draft(path, kind, name, (head, body), (f"def {bad}({parameters}):", body),
                     f"`{bad}` must be called `{name}`.")
    return Draft(path, kind, name, (head, body), (head, f"    return {wrong}"),
                 f"`{name}` must return {right}, but it returns {wrong}.")


def drafts(rng: random.Random) -> list[Draft]:
    """The functions of one repository: two or three modules of two or three each, no name twice."""
    paths = [f"{module}.py" for module in rng.sample(MODULES, rng.randint(2, 3))]
    places = [path for path in paths for _ in range(rng.randint(2, 3))]
    names = rng.sample(FUNCTIONS, len(places))
    return [draft(path, rng.choice(KINDS), name, rng) for path, name in zip(places, names, strict=True)]


def module_text(path: str, functions: list[Draft], broken: Draft) -> str:
    """A module's source, with the broken function in its wrong form."""
    parts = ["\n".join(function.wrong if function is broken else function.right)
             for function in functions if function.path == path]
    return "\n\n\n".join(parts) + "\n"


def test_text(broken: Draft) -> str:
    """The test that the fix must pass, as the agent may read it."""
    function = Function.from_source("\n".join(broken.right))
    arguments = function.points()[0]
    return (f"from {broken.path[:-3]} import {broken.name}\n\n\ndef test_{broken.name}():\n"
            f"    assert {broken.name}({', '.join(map(str, arguments))}) == {function(arguments)}\n")


def git(folder: Path, *arguments: str) -> str:
    """One git command on a repository of our own making, deaf to the user's settings."""
    environment = ENVIRONMENT | {"PATH": ":".join(FOLDERS), "HOME": str(folder), "GIT_CONFIG_GLOBAL": os.devnull}
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                              check=True)
    except FileNotFoundError:
        raise LabError("git is not installed, and repositories need it.", "Install it (apt install git).") from None
    return done.stdout.strip()


def make_repository(seed: int, folder: Path, number: int = 0) -> Task:
    """Write one repository with one fault and commit it.

    Args:
        seed: what the repository is; 576 of them have names of their own, later ones a digit behind it.
        folder: where; a new folder is made in it, named as the instance.
        number: which fault: functions take turns, so the same seed with another number is another issue.
    Raises:
        LabError: git is missing, or the instance is there already.
    """
    round_, place = divmod(seed, len(OWNERS) * len(NAMES))
    owner = OWNERS[place % len(OWNERS)]
    name = NAMES[(place // len(OWNERS) + place) % len(NAMES)] + (str(round_ + 1) if round_ else "")
    functions = drafts(random.Random(f"repository {seed}"))
    order = random.Random(f"faults {seed}").sample(functions, len(functions))
    broken = order[number % len(order)]
    instance = f"{owner}__{name}-{number + 1}"
    worktree = Path(folder) / instance
    if worktree.exists():
        raise LabError(f"{worktree} is there already.", "Choose an empty folder, or another seed or number.")
    write_repository(worktree, functions, broken, with_test=seed % 2 == 0)
    for arguments in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-q", "-m", "Start")):
        git(worktree, *arguments)
    wrong, right = next((w, r) for w, r in zip(broken.wrong, broken.right, strict=True) if w != r)
    wanted = tuple((one.path, Function.from_source("\n".join(one.right))) for one in functions)
    return Task(instance, f"{owner}/{name}", broken.kind, broken.issue, git(worktree, "rev-parse", "HEAD"), worktree,
                Fix(broken.path, wrong, right), wanted)


def write_repository(worktree: Path, functions: list[Draft], broken: Draft, *, with_test: bool) -> None:
    """The files of a repository."""
    worktree.mkdir(parents=True)
    for path in sorted({function.path for function in functions}):
        (worktree / path).write_text(module_text(path, functions, broken), encoding="utf-8")
    if with_test:
        (worktree / f"test_{broken.path}").write_text(test_text(broken), encoding="utf-8")


def make_tasks(repositories: int, folder: Path, *, issues: int = 1, first_seed: int = 0) -> list[Task]:
    """`issues` tasks in each of `repositories` repositories, those of one repository side by side."""
    return [make_repository(first_seed + seed, folder, number)
            for seed in range(repositories) for number in range(issues)]


def split_repositories(repos: Iterable[str], held_out: float = 0.2, seed: int = 0) -> tuple[set[str], set[str]]:
    """The repositories to train on and those held out, as sets of names; the same for any order of `repos`."""
    names = sorted(set(repos))
    if not 0 < held_out < 1 or len(names) < 2:
        raise LabError(f"{len(names)} repositories cannot be split with a share of {held_out}.",
                       "Give two or more, and a share between 0 and 1.")
    random.Random(seed).shuffle(names)
    cut = min(len(names) - 1, max(1, round(held_out * len(names))))
    return set(names[cut:]), set(names[:cut])
