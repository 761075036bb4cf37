"""What is measured, and how well: intervals over seeds, FLOPs, memory, hardware.

Names are looked up on first use, so that reading the ledger doesn't wait for torch.
"""

import importlib

_HOME = {"interval": "intervals"}  # public name -> file of this room

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
