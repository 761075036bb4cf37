"""Each guard of each kernel is needed: without it, a named test fails.

mutations.toml lists planted faults. For each, a forked child puts the faulty text in the place of the op's module and
calls the named test; it must fail. Run them with the tests themselves: pytest -m "interp or mutations" tests/kernels

    [[fault]]
    op = "cross_entropy"                               labkit/kernels/<op>.py
    fault = "v < V mask of the logits is gone"         what is wrong; the name of the test case
    guards = "mask"                                    kind of guard: mask, where, max, int64, fp32, ...
    old = "logits + v, mask=v < V"                     must stand in the file exactly once, or say which: occurrence = 2
    new = "logits + v, mask=v < V + 1"
    caught_by = "test_cross_entropy.py::test_name[id]" one case of a parametrized test; or without [id], all of them
"""

import faulthandler
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "labkit" / "kernels"
FAULTS = tomllib.loads((HERE / "mutations.toml").read_text(encoding="utf-8")).get("fault", [])
CAUGHT, MISSED, BROKEN = 10, 11, 12  # how a child ends; a signal counts as caught
SECONDS = 60
_items: dict[str, dict[str, pytest.Function]] = {}  # a test file's cases, by name

pytestmark = pytest.mark.mutations


@pytest.fixture
def cases(row, request):
    """What `caught_by` names. A fixture, since collecting inside a test would end the capture of its output."""
    import torch._dynamo  # noqa: F401  (the first custom op imports it: 4 s, once here instead of in every child)

    return collected(row["caught_by"], request.session)


@pytest.mark.parametrize("row", FAULTS, ids=[f"{row['op']}: {row['fault']} -> {row['caught_by']}" for row in FAULTS])
def test_a_planted_fault_is_caught(row, cases):
    """The named test fails when the guard is gone. (That it passes with the guard, the interp run shows.)"""
    text = mutated_text(row)
    end, said = in_child(lambda: run_with_fault(row["op"], text, cases))
    assert end != BROKEN, f"The fault could not be planted:\n{said}"
    assert end != MISSED, f"No test noticed: {row['caught_by']} passes without this guard."
    print(said.strip().splitlines()[-1] if said.strip() else f"ended by signal {-end}")


def test_every_op_has_planted_faults():
    """No file with a kernel is left out."""
    stores = re.compile(r"^ +tl\.(store|atomic)", re.MULTILINE)
    with_kernels = {path.stem for path in KERNELS.glob("*.py") if stores.search(source(path.stem))}
    assert with_kernels <= {row["op"] for row in FAULTS}


