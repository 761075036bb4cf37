"""Matrix products that are summed in fp32 and end in the dtype that is asked for.

A GPU multiplies bf16 matrices straight into an fp32 result, without a copy of the inputs. A CPU cannot, so it converts
first; the numbers are the same.
"""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b summed in fp32 and returned in `dtype`. Only a GPU multiplies bf16 into fp32; a CPU converts first."""
    if dtype == a.dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.device.type == "cuda" else (a.float() @ b.float()).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, whatever the dtype of a and b."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
