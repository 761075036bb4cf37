"""What a learner's answer says: a number, a row of numbers, or what a function returns, whatever library it uses.

Answers come as Python numbers, numpy values, tensors of any float type or lists of these. They are compared as exactly
as their type can hold a number: the right answer in bfloat16 is not told that it is wrong.
"""

import copy
import inspect
import reprlib
import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch

from labkit.course.check import Unreadable

# By the bits of a float type's fraction: how far a right answer may be off, as a share of it. A few roundings in the
# half types; in single precision more, because 1 - (1 - p)^n and the like lose digits.
SLACK = {52: 0.0, 23: 1e-5, 10: 4e-3, 7: 3e-2}


class Reading(float):
    """A number, and how far its type may have rounded it (a share of it)."""

    slack = 0.0


class Readings(np.ndarray):
    """A float64 array, and how far the type of its numbers may have rounded them."""

    def __array_finalize__(self, source: object) -> None:
        self.slack = getattr(source, "slack", 0.0)


def slack(answer: object) -> float:
    """How far a right answer of this type may be off, as a share of it."""
    if isinstance(answer, Reading | Readings):
        return answer.slack
    if isinstance(answer, list | tuple):
        return max(map(slack, answer), default=0.0)
    if isinstance(answer, torch.Tensor):
        bits = -round(np.log2(torch.finfo(answer.dtype).eps)) if answer.dtype.is_floating_point else 52
    else:
        dtype = getattr(answer, "dtype", np.dtype(float))
        bits = np.finfo(dtype).nmant if isinstance(dtype, np.dtype) and dtype.kind == "f" else 52
    return SLACK.get(int(bits), 0.0)


def number(answer: object) -> Reading:
    """An answer as a number: a Python or numpy number, or a tensor or array with one element."""
    if isinstance(answer, Reading):
        return answer
    if callable(answer):
        raise Unreadable("A number is asked for, not a function.")
    if answer is None:
        raise Unreadable("A number is asked for, and there is none: does the function return it?")
    if getattr(answer, "shape", ()) and np.prod(answer.shape) != 1:
        raise Unreadable(f"One number is asked for, not the shape {tuple(answer.shape)}.")
    item = answer.item() if hasattr(answer, "item") else answer
    if isinstance(item, bool | str):
        raise Unreadable(f"A number is asked for, not {item!r}.")
    try:
        got = Reading(item)
    except (TypeError, ValueError):
        raise Unreadable(f"A number is asked for, not {item!r}.") from None
    got.slack = slack(answer)
    return got


def array(answer: object) -> Readings:
    """An answer as a float64 array: an array, a tensor of any float type on any device, or a list of numbers."""
    if callable(answer) or answer is None or answer is ... or isinstance(answer, str | dict):
        raise Unreadable(f"Numbers are asked for, not {'a function' if callable(answer) else repr(answer)}.")
    plain = answer.detach().cpu().double().numpy() if isinstance(answer, torch.Tensor) else answer
    if isinstance(plain, Iterable) and not isinstance(plain, np.ndarray):
        plain = [array(each) for each in plain]
    try:
        got = np.array(plain, dtype=float).view(Readings)
    except (TypeError, ValueError):
        raise Unreadable("Numbers are asked for, in rows of equal length.") from None
    got.slack = slack(answer)
    return got


def close(answer: object, expected: float, *, within: float = 0.0, rel: float = 0.0) -> bool:
    """Whether a number is within `within`, plus `rel` times the expected one, of the expected one."""
    got = number(answer)
    return abs(got - expected) <= within + (rel + got.slack) * abs(expected)


def alike(answer: object, expected: object, *, within: float = 1e-6, rel: float = 1e-6) -> bool:
    """Whether numbers have the expected shape and each is close to the expected one."""
    got, right = array(answer), np.asarray(expected, dtype=float)
    if got.shape != right.shape:
        return False
    # what a type rounds away of the largest number may be missing in a small one: they came from a sum
    loose = within + rel * np.abs(right) + got.slack * np.abs(right).max(initial=0.0)
    return bool((np.abs(np.asarray(got) - right) <= loose).all())


def called(function: Callable, *arguments: object) -> object:
    """What a function returns for these arguments, whether it is written with torch or with numpy.

    Arrays go in as tensors; if that fails, as arrays; if that fails too, numbers go in as tensors as well. Each try has
    copies of its own, which it may change. Of the errors the one is raised that a library's name can't explain.
    """
    if not callable(function):
        raise Unreadable(f"A function is asked for, not {function!r}.")
    _takes(function, len(arguments))
    errors = []
    for dress, action in _tries(arguments):
        if dress is _all_as_tensors and not isinstance(errors[-1], AttributeError | TypeError):
            break  # a division by zero would pass with tensors
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(action, DeprecationWarning)
                return function(*map(dress, arguments))
        except Exception as error:
            errors.append(error)
    error = next((error for error in errors if not isinstance(error, AttributeError | TypeError | Warning)), errors[0])
    error.add_note(f"It was called with ({', '.join(map(shown, arguments))}).")
    raise error


def _tries(arguments: tuple) -> list:
    """How to dress the arguments, and what to do where numpy warns that it was given a tensor."""
    if any(isinstance(each, np.ndarray) for each in arguments):
        return [(_arrays_as_tensors, "error"), (_own, "default"), (_arrays_as_tensors, "ignore"),
                (_all_as_tensors, "ignore")]
    return [(_own, "default"), (_all_as_tensors, "ignore")]


def _takes(function: Callable, count: int) -> None:
    """Unreadable if a function can't be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in function that does not tell
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise Unreadable(f"The function is called with {count} arguments, and yours says: {error}.") from None


def _own(argument: object) -> object:
    return copy.deepcopy(argument) if isinstance(argument, np.ndarray | list | dict | set) else argument


def _arrays_as_tensors(argument: object) -> object:
    numbers = isinstance(argument, np.ndarray) and argument.dtype.kind in "fbi"
    return torch.from_numpy(argument.copy()) if numbers else _own(argument)


def _all_as_tensors(argument: object) -> object:
    if isinstance(argument, int | float):
        return torch.tensor(argument, dtype=torch.float64 if isinstance(argument, float) else None)
    return _arrays_as_tensors(argument)


def shown(argument: object) -> str:
    """An argument in a few characters."""
    if callable(argument):
        return "a function"
    if isinstance(argument, np.ndarray):
        return f"{np.round(argument, 3).tolist()}" if argument.size < 8 and argument.dtype.kind == "f" else "an array"
    return f"{argument:g}" if isinstance(argument, float) else reprlib.repr(argument)


def known(answer: object, mistakes: dict[float, str], *, rel: float = 0.01) -> str | None:
    """The sentence of the known mistake that leads to this number, if there is one."""
    return next((sentence for value, sentence in mistakes.items() if close(answer, value, rel=rel)), None)