def test_no_two_faults_are_the_same():
    """Each row plants a fault of its own, under a name of its own."""
    for key in (lambda row: (row["op"], row["fault"]), mutated_text):
        assert len({key(row) for row in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("test, expected", [
    (lambda: None, MISSED), (lambda: pytest.fail("seen"), CAUGHT), (lambda: 1 / 0, CAUGHT),
    (lambda: os.kill(os.getpid(), signal.SIGSEGV), -signal.SIGSEGV),
], ids=["passes", "fails", "raises", "crashes"])
def test_the_ways_a_child_ends(test, expected):
    """A test that fails, raises or crashes has caught the fault; one that passes has not."""
    assert in_child(lambda: run_with_fault("cross_entropy", source("cross_entropy"), [test]))[0] == expected


def test_a_fault_that_does_not_parse_proves_nothing():
    """A file that cannot be loaded would make any test fail; that is an error of the row."""
    end, said = in_child(lambda: run_with_fault("cross_entropy", "def", []))
    assert end == BROKEN and "SyntaxError" in said


def test_the_faulty_module_is_what_a_test_gets():
    """The package, the module by name, and what others took from it are all exchanged; the parent keeps its own."""
    name, text = "labkit.kernels.cross_entropy", source("cross_entropy") + "\nPLANTED = True\n"
    old = importlib.import_module(name)
    holder = types.ModuleType("labkit.kernels.holder")
    holder.taken, holder.module, sys.modules[holder.__name__] = old._forward_kernel, old, holder

    def sees_the_new_one():
        from labkit import kernels

        new = importlib.import_module(name)
        assert new.PLANTED and holder.module is new
        assert new.cross_entropy is kernels.cross_entropy is not old.cross_entropy
        assert holder.taken is new._forward_kernel is not old._forward_kernel
        assert new.choose is old.choose  # what the module itself had from elsewhere stays

    try:
        end, said = in_child(lambda: run_with_fault("cross_entropy", text, [sees_the_new_one]))
    finally:
        del sys.modules[holder.__name__]
    assert end == MISSED, said
    assert not hasattr(importlib.import_module(name), "PLANTED")


def source(op: str) -> str:
    return (KERNELS / f"{op}.py").read_text(encoding="utf-8")


def mutated_text(row: dict) -> str:
    """The op's file with `old` replaced by `new` in one place."""
    pieces = source(row["op"]).split(row["old"])
    place = row.get("occurrence", 1)
    assert len(pieces) - 1 >= place, f"{row['op']}.py does not hold {place} times: {row['old']!r}"
    assert len(pieces) == 2 or "occurrence" in row, f"{row['op']}.py holds it {len(pieces) - 1} times: {row['old']!r}"
    return row["old"].join(pieces[:place]) + row["new"] + row["old"].join(pieces[place:])


def collected(node: str, session: pytest.Session) -> list[Callable[[], None]]:
    """The test functions behind "file::name" or "file::name[id]", with the values of their parameters filled in."""
    file, name = node.split("::", 1)
    if file not in _items:
        module = pytest.Module.from_parent(session, path=HERE / file)
        _items[file] = {item.name: item for item in session.genitems(module)}
    items = [item for title, item in _items[file].items() if name in (title, title.partition("[")[0])]
    assert items, f"{file} has no test {name!r}"
    return [with_parameters(item) for item in items]


def with_parameters(item: pytest.Function) -> Callable[[], None]:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    needs = set(inspect.signature(item.obj).parameters)
    assert needs <= set(given), f"{item.name} takes the fixtures {needs - set(given)}; a fault can use parameters only"
    return lambda: item.obj(**{name: given[name] for name in needs})


def run_with_fault(op: str, text: str, tests: list[Callable[[], None]]) -> int:
    """Load `text` in the place of labkit.kernels.<op> and call the tests until one fails."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            replace_module(f"labkit.kernels.{op}", text, Path(folder))
        except BaseException:
            traceback.print_exc()
            return BROKEN
        try:
            for test in tests:
                test()
        except BaseException as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return CAUGHT
    return MISSED


def replace_module(name: str, text: str, folder: Path) -> None:
    """Import `text` under this name, and exchange what other loaded modules hold of the module before."""
    importlib.import_module(name)
    old = sys.modules[name]
    path = folder / f"{name.rpartition('.')[2]}.py"  # Triton reads a kernel's source from its file
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = new = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(new)
    exchange = {id(value): vars(new)[key] for key, value in vars(old).items()
                if key in vars(new) and getattr(getattr(value, "fn", value), "__module__", None) == name}
    exchange[id(old)] = new
    for module in list(sys.modules.values()):
        if module is not old and (getattr(module, "__name__", "").startswith("labkit") or is_test(module)):
            for key, value in list(vars(module).items()):
                if id(value) in exchange:
                    setattr(module, key, exchange[id(value)])


def is_test(module: types.ModuleType) -> bool:
    return str(getattr(module, "__file__", "")).startswith(str(HERE))


def in_child(work: Callable[[], int]) -> tuple[int, str]:
    """Fork, do the work there, and return how it ended (an exit status, or minus a signal) and what it printed."""
    with tempfile.TemporaryFile("w+") as said:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside other threads
            child = os.fork()
        if not child:
            _child(work, said)
        deadline = time.monotonic() + SECONDS
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail(f"The test did not end within {SECONDS} s with the fault.")
            time.sleep(0.005)
        said.seek(0)
        return os.waitstatus_to_exitcode(done[1]), said.read()


def _child(work: Callable[[], int], said: TextIO) -> NoReturn:
    """Never returns. The output goes to `said`, since a test that fails here is what we want."""
    end = BROKEN
    try:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        sys.stdout = sys.stderr = said
        faulthandler.disable()
        end = work()
        said.flush()
    finally:
        os._exit(end)
