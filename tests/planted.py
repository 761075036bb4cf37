"""A function with one place of its source altered: a check that still passes with it would notice nothing."""

import inspect
import textwrap
from collections.abc import Callable


def altered(right: Callable, name: str, old: str, new: str, space: dict):
    """`name` as the source of `right` makes it with `old`, which stands there once, replaced; `space`: its globals."""
    text, names = textwrap.dedent(inspect.getsource(right)), {}
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
    exec(compile(text.replace(old, new), name, "exec"), space, names)
    return names[name]
