"""The hidden check of a repository task: what a function returns, found out without running it.

An agent writes the file, so it may hold anything: importing it, or `eval`, would run the agent's code. Here its text is
parsed, and one function of one `return` is computed by a walk over numbers, names, + - * // % and comparisons; whatever
else stands in it is wrong. So `return b + a` passes where `a + b` is meant, and `while True` costs nothing.
"""

import ast
import itertools
import operator
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES, MOST_DEPTH, ONE_AT_A_TIME = 100_000, 20, threading.Lock()
VALUES = (7, 2, 5, -3, 12)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
              ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
              ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.USub: operator.neg}


class NotComputed(Exception):
    """The text holds something that a right answer does not need."""


def compute(node: ast.expr, names: dict[str, int], depth: int = 0) -> int | bool:
    """The value of an expression; NotComputed for all but small arithmetic."""
    if depth > MOST_DEPTH:
        raise NotComputed
    if isinstance(node, ast.Constant) and type(node.value) in (int, bool) and abs(node.value) < 10**6:
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](compute(node.operand, names, depth + 1))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        parts = (node.left, node.right)
        return OPERATIONS[type(node.op)](*(compute(part, names, depth + 1) for part in parts))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATIONS:
        parts = (node.left, node.comparators[0])
        return OPERATIONS[type(node.ops[0])](*(compute(part, names, depth + 1) for part in parts))
    raise NotComputed


@dataclass(frozen=True)
class Function:
    """A function of one `return`: its name, parameters, defaults of the last of them, and expression."""

    name: str
    parameters: tuple[str, ...]
    defaults: tuple[int, ...]
    expression: str

    @classmethod
    def from_node(cls, node: ast.FunctionDef) -> "Function":
        """NotComputed for a function that does more than return."""
        body = [part for part in node.body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]  # a docstring
        plain = not (node.decorator_list or node.args.vararg or node.args.kwarg or node.args.kwonlyargs)
        if not plain or len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
            raise NotComputed
        names = tuple(argument.arg for argument in node.args.posonlyargs + node.args.args)
        defaults = tuple(compute(default, {}) for default in node.args.defaults)
        return cls(node.name, names, defaults, ast.unparse(body[0].value))

    @classmethod
    def from_source(cls, text: str) -> "Function":
        """Of a text that holds one function."""
        return cls.from_node(ast.parse(text).body[0])

    def __call__(self, arguments: tuple[int, ...]) -> int | bool | None:
        """What it returns; None where Python would raise."""
        missing = len(self.parameters) - len(arguments)
        if missing < 0 or missing > len(self.defaults):
            return None
        given = arguments + self.defaults[len(self.defaults) - missing :]
        try:
            return compute(ast.parse(self.expression, mode="eval").body,
                           dict(zip(self.parameters, given, strict=True)))
        except (NotComputed, ZeroDivisionError):
            return None

    def points(self) -> list[tuple[int, ...]]:
        """Arguments that tell the faults apart: every required parameter over a few numbers, with and without defaults.
        """
        least, most = len(self.parameters) - len(self.defaults), len(self.parameters)
        return [point for count in range(least, most + 1) for point in itertools.product(VALUES, repeat=count)]


def parsed(path: Path) -> list[ast.stmt]:
    """The statements of a plain file; none of one that is missing, a link, too large or no Python."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
        return []
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():  # the filters are the whole process's, and rollouts are threads
            warnings.simplefilter("ignore")  # an odd escape in the agent's text is its own affair
            return ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def same_behaviour(worktree: Path, path: str, wanted: Function) -> bool:
    """Whether the last definition of the name in a file returns what `wanted` does, everywhere it is tried."""
    found = [node for node in parsed(worktree / path)
             if isinstance(node, ast.FunctionDef) and node.name == wanted.name]
    if not found:
        return False
    try:
        function = Function.from_node(found[-1])
    except (NotComputed, RecursionError):
        return False
    return all(type(function(point)) is type(wanted(point)) and function(point) == wanted(point)
               for point in wanted.points())
