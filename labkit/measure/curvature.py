"""The largest eigenvalue of the Hessian as Adam sees it, followed through training.

    P = sqrt(v_hat) + eps        G = P^(-1/2) H P^(-1/2)        lambda = max |eigenvalue of G|

Adam divides the gradient by P, so a step of learning rate eta is safe on a quadratic while eta * lambda stays below
(2 + 2 beta_1) / (1 - beta_1), 38 at beta_1 = 0.9 (`adam_threshold`). Power iteration finds lambda from products
y = P^(-1/2) H P^(-1/2) u alone; a Hessian-vector product is the gradient of (gradient . vector). From one step of
training to the next the eigenvector hardly turns, so the tracker starts from the last one, carried along:
u <- P_t^(1/2) P_(t-1)^(-1/2) u, which is exact if P^(-1/2) u stood still.
Weights come as mappings name -> [M, ...]: M models in a stack, each with a lambda of its own (M = 1 for one model).
Sources: Taming Curvature (arXiv 2606.16768, by readers' notes); threshold: Cohen et al. (2207.14484).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.errors import LabError

Vector = dict[str, Tensor]  # name -> [M, ...]
Product = Callable[[Vector], Vector]


def adam_threshold(beta_1: float) -> float:
    """The largest stable eta * lambda of Adam with a frozen preconditioner: (2 + 2 beta_1) / (1 - beta_1)."""
    if not 0 <= beta_1 < 1:
        raise LabError(f"beta_1={beta_1} is no decay of a mean.", "Use 0 <= beta_1 < 1.")
    return (2 + 2 * beta_1) / (1 - beta_1)


def dot(a: Vector, b: Vector) -> Tensor:
    """Inner product over all weights of each model, [M]."""
    return torch.stack([(a[name] * b[name]).flatten(1).sum(1) for name in a]).sum(0)


def over(factor_M: Tensor, tensor: Tensor) -> Tensor:
    """A number a model, shaped to multiply a tensor [M, ...]."""
    return factor_M.view(-1, *[1] * (tensor.ndim - 1))


def scaled(vector: Vector, factor_M: Tensor) -> Vector:
    """Each model's part times a number."""
    return {name: each * over(factor_M, each) for name, each in vector.items()}


def unit(vector: Vector) -> Vector:
    """Length 1 in each model."""
    return scaled(vector, 1 / dot(vector, vector).sqrt().clamp(min=1e-30))


def preconditioned(loss_M: Tensor, weights: Mapping[str, Tensor], spread: Mapping[str, Tensor]) -> Product:
    """The map u -> P^(-1/2) H P^(-1/2) u, H the Hessian of each model's loss in these weights, P = `spread`.

    Only the weights named in `spread` take part. One graph serves all products; attention must be written out, since
    fused kernels have no second derivative.
    """
    leaves = {name: weights[name] for name in spread}
    gradient = torch.autograd.grad(loss_M.sum(), list(leaves.values()), create_graph=True)
    root = {name: each.detach().rsqrt() for name, each in spread.items()}

    def product(u: Vector) -> Vector:
        v = [u[name] * root[name] for name in leaves]
        turned = torch.autograd.grad(gradient, list(leaves.values()), v, retain_graph=True)
        return {name: y * root[name] for name, y in zip(leaves, turned, strict=True)}

    return product


def power_iteration(product: Product, start: Vector, iterations: int) -> tuple[Tensor, Vector]:
    """lambda = u . Gu of the last product, [M], and the vector it led to; `iterations` products in all.

    It converges to the eigenvalue of largest *size*, so lambda can be negative.
    """
    if iterations < 1:
        raise LabError(f"{iterations} iterations find no eigenvalue.", "Use 1 or more.")
    u = unit(start)
    for _ in range(iterations):
        y = product(u)
        value_M, u = dot(u, y), unit(y)
    return value_M, u


def random_vector(like: Mapping[str, Tensor], generator: torch.Generator) -> Vector:
    """A direction with no preference; drawn on the CPU, the same on every device."""
    return unit({name: torch.randn(each.shape, generator=generator).to(each) for name, each in like.items()})


class Curvature(NamedTuple):
    """One reading of a tracker."""

    value_M: Tensor  # lambda
    angle_M: Tensor  # radians between this eigenvector and the last; not a number at the first reading


class CurvatureTracker:
    """lambda of G along a run, by a few products a reading, started from the last reading's eigenvector."""

    def __init__(self, generator: torch.Generator, iterations: int = 5):
        self.generator, self.iterations = generator, iterations
        self.u: Vector = {}
        self.spread: dict[str, Tensor] = {}

    def carried(self, spread: Mapping[str, Tensor]) -> Vector:
        """The last eigenvector in the new preconditioner's coordinates; a block that is new gets a small random part,
        else no product would ever look into it."""
        fresh = random_vector(spread, self.generator)
        if not self.u:
            return fresh
        return unit({name: self.u[name] * (each / self.spread[name]).sqrt() if name in self.u else 0.1 * fresh[name]
                     for name, each in spread.items()})

    def read(self, product: Product, spread: Mapping[str, Tensor]) -> Curvature:
        """lambda now; `product` and `spread` as `preconditioned` takes and makes them."""
        start, known = self.carried(spread), bool(self.u)
        value_M, self.u = power_iteration(product, start, self.iterations)
        self.spread = {name: each.detach().clone() for name, each in spread.items()}
        cosine_M = dot(start, self.u).abs().clamp(max=1.0)
        return Curvature(value_M, cosine_M.acos() if known else torch.full_like(value_M, torch.nan))


def dense_matrix(product: Product, like: Mapping[str, Tensor]) -> Tensor:
    """G written out, [M, N, N]: one product for each of N weights; for small N, to check the rest."""
    shapes = {name: each.shape[1:] for name, each in like.items()}
    sizes, models = [shape.numel() for shape in shapes.values()], len(next(iter(like.values())))
    columns = []
    for unit_N in torch.eye(sum(sizes), dtype=next(iter(like.values())).dtype, device=next(iter(like.values())).device):
        parts = unit_N.expand(models, -1).split(sizes, dim=1)
        u = {name: part.reshape(models, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        columns.append(torch.cat([y.flatten(1) for y in product(u).values()], 1))
    return torch.stack(columns, -1)
