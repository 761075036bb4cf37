"""Is the result right at the size that is timed? Ours in bf16 against its own reference in fp32, on some of the rows.

The reference would need [N, V] in fp32 several times, so it gets `check_rows` rows: half from the start, half from the
end, where offsets pass 2^31. Ours runs on all of them, and the other rows are silenced: their arriving gradient is 0,
or their target does not count. So gradients that sum over rows (of a head, of a table) must agree as a whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.measure.benchmarks import Benchmark

IGNORED = -100
Outputs = tuple[Tensor, ...]


def outputs(result: Tensor | Sequence[Tensor]) -> Outputs:
    """As a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def arriving(results: Outputs, seed: int = 0) -> Outputs | None:
    """Gradients that arrive at an op's results: None for a scalar loss, 1/N at each row's loss, else random numbers."""
    if all(result.ndim == 0 for result in results):
        return None
    generator = torch.Generator(results[0].device).manual_seed(seed)
    return tuple(torch.full_like(result, 1.0 / len(result)) if result.ndim == 1 else
                 torch.empty_like(result).normal_(generator=generator) for result in results)


def gradients(results: Outputs, leaves: Sequence[Tensor], arrives: Outputs | None) -> Outputs:
    """torch.autograd.grad through those results that have a gradient: scores by which something is chosen have none."""
    places = [place for place, result in enumerate(results) if result.requires_grad]
    arrives = None if arrives is None else [arrives[place].to(results[place].dtype) for place in places]
    return torch.autograd.grad([results[place] for place in places], leaves, arrives)


def relative_error(ours: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite where a number is not finite."""
    right = right.float() if right.dtype != torch.float64 else right
    error = (ours.to(right.dtype) - right).norm() / right.norm().clamp(min=1e-30)
    return float(error) if error.isfinite() else float("inf")


def largest_error(benchmark: Benchmark, inputs: dict[str, Tensor], exact_dtype: torch.dtype = torch.float32) -> float:
    """The largest relative error among the results and the gradients; the reference computes in `exact_dtype`."""
    row_of = benchmark.rows
    length = inputs[next(iter(row_of))].shape[next(iter(row_of.values()))] if row_of else 0
    keep = _kept(length, benchmark.check_rows, next(iter(inputs.values())).device)
    some = {name: tensor.detach() if keep is None or name not in row_of else
            tensor.detach().index_select(row_of[name], keep) for name, tensor in inputs.items()}
    exact = {name: tensor.to(exact_dtype) if tensor.is_floating_point() else tensor for name, tensor in some.items()}
    for name in benchmark.wrt:
        exact[name].requires_grad_()
    silenced = inputs if keep is None else _silenced(inputs, keep)
    with torch.set_grad_enabled(bool(benchmark.wrt)):
        ours = outputs(benchmark.call("auto", **silenced))
        right = outputs(benchmark.call("reference", **exact))
    dim = next(iter(row_of.values()), 0)
    pairs = [(each if keep is None or each.ndim == 0 else each.index_select(dim, keep), exact_each)
             for each, exact_each in zip(ours, right, strict=True)]
    errors = [relative_error(each.detach(), exact_each.detach()) for each, exact_each in pairs]
    if benchmark.wrt:
        arrives = arriving(tuple(each.detach() for each in ours))
        errors += _gradient_errors(benchmark, silenced, exact, ours, right, arrives, keep, dim)
    return max(errors)


def _gradient_errors(benchmark: Benchmark, silenced: dict, exact: dict, ours: Outputs, right: Outputs,
                     arrives: Outputs | None, keep: Tensor | None, dim: int) -> list[float]:
    arrives_exact = arrives
    if arrives is not None and keep is not None:
        arrives = tuple(_only(each, keep, dim) for each in arrives)
        arrives_exact = tuple(each.index_select(dim, keep) for each in arrives)
    found = gradients(ours, [silenced[name] for name in benchmark.wrt], arrives)
    wanted = gradients(right, [exact[name] for name in benchmark.wrt], arrives_exact)
    errors = []
    for name, ours_grad, exact_grad in zip(benchmark.wrt, found, wanted, strict=True):
        if keep is not None and name in benchmark.rows:
            ours_grad = ours_grad.index_select(benchmark.rows[name], keep)
        errors.append(relative_error(ours_grad, exact_grad))
    return errors


def _kept(length: int, rows: int | None, device: torch.device) -> Tensor | None:
    """The first and the last rows; None where that is all of them."""
    if rows is None or rows >= length:
        return None
    return torch.cat((torch.arange(rows // 2), torch.arange(length - (rows - rows // 2), length))).to(device)


def _silenced(inputs: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """Where the loss is one number over all rows, targets outside `keep` do not count."""
    if "target" not in inputs:
        return inputs
    counted = torch.full_like(inputs["target"], IGNORED)
    counted[keep] = inputs["target"][keep]
    return inputs | {"target": counted}


def _only(tensor: Tensor, keep: Tensor, dim: int) -> Tensor:
    """Zero outside `keep`."""
    return torch.zeros_like(tensor).index_copy_(dim, keep, tensor.index_select(dim, keep))
