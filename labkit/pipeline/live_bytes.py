"""An exact count of the bytes that tensors hold on a CPU: from the operation that makes a storage to its end.

    live = LiveBytes()
    with live.counting(): ...         every storage made inside counts until it dies, wherever that happens
    live.now, live.peak

It sees each operation of ATen, also those of a backward pass, through PyTorch's dispatch; so activations that autograd
keeps are counted as they are. What a kernel takes and frees within one operation (its workspace) is not seen.
"""

import threading
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Shared by all threads that count."""

    def __init__(self):
        self.now = self.peak = 0
        self.held: set[int] = set()  # data pointers
        self.lock = threading.RLock()  # a collection of garbage can end a storage inside `add`

    def counting(self) -> "Counting":
        """A context manager; each thread needs one of its own."""
        return Counting(self)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        with self.lock:
            key = storage._cdata
            if key in self.held or not storage.nbytes():
                return
            self.held.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key, storage.nbytes()).atexit = False

    def remove(self, key: int, size: int) -> None:
        with self.lock:
            self.held.discard(key)
            self.now -= size

    def forget(self) -> None:
        """Start the peak anew."""
        with self.lock:
            self.peak = self.now


class Counting(TorchDispatchMode):
    """Counts what operations return, but not what they only pass through."""

    def __init__(self, live: LiveBytes):
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if torch.is_tensor(each) and each.untyped_storage()._cdata not in given:
                self.live.add(each)
        return made
