"""One place of labkit.pipeline's source altered, so that a check can show that it notices."""

import functools
import importlib
import inspect
import pkgutil

from planted import altered

import labkit.pipeline


def plant(monkeypatch, place: str, old: str, new: str, here: dict) -> None:
    """Replace `old`, which stands once in "module.function" or "module.Class.method", everywhere it is looked up.

    here: the globals of the test's module.
    """
    module_name, *inner, name = place.split(".")
    module = importlib.import_module(f"labkit.pipeline.{module_name}")
    owner = functools.reduce(getattr, inner, module)
    right = inspect.getattr_static(owner, name)
    written = getattr(right, "func", None) or getattr(right, "fget", None) or right  # of a property
    wrong = altered(written, name, old, new, vars(module))
    if inner:
        if isinstance(wrong, functools.cached_property):
            wrong.__set_name__(owner, name)
        monkeypatch.setattr(owner, name, wrong)
        return
    spaces = [here, vars(labkit.pipeline)] + [vars(importlib.import_module(found.name)) for found in
                                              pkgutil.iter_modules(labkit.pipeline.__path__, "labkit.pipeline.")]
    tables = [value for space in spaces for key, value in space.items() if isinstance(value, dict) and key.isupper()]
    for table in spaces + tables:  # tables of functions, such as the one of bound schedules
        for key in [key for key, value in table.items() if value is right]:
            monkeypatch.setitem(table, key, wrong)
