"""Rows of logits for tests, and [2, 75] of them in every layout that a kernel may be given."""

import torch
from torch import Tensor


def rows(N: int, V: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


VIEWS = {
    "columns of a wider tensor": lambda: rows(2, 90)[:, 7:82],
    "every second row": lambda: rows(4, 75)[::2],
    "every second column": lambda: rows(2, 150)[:, ::2],
    "transposed": lambda: rows(75, 2).t(),
    "one row expanded": lambda: rows(1, 75).expand(2, 75),
    "one column expanded": lambda: rows(2, 1).expand(2, 75),
    "offset": lambda: rows(3, 75).flatten()[3:153].view(2, 75),
}
