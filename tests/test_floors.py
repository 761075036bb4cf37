"""The house stands: a room imports only rooms below it, and labkit imports with a bare server's packages alone."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import labkit

ROOMS = ["kernels", "models", "data", "tasks", "objectives", "measure", "trainers", "pipeline", "course", "cli"]
HOUSE = Path(labkit.__file__).parent
ABSENT = ["triton", "IPython", "ipykernel", "ipywidgets", "jupyterlab", "nbclient", "nbconvert", "nbformat", "nbval",
          "pytest", "hypothesis", "scipy", "pyarrow", "pandas", "psutil", "yaml", "transformers", "datasets"]


def imports_of(source: str, module: str) -> set[str]:
    """Every `labkit.X` that a source imports anywhere, inside functions too, as X."""
    package = module.split(".") if module.endswith("__init__") else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "labkit" else {base}
    return {name.split(".")[1] for name in found if name.startswith("labkit.")}


def violations(house: Path) -> list[str]:
    """One line for each import that goes up, or that stands in the foundation."""
    wrong = []
    for file in sorted(house.rglob("*.py")):
        parts = file.relative_to(house).with_suffix("").parts  # cli.py counts as the room "cli"
        for target in sorted(imports_of(file.read_text(encoding="utf-8"), ".".join(("labkit", *parts)))):
            allowed = ROOMS[: ROOMS.index(parts[0]) + 1] if parts[0] in ROOMS else []
            if target in ROOMS and target not in allowed:  # the rest is the foundation, which all may use
                wrong.append(f"{'/'.join(parts)}.py imports {target}")
    return wrong


def test_a_room_imports_only_rooms_below():
    """All of labkit, by its syntax trees: lazy imports count, since they tie rooms together as well."""
    assert violations(HOUSE) == []


def test_every_folder_is_a_known_room():
    """A new folder must take its place in the order, or the rule above would not see it."""
    folders = {path.name for path in HOUSE.iterdir() if (path / "__init__.py").exists() or any(path.glob("*.py"))}
    assert folders <= set(ROOMS)


@pytest.mark.parametrize(("place", "line"), [
    ("models/bad.py", "from labkit.trainers.loop import train"),
    ("models/bad.py", "def f():\n    from labkit import course"),
    ("data/bad.py", "import labkit.measure.intervals"),
    ("objectives/bad.py", "from ..course import lab"),
    ("errors.py", "from labkit.data import corpora"),
])
def test_the_rule_catches_an_import_that_goes_up(tmp_path, place, line):
    """Each way of writing a forbidden import is found, in a room and in the foundation."""
    for room in ("models", "data", "objectives", "measure", "trainers", "course"):
        (tmp_path / room).mkdir()
    (tmp_path / place).write_text(line, encoding="utf-8")
    assert len(violations(tmp_path)) == 1


def test_labkit_imports_on_a_bare_server():
    """Every module imports in a Python where a bare server's absent packages raise on import."""
    names = [module.name for module in pkgutil.walk_packages(labkit.__path__, "labkit.")]
    assert "labkit.errors" in names and len(names) > 20
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"{{name}} is not on a bare server", name=name)
sys.meta_path.insert(0, Absent())
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, "imports", error.name)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (answer.stdout, answer.returncode) == ("", 0), answer.stderr


def test_the_set_up_needs_only_the_standard_library():
    """labkit.install runs before anything is installed: with -S there are no site-packages at all."""
    program = "import labkit.install, sys; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=HOUSE.parent)
    assert answer.stdout.strip() == "False", answer.stderr
